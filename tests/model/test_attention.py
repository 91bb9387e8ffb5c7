import functools
from types import MappingProxyType

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.linen import meta

from pi0_jax.config import VisionConfig
from pi0_jax.model import siglip
from pi0_jax.model.attention import attend, fused, watch_attention
from pi0_jax.model.declare import Declare
from pi0_jax.model.layers import gated, rotate, rotate_folded, rotation
from pi0_jax.model.target import tracing_for


def test_rotation_keeps_lengths_and_depends_on_relative_positions_only():
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(q_position, k_position):
        rotated = [rotate(x, rotation(jnp.array([[p]]), 8)) for x, p in ((q, q_position), (k, k_position))]
        np.testing.assert_allclose(jnp.linalg.norm(rotated[0]), jnp.linalg.norm(q), rtol=1e-6)
        return float(jnp.sum(rotated[0] * rotated[1]))

    np.testing.assert_allclose(score(3, 1), score(12, 10), rtol=1e-4)
    assert abs(score(3, 1) - score(3, 2)) > 1e-3


def test_rotation_by_a_product_is_the_same():
    x = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    by = rotation(jnp.arange(3)[None], 8)
    with tracing_for("tpu"):
        np.testing.assert_allclose(rotate_folded(x, by), rotate(x, by), atol=1e-6)


def test_grouped_heads_equal_repeated_keys_and_values():
    q = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 5, 2, 8))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 3, 5)).at[..., 0].set(True)
    repeated = attend(q, jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2), mask)
    np.testing.assert_allclose(attend(q, k, v, mask), repeated, atol=1e-6)
    with tracing_for("tpu"):  # which has the mask in another form
        np.testing.assert_allclose(attend(q, k, v, mask), repeated, atol=1e-6)


def test_masked_keys_have_exactly_no_effect():
    q = jax.random.normal(jax.random.key(0), (1, 3, 2, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 1, 5, 1, 8))
    mask = jnp.ones((1, 3, 5), bool).at[..., 3].set(False)
    changed = attend(q, k.at[:, 3].add(100.0), v.at[:, 3].add(100.0), mask)
    np.testing.assert_array_equal(attend(q, k, v, mask), changed)


def test_softmax_is_float32_in_a_bfloat16_network():
    q = jax.random.normal(jax.random.key(0), (1, 3, 2, 8), jnp.bfloat16)
    jaxpr = str(jax.make_jaxpr(attend)(q, q, q))
    assert "exp" in jaxpr
    assert not any("bf16" in line and " exp " in line for line in jaxpr.splitlines())
    assert attend(q, q, q).dtype == jnp.bfloat16


@pytest.mark.parametrize("platform", ["cpu", "tpu"])
def test_derivatives_are_those_of_the_formula(platform):
    q = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 5, 2, 8))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 3, 5)).at[..., 0].set(True)

    def formula(q, k, v):
        logits = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(2, 3, 2, 2, 8) * 8**-0.5, k)
        weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, -1e30))
        return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)

    def ours(q, k, v):
        with tracing_for(platform):
            return attend(q, k, v, mask)

    cotangent = jax.random.normal(jax.random.key(3), q.shape)
    found, expected = (jax.vjp(f, q, k, v)[1](cotangent) for f in (ours, formula))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=2e-6), found, expected)
    direction = (cotangent, v, k)
    found, expected = (jax.jvp(f, (q, k, v), direction)[1] for f in (ours, formula))
    np.testing.assert_allclose(found, expected, atol=5e-6)


def test_the_backward_pass_multiplies_in_bfloat16():
    q = jnp.zeros((1, 3, 2, 8), jnp.bfloat16)
    gradient = jax.make_jaxpr(jax.grad(lambda *x: attend(*x).sum(), (0, 1, 2)))(q, q, q)
    equations = [e for e in gradient.eqns if e.primitive.name == "dot_general"]
    assert len(equations) >= 5, "weights by values, and two products backward for each of the two forward"
    assert {x.aval.dtype for e in equations for x in e.invars} == {jnp.dtype("bfloat16")}


def test_the_gated_product_has_the_derivatives_of_its_formula():
    gate, up, cotangent = jax.random.normal(jax.random.key(0), (3, 2, 5, 8))
    ours, theirs = (jax.vjp(f, gate, up)[1](cotangent) for f in (gated, lambda g, u: jax.nn.gelu(g) * u))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), ours, theirs)


def test_the_image_encoder_takes_matrices_that_are_cast_already():
    config = VisionConfig(width=8, depth=2, mlp_dim=16, num_heads=2, image_size=28)
    spec = Declare(MappingProxyType(siglip.spec(config)))
    w = jax.eval_shape(lambda: meta.unbox(spec.init(jax.random.key(0), method="declare")["params"]))
    images = jax.ShapeDtypeStruct((1, 28, 28, 3), jnp.float32)
    program = jax.make_jaxpr(lambda w, x: siglip.encode(config, w, x, jnp.dtype("bfloat16")))(w, images)
    (scan,) = (e for e in program.eqns if e.primitive.name == "scan")
    matrices = [x.aval for x in scan.invars if x.aval.ndim > 2 and x.aval.shape[0] == config.depth]
    assert len(matrices) >= 6
    assert {x.dtype for x in matrices} == {jnp.dtype("bfloat16")}


def test_weights_can_be_watched():
    q = jax.random.normal(jax.random.key(0), (2, 3, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 6, 2, 8))
    with watch_attention() as weights:
        attended = attend(q, k, v)
    attend(q, k, v)
    (seen,) = weights  # of the calls within alone
    by_query = seen.reshape(2, 2, 3, 2, 6)  # queries of the heads that share keys
    expected = jnp.einsum("BKTGS,BSKH->BTKGH", by_query, v).reshape(attended.shape)
    np.testing.assert_allclose(attended, expected, atol=1e-5)
    np.testing.assert_allclose(seen.sum(-1), 1, atol=1e-5)


def test_the_fused_form_has_the_values_and_gradients_of_the_plain_one():
    q = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    k, v = jax.random.normal(jax.random.key(1), (2, 2, 6, 2, 8))
    mask = jax.random.bernoulli(jax.random.key(2), 0.7, (2, 6, 6)).at[..., 0].set(True)
    weight = jax.random.normal(jax.random.key(3), q.shape)
    for allowed, scale in ((mask, None), (None, 1.0)):

        def loss(function, q, k, v, allowed=allowed, scale=scale):
            return jnp.sum(weight * function(q, k, v, allowed, scale))

        plain, of_one_kernel = (
            jax.value_and_grad(functools.partial(loss, f), (0, 1, 2))(q, k, v)
            for f in (attend, functools.partial(fused, implementation="xla"))
        )
        jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), of_one_kernel, plain)


@pytest.mark.parametrize(
    ("tokens", "heads", "kv_heads", "head_dim", "masked"), [(816, 8, 1, 256, True), (256, 16, 16, 72, False)]
)
def test_cudnn_takes_full_size_attention_forward_and_backward(tokens, heads, kv_heads, head_dim, masked, monkeypatch):
    """As far as JAX's own checks and the program for a GPU show it; cuDNN itself is not here."""
    cudnn = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91002)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: capability <= "9.0")
    q, k = (jax.ShapeDtypeStruct((2, tokens, n, head_dim), jnp.bfloat16) for n in (heads, kv_heads))
    mask = jax.ShapeDtypeStruct((2, tokens, tokens), jnp.bool_) if masked else None

    def loss(q, k, v, mask):
        return jnp.sum(fused(q, k, v, mask).astype(jnp.float32))

    program = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k, mask).lower(lowering_platforms=("cuda",)).as_text()
    name = "__cudnn$fmhaScaleBiasSoftmax" if masked else "__cudnn$fmhaSoftmax"
    assert f"@{name}(" in program
    assert f"@{name}Backward(" in program
