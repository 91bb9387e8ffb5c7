import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.sampler.exact import integrate_exactly
from tests.flow.toy import gaussian_velocity

MEAN, DEVIATION = jnp.array([[[1.0, -0.5]]]), jnp.array([[[0.3, 1.5]]])
velocity = gaussian_velocity(MEAN, DEVIATION)


@pytest.mark.parametrize("solver", ["tsit5", "dopri5"])
def test_the_adaptive_solver_gives_the_closed_form(solver):
    noise = jax.random.normal(jax.random.key(0), (4096, 1, 2))
    end = jax.jit(lambda x: integrate_exactly(velocity, x, solver=solver))(noise)
    np.testing.assert_allclose(end, MEAN + DEVIATION * noise, atol=2e-3)


def test_the_adaptive_solver_refuses_what_it_does_not_have():
    with pytest.raises(ValueError, match="choose tsit5 or dopri5"):
        integrate_exactly(velocity, jnp.zeros((1, 1, 2)), solver="euler")
