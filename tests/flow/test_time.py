import jax
import numpy as np
import pytest
from scipy import stats

from pi0_jax.flow.time import sample_time

EXPECTED = {
    "beta": stats.beta(1.5, 1, loc=0.001, scale=0.999),
    "uniform": stats.uniform(),
    "logit_normal": stats.rv_histogram(
        np.histogram(1 / (1 + np.exp(-stats.norm.ppf(np.linspace(1e-4, 1 - 1e-4, 10**5)))), 2000)
    ),
}


@pytest.mark.parametrize("distribution", EXPECTED)
def test_times_follow_their_distribution(distribution):
    times = np.asarray(sample_time(jax.random.key(0), (20_000,), distribution))
    assert times.min() >= 0
    assert times.max() <= 1
    assert stats.kstest(times, EXPECTED[distribution].cdf).pvalue > 1e-3


def test_an_unknown_distribution_is_refused():
    with pytest.raises(ValueError, match="choose beta, uniform or logit_normal"):
        sample_time(jax.random.key(0), (2,), "gaussian")
