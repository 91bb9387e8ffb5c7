"""Runs a trained policy on an observation or in a simulator: python infer.py RUN --help."""

import sys

from pi0_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["infer", *sys.argv[1:]]))
