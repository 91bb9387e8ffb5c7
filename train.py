"""Trains a policy: python train.py configs/tabletop.py --help."""

import sys

from pi0_jax.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
