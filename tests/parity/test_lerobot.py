"""Against LeRobot's own numbers: its policy folders, read without torch; float32, highest matmul precision.

Every folder `lerobot_pi0*` of the fixtures is tested. Tolerances are relative errors in the L2 norm. LeRobot computes
the flow time as 1 + i·dt where openpi and we add dt up, a difference of 1e-7 in time that the samples show at 1e-5.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from pi0_jax.flow.guidance import Previous, identity_real_time_chunking, real_time_chunking
from pi0_jax.flow.path import interpolate
from pi0_jax.pi0 import sample_actions
from tests.conftest import fixtures_root
from tests.parity.common import Case, folders, relative_error


@pytest.fixture(scope="module", params=folders("lerobot_*", "pi0", "pi05"), ids=lambda folder: folder and folder.name)
def case(request):
    if request.param is None:
        pytest.skip(f"no lerobot_* policies in {fixtures_root()}; set PI0_FIXTURES to where they are")
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


def test_loss_of_every_action_dimension(case):
    x, target = interpolate(case.io["actions"], case.io["noise"], case.io["time"])
    velocity = case.apply(case.observation, jnp.asarray(x), jnp.asarray(case.io["time"]))
    expected = case.io["loss_elementwise"]
    assert relative_error(jnp.square(velocity - target)[..., : expected.shape[-1]], expected) <= 1e-5


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_euler_samples(case, num_steps):
    sample = jax.jit(functools.partial(sample_actions, case.network, num_steps=num_steps))
    sample = sample(case.params, case.observation, jnp.asarray(case.io["noise"]))
    assert relative_error(sample, case.io[f"sample_{num_steps}"]) <= 1e-4


@pytest.mark.parametrize("schedule", ["linear", "exp", "ones", "zeros"])
def test_samples_of_real_time_chunking(case, schedule):
    sample = _real_time_samples(case, identity_real_time_chunking, schedule)
    assert relative_error(sample, case.io[f"rtc_{schedule}_5"]) <= 1e-4


def test_samples_of_real_time_chunking_are_not_the_papers(case):
    sample = _real_time_samples(case, real_time_chunking, "exp")
    assert relative_error(sample, case.io["rtc_exp_5"]) > 1e-2


def _real_time_samples(case, chunking, schedule):
    """Five Euler steps on LeRobot's own grid of times."""
    left, noise = case.io["rtc_previous"], jnp.asarray(case.io["noise"])
    batch, horizon, _ = noise.shape
    previous = Previous(
        jnp.pad(left, ((0, 0), (0, horizon - left.shape[1]), (0, 0))),
        jnp.full(batch, case.io["rtc_delay"]),
        jnp.full(batch, min(int(case.io["rtc_execution_horizon"]), left.shape[1])),
    )

    @jax.jit
    def run(params, observation, noise):
        apply = functools.partial(case.network.apply, {"params": params})
        prefix = apply(observation, method="prefill")

        def velocity(x, time):
            return apply(prefix, x, jnp.full(batch, time), method="velocity")

        guided = chunking(velocity, previous, schedule, float(case.io["rtc_max_guidance"]))
        times = jnp.asarray([1.0 + i * (-1.0 / 5) for i in range(5)], jnp.float32)
        return jax.lax.scan(lambda x, time: (x - guided(x, time) / 5, None), noise, times)[0]

    return run(case.params, case.observation, noise)
