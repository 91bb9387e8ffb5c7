"""Products of few tokens on TPUs: more rows, the same numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.model import layers, target


@pytest.mark.parametrize("batch", [1, 3, 9])
def test_products_of_few_tokens_have_enough_rows_on_tpus(batch):
    x = jax.random.normal(jax.random.key(0), (batch, 1, 16))
    w = {"o": jax.random.normal(jax.random.key(1), (4, 4, 24))}

    def product(x):
        return layers.dot("attn/o", x.reshape(batch, 1, 4, 4), w)

    plain = product(x)
    with target.tracing_for("tpu"):
        program, found = str(jax.make_jaxpr(product)(x)), product(x)
    np.testing.assert_allclose(found, plain, rtol=1e-6, atol=1e-6)
    rows = layers.TPU_ROWS if batch < layers.TPU_ROWS else batch
    assert (f"f32[1,{rows},24]" in program) == (batch < layers.TPU_ROWS)
    assert jnp.shape(found) == (batch, 1, 24)
