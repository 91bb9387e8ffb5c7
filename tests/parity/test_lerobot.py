"""Against LeRobot's own numbers: its policy folders, read without torch; float32, highest matmul precision.

Every folder `lerobot_pi0*` of the fixtures is tested. Tolerances are relative errors in the L2 norm. LeRobot computes
the flow time as 1 + i·dt where openpi and we add dt up, a difference of 1e-7 in time that the samples show at 1e-5.
"""

import jax
import jax.numpy as jnp
import pytest

from pi0_jax.flow.path import Straight, interpolate
from pi0_jax.flow.realtime import Previous, real_time_chunking
from tests.conftest import fixtures_root
from tests.parity.common import Case, folders, relative_error


@pytest.fixture(scope="module", params=folders("lerobot_*", "pi0", "pi05"), ids=lambda folder: folder and folder.name)
def case(request):
    if request.param is None:
        pytest.skip(f"no lerobot_* policies in {fixtures_root()}; set PI0_FIXTURES to where they are")
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


def test_loss_of_every_action_dimension(case):
    x, target = interpolate(Straight(), case.io["actions"], case.io["noise"], case.io["time"])
    velocity = case.apply(case.observation, jnp.asarray(x), jnp.asarray(case.io["time"]))
    expected = case.io["loss_elementwise"]
    assert relative_error(jnp.square(velocity - target)[..., : expected.shape[-1]], expected) <= 1e-5


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_euler_samples(case, num_steps):
    sample = case.sample(case.io["noise"], num_steps)
    assert relative_error(sample, case.io[f"sample_{num_steps}"]) <= 1e-4


@pytest.mark.parametrize("schedule", ["linear", "exp", "ones", "zeros"])
def test_samples_of_real_time_chunking(case, schedule):
    sample = _real_time_samples(case, schedule, through_network=False)
    assert relative_error(sample, case.io[f"rtc_{schedule}_5"]) <= 1e-4


def test_samples_of_real_time_chunking_are_not_the_papers(case):
    sample = _real_time_samples(case, "exp", through_network=True)
    assert relative_error(sample, case.io["rtc_exp_5"]) > 1e-2


def _real_time_samples(case, schedule, through_network):
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
        prefix = case.network.prefill(params, observation)

        def velocity(x, time):
            return case.network.velocity(params, prefix, x, jnp.full(batch, time))

        guided = real_time_chunking(
            velocity, previous, schedule, float(case.io["rtc_max_guidance"]), through_network=through_network
        )
        times = jnp.asarray([1.0 + i * (-1.0 / 5) for i in range(5)], jnp.float32)
        return jax.lax.scan(lambda x, time: (x - guided(x, time) / 5, None), noise, times)[0]

    return run(case.params, case.observation, noise)
