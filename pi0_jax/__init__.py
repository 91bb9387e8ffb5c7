"""π0 and π0.5 vision-language-action policies in JAX."""

__version__ = "0.1.0"
