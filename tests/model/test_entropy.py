"""Cross-entropy in parts, against the plain one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from pi0_jax.model.entropy import PARTS, cross_entropy, logits


def test_value_and_gradients_are_those_of_all_logits_at_once():
    rng = np.random.default_rng(0)
    b, c, d, v = 3, PARTS + 3, 4, 11
    hidden, embedding = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((b, c, d), (v, d)))
    tokens = jnp.asarray(rng.integers(0, v, (b, c)), jnp.int32)
    mask = jnp.asarray((rng.random((b, c)) < 0.7) & (np.arange(c) < c - 4))  # the last parts have no token
    weights = jnp.asarray(rng.normal(size=(b, c)), jnp.float32)

    def plain(hidden, embedding):
        found = optax.softmax_cross_entropy_with_integer_labels(logits(hidden, embedding), tokens)
        return jnp.sum(jnp.where(mask, weights * found, 0.0))

    def parts(hidden, embedding):
        found = cross_entropy(hidden, embedding, tokens, mask)
        assert found.shape == (b, c)
        return jnp.sum(weights * found)

    both = [jax.jit(jax.value_and_grad(f, (0, 1)))(hidden, embedding) for f in (plain, parts)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *both)


def test_parts_without_a_token_to_learn_are_not_computed():
    hidden, embedding = jnp.full((1, PARTS, 2), jnp.nan), jnp.ones((3, 2))
    mask = jnp.zeros((1, PARTS), bool)
    gradient = jax.grad(lambda h: jnp.sum(cross_entropy(h, embedding, jnp.zeros((1, PARTS), jnp.int32), mask)))
    np.testing.assert_array_equal(gradient(hidden), 0)
