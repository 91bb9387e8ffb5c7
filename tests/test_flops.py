"""Exact FLOPs at full size, from shapes alone; openpi's by its own jaxpr: 14.946 and 17.345 T a training example."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax import flops
from pi0_jax.batch import example_batch
from pi0_jax.config import PI0, PI05, Gaussian
from pi0_jax.model.head import make_head
from pi0_jax.pi0 import SampleOptions, init_params, make_objective, sample_actions
from pi0_jax.sampler import Euler
from tests.conftest import tiny_config

FLOW = Gaussian(mask_padded_steps=False)
training = functools.cache(lambda model, **flow: flops.training(model, dataclasses.replace(FLOW, **flow)) / 1e12)


def with_two_cameras(model):
    return dataclasses.replace(model, cameras=model.cameras[:2])


@pytest.mark.parametrize(
    ("model", "full", "none", "two"), [(PI0, 14.26, 11.56, 0.70), (PI05, 16.51, 13.38, 0.73)], ids=["pi0", "pi05"]
)
def test_a_training_example_costs_no_more_than_it_has_to(model, full, none, two):
    cost = {remat: training(dataclasses.replace(model, remat=remat)) for remat in ("full", "gate_up", "none")}
    assert cost["none"] <= none
    assert cost["none"] < cost["gate_up"] < cost["full"] <= full
    assert training(with_two_cameras(model)) <= two * cost["full"]
    assert training(model, draws=8) <= 1.08 * cost["full"]


@pytest.mark.parametrize(
    ("model", "bound"), [(PI0, 4.20), (with_two_cameras(PI0), 2.96), (PI05, 4.81)], ids=["pi0", "two cameras", "pi05"]
)
def test_a_chunk_in_ten_steps_costs_no_more_than_it_has_to(model, bound):
    objective, batch = make_objective(FLOW, model), example_batch(model, 1)
    params = jax.eval_shape(lambda: init_params(objective, jax.random.key(0)))

    def sample(params, noise):
        return sample_actions(objective, params, batch.observation, noise, SampleOptions(sampler=Euler(num_steps=10)))

    noise = jax.ShapeDtypeStruct(batch.actions.shape, "float32")
    assert flops.count(sample, params, noise) / 1e12 <= bound


def test_frozen_parameters_cost_no_gradient():
    model = tiny_config(cameras=())
    shapes = jax.eval_shape(make_head(model).init, jax.random.key(0))
    names = flatten_dict(nn.meta.unbox(shapes), sep="/")
    whole, forward = (flops.training(model, FLOW, backward=backward) for backward in (True, False))
    head = flops.training(model, FLOW, frozen={name for name in names if not name.startswith("action_out")})
    assert forward < head < 1.2 * forward < whole


def test_products_convolutions_loops_and_recomputation_are_counted_by_hand():
    x, w = jnp.ones((3, 4)), jnp.ones((4, 4))
    product = 2 * 3 * 4 * 4
    assert flops.count(jnp.matmul, x, w) == product
    assert flops.count(lambda x, w: jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)[0], x, w) == 5 * product
    ends = lambda carry: (carry[0] < 3) & (carry[1][0, 0] < 9.0)  # noqa: E731
    early = lambda x, w: jax.lax.while_loop(ends, lambda c: (c[0] + 1, c[1] @ w), (0, x))  # noqa: E731
    assert flops.count(early, x, w) == 3 * product
    assert flops.count(lambda x, w: jax.lax.cond(x[0, 0] > 0, lambda: x @ w @ w, lambda: x @ w), x, w) == 2 * product
    loss = jax.checkpoint(lambda x, w: jnp.sum(jnp.sin(jnp.sin(x @ w) @ w)))
    # Two products forward, both again for the sines' slopes, two for each gradient.
    assert flops.count(jax.grad(loss, (0, 1)), x, w) == 8 * product
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((4, 4, 3, 5))
    convolve = functools.partial(
        jax.lax.conv_general_dilated, window_strides=(4, 4), padding="VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    assert flops.count(convolve, image, kernel) == 2 * (2 * 2 * 2 * 5) * (4 * 4 * 3)
    with pytest.raises(ValueError, match="while loop"):
        flops.count(lambda x, w: jax.lax.while_loop(lambda x: x[0, 0] < 9, lambda x: x @ w, x), x, w)


def test_devices_are_known_by_a_part_of_their_name():
    assert flops.peak("NVIDIA H100 80GB HBM3") == 989e12
    assert flops.peak("TPU v5 lite") == 197e12
    assert flops.peak("cpu") is None
