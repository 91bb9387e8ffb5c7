"""`pi0 export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from pi0_jax.checkpoint import load_assets
from pi0_jax.inference import export as exporting
from pi0_jax.inference.policy import Policy
from pi0_jax.inference.sampler import with_steps
from pi0_jax.model.quantize import Bits


@dataclasses.dataclass(frozen=True)
class Export:
    """Writes a policy's compiled programs and weights, to run where this package is not: jax, numpy and safetensors do.

    A README in the folder says how. Needs the extra `export`.

    Example:

        pi0 export runs/tabletop exported --batch-sizes 1 8
    """

    run: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """Run folder, or the folder of one checkpoint in it."""
    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """New folder."""
    batch_sizes: tuple[int, ...] = (1,)
    """Numbers of observations to write a program for."""
    num_steps: int | None = None
    """Solver steps from noise to actions; the checkpoint's own number by default."""
    bits: Bits | None = None
    """Round the weights to eight bits; what that changes is logged."""
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = exporting.PLATFORMS
    """Kinds of devices that the programs are for."""


def export(args: Export) -> None:
    """Runs `pi0 export`; errors as of `Policy.load` and `export.export`."""
    exporting.check(args.folder)
    trained = load_assets(args.run).policy
    sampler = with_steps(trained.sampler, args.num_steps)
    # The programs are for other machines, whatever this one has.
    policy = Policy.load(args.run, bits=args.bits, sampler=sampler, dtype=trained.model.dtype)
    folder = exporting.export(policy, args.folder, args.batch_sizes, args.platforms)
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 1e6:10.1f} MB  {path}")
    print(f"how to run it: {folder / 'README.md'}")
