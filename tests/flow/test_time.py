import jax
import numpy as np
import pytest
from scipy import stats

from pi0_jax.flow.time import Beta, LogitNormal, Uniform

EXPECTED = {
    Beta(): stats.beta(1.5, 1, loc=0.001, scale=0.999),
    Beta(3.0): stats.beta(3.0, 1, loc=0.001, scale=0.999),
    Uniform(): stats.uniform(),
    LogitNormal(): stats.rv_histogram(
        np.histogram(1 / (1 + np.exp(-stats.norm.ppf(np.linspace(1e-4, 1 - 1e-4, 10**5)))), 2000)
    ),
}


@pytest.mark.parametrize("distribution", EXPECTED, ids=str)
def test_times_follow_their_distribution(distribution):
    times = np.asarray(distribution.sample(jax.random.key(0), (20_000,)))
    assert times.min() >= 0
    assert times.max() <= 1
    assert stats.kstest(times, EXPECTED[distribution].cdf).pvalue > 1e-3
