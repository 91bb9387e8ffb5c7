"""The schedule is openpi's, and Muon orthogonalises each layer's matrix on its own and leaves the rest to Adam."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import meta

from pi0_jax.config import PI0, PI05, Gaussian, OptimConfig
from pi0_jax.objective import make_objective
from pi0_jax.training import optimizer

MUON = OptimConfig(name="muon", peak_lr=1.0, end_lr=1.0, warmup_steps=0, weight_decay=0.0, clip_norm=1e9)


def boxed(names: tuple, shape: tuple, key=0):
    return nn.LogicallyPartitioned(jax.random.normal(jax.random.key(key), shape), names)


def first_update(tree, config=MUON):
    """The first update for random gradients, and those gradients."""
    schedule = optax.constant_schedule(config.peak_lr)
    transform = optimizer.make_optimizer(config, schedule, tree)
    params = meta.unbox(tree)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    gradient = jax.tree.unflatten(structure, [jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])
    return one_update(transform, gradient, params), gradient


def one_update(transform, gradient, params):
    return jax.jit(lambda g, p: transform.update(g, transform.init(p), p)[0])(gradient, params)


@pytest.mark.parametrize(
    ("step", "expected"), [(0, 2.5e-5 / 1001), (500, None), (1000, 2.5e-5), (15_500, 1.375e-5), (30_000, 2.5e-6)]
)
def test_the_schedule_has_openpis_values(step, expected):
    schedule = optimizer.make_schedule(OptimConfig(), 30_000)
    expected = expected or 2.5e-5 * (1 / 1001 + 0.5 * 1000 / 1001)
    np.testing.assert_allclose(schedule(step), expected, rtol=1e-4)


def test_the_decay_ends_with_the_run_unless_told_otherwise():
    config = OptimConfig(warmup_steps=10, peak_lr=1.0, end_lr=0.1)
    assert optimizer.make_schedule(config, 50)(50) == pytest.approx(0.1)
    assert optimizer.make_schedule(OptimConfig(warmup_steps=10, decay_steps=100), 50)(50) > 1e-5


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ValueError, match=r"warmup_steps is 1000.*--optim\.warmup-steps 10"):
        optimizer.make_schedule(OptimConfig(), 100)


@pytest.mark.parametrize(
    ("names", "shape", "split"),
    [
        (("layers", "embed", "heads", "head_dim"), (3, 32, 4, 16), 1),
        (("layers", "heads", "head_dim", "embed"), (3, 4, 8, 64), 2),
        (("layers", "stack", "embed", "kv_heads", "head_dim"), (3, 2, 32, 1, 8), 1),
        (("layers", "mlp", "embed"), (3, 48, 24), 1),
        (("embed", "embed_out"), (32, 16), 1),
    ],
)
def test_muon_makes_every_layers_matrix_orthogonal_with_the_same_root_mean_square(names, shape, split):
    update, _ = first_update({"w": boxed(names, shape)})
    batch = [n for n in names if n in ("layers", "stack")]
    matrix_shape = shape[len(batch) :]
    rows = int(np.prod(matrix_shape[:split]))
    matrices = np.asarray(update["w"]).reshape(-1, rows, int(np.prod(matrix_shape[split:])))
    assert len(matrices) == int(np.prod(shape[: len(batch)]))
    scale = 0.2 * np.sqrt(max(matrices.shape[1:]))
    for matrix in matrices:
        singular = np.linalg.svd(matrix, compute_uv=False) / scale
        assert singular.min() > 0.6
        assert singular.max() < 1.3
        assert np.sqrt(np.mean(matrix**2)) == pytest.approx(0.2, rel=0.2)


def test_a_layers_muon_update_does_not_depend_on_the_other_layers():
    names = ("layers", "embed", "heads", "head_dim")
    tree = {"w": boxed(names, (3, 16, 2, 8))}
    transform = optimizer.make_optimizer(MUON, optax.constant_schedule(1.0), tree)
    params = meta.unbox(tree)
    gradient = jax.random.normal(jax.random.key(1), (3, 16, 2, 8))
    other = gradient.at[1:].multiply(100.0).at[2].add(1.0)
    a, b = (one_update(transform, {"w": g}, params)["w"] for g in (gradient, other))
    np.testing.assert_array_equal(a[0], b[0])
    assert not np.allclose(a[2], b[2], atol=1e-2)


def test_muon_ignores_the_gradients_scale_and_points_downhill():
    tree = {"w": boxed(("embed", "mlp"), (16, 32))}
    update, gradient = first_update(tree)
    assert jnp.vdot(update["w"], gradient["w"]) < 0
    scaled, _ = first_update(tree, OptimConfig(**{**vars(MUON), "clip_norm": 1e-3}))
    np.testing.assert_allclose(update["w"], scaled["w"], atol=1e-3)


@pytest.mark.parametrize("config", [PI0, PI05], ids=["pi0", "pi05"])
def test_the_full_model_gives_hidden_matrices_to_muon_and_everything_else_to_adam(config):
    tree = jax.eval_shape(make_objective(Gaussian(), config).network.init, jax.random.key(0))
    dimensions = optimizer.muon_dimensions(tree)
    of_muon = {
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree.leaves_with_path(dimensions, is_leaf=lambda x: isinstance(x, tuple))
    }
    leaves = {
        jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(meta.unbox(tree))
    }
    experts = {
        f"backbone/layers/{expert}/{leaf}"
        for expert in ("language", "action")
        for leaf in ("attn/q", "attn/kv", "attn/o", "mlp/gate_up", "mlp/down")
    }
    vision = {f"image_encoder/layers/{x}/kernel" for x in ("query", "key", "value", "out", "mlp_in", "mlp_out")}
    assert of_muon == experts | vision | {"image_projector/kernel", "time_mlp_in/kernel", "time_mlp_out/kernel"}
    table = optimizer.describe(tree).splitlines()
    assert {line.split()[1] for line in table} == leaves
    assert {line.split()[1] for line in table if line.startswith("muon")} == of_muon


def test_the_gradient_is_clipped_by_its_global_norm_before_the_optimizer():
    tree = {"w": boxed(("embed",), (4,)), "v": boxed(("embed",), (4,))}
    config = OptimConfig(clip_norm=1.0)
    transform = optimizer.make_optimizer(config, optax.constant_schedule(1.0), tree)
    params = meta.unbox(tree)
    gradient = {"w": jnp.full(4, 300.0), "v": jnp.full(4, 400.0)}
    _, state = transform.update(gradient, transform.init(params), params)
    moment = optax.tree.get(state, "mu")
    np.testing.assert_allclose(optax.tree.norm(moment), 1.0 - config.b1, rtol=1e-5)
    np.testing.assert_allclose(moment["v"] / moment["w"], 4 / 3, rtol=1e-5)
