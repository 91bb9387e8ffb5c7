import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.flow.shortcut import LEVELS, MAX_STEPS, bootstrap_target, sample_spans, sampling_span


def test_spans_are_halvings_of_1_and_a_whole_number_of_them_is_left():
    time, span = (np.asarray(x) for x in jax.jit(lambda key: sample_spans(key, (5000,)))(jax.random.key(0)))
    assert set(span) == {2.0**-k for k in range(LEVELS)}
    assert (time >= span).all()
    assert (time <= 1).all()
    np.testing.assert_array_equal(time / span, np.round(time / span))
    for level in range(LEVELS):
        starts = np.unique(time[span == 2.0**-level])
        assert starts.max() == 1.0
        assert len(starts) > 0.9 * 2**level


@pytest.mark.parametrize("span", [1.0, 0.5, 2.0**-5])
def test_two_exact_half_steps_are_the_exact_average_of_the_whole_span(span):
    # dx/dt = x: x(t − d) = x(t) exp(−d), so the average velocity over d is x (1 − exp(−d)) / d.
    def average(x, time, span):
        return x * ((1 - jnp.exp(-span)) / span)[..., None, None]

    x, spans = jax.random.normal(jax.random.key(0), (4, 2, 3)), jnp.full(4, span)
    np.testing.assert_allclose(
        bootstrap_target(average, x, jnp.ones(4), spans), average(x, jnp.ones(4), spans), rtol=1e-5
    )


def test_the_target_asks_at_the_start_and_half_way():
    # Half of the smallest span counts as 0, which means the velocity itself.
    asked = []

    def average(x, time, span):
        asked.append((time.tolist(), span.tolist()))
        return jnp.zeros_like(x)

    spans = jnp.array([1.0, 0.25, 1 / MAX_STEPS])
    bootstrap_target(average, jnp.zeros((3, 1, 1)), jnp.array([1.0, 0.5, 0.25]), spans)
    halves = [0.5, 0.125, 0.0]
    assert asked == [([1.0, 0.5, 0.25], halves), ([0.5, 0.375, 0.25 - 0.5 / MAX_STEPS], halves)]


def test_a_target_of_two_steps_has_no_gradient():
    def value(scale):
        return jnp.sum(bootstrap_target(lambda x, t, d: scale * x, jnp.ones((2, 1, 1)), jnp.ones(2), jnp.ones(2)))

    assert jax.grad(value)(0.3) == 0


def test_step_counts_whose_span_was_not_trained_mean_the_velocity():
    assert [sampling_span(n) for n in (1, 2, 8, 64)] == [1, 0.5, 0.125, 1 / 64]
    assert [sampling_span(n) for n in (3, 10, 65, 128)] == [0, 0, 0, 0]
