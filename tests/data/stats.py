"""Statistics of one dataset, in this process."""

from pi0_jax.data.normalization import Stats
from pi0_jax.data.source import Source
from pi0_jax.data.tools.stats import finish, summarise_source


def compute_stats(source: Source, *rest) -> Stats:
    """Arguments as of `summarise_source`."""
    return finish(summarise_source(source, *rest))
