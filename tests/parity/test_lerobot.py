"""Against LeRobot's own numbers: its policy folders, read without torch; float32, highest matmul precision.

Every folder `lerobot_pi0*` of the fixtures is tested. Tolerances are relative errors in the L2 norm. LeRobot computes
the flow time as 1 + i·dt where openpi and we add dt up, a difference of 1e-7 in time that the samples show at 1e-5.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

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
