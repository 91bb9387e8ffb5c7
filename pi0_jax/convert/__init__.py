"""Weights of other projects in and out. No torch; each foreign layout is one table of rules, read both ways."""

from pi0_jax.errors import require_package

for _package in ("einops", "zstandard"):
    require_package(_package, "convert", "reading weights of other projects")
