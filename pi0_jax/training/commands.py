"""The command `pi0 reflow`; its dataclass is its command line."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro

from pi0_jax import checkpoint, config
from pi0_jax.config.replace import replace
from pi0_jax.errors import UserError
from pi0_jax.flow.path import Straight
from pi0_jax.training.loop import run

Positional = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Reflow:
    """Straightens a trained policy's flow, so that one or two steps do what ten did (arXiv 2209.03003).

    The student starts from the teacher's weights and learns straight lines from noise to the actions that the teacher
    makes of that noise, for the observations of the teacher's own demonstrations. `straightness` in the metrics, with
    held-out demonstrations, says how far it got: 0 is straight.

    Example:

        pi0 reflow runs/tabletop runs/straight --num-steps 600
    """

    teacher: Positional
    """Run, or checkpoint, whose flow to straighten."""
    run_dir: Positional
    """Folder of the student's run."""
    num_steps: int = 600
    """Updates."""
    teacher_steps: int = 20
    """Euler steps in which the teacher makes actions."""
    peak_lr: float | None = None
    """Peak learning rate; None: a quarter of the teacher's."""
    seed: int = 0
    resume: bool = False
    """Continue the run in `run_dir`."""
    overwrite: bool = False
    """Delete the run in `run_dir` and start anew."""


def reflow(args: Reflow) -> None:
    """Runs `pi0 reflow`.

    Raises:
        UserError: the teacher keeps no training configuration, or its network predicts no velocity of a straight path;
            and all that `training.loop.run` raises.
    """
    source = checkpoint.resolve(args.teacher)
    assets = checkpoint.load_assets(source)
    if assets.train is None:
        raise UserError(
            f"{source} does not say how it was trained, so there are no demonstrations to straighten it on."
        )
    teacher, learned = assets.train, assets.policy.objective
    velocity = isinstance(learned, config.Gaussian) and (learned.predicts, learned.path) == ("velocity", Straight())
    if not velocity and not isinstance(learned, config.Reflow):
        raise UserError(f"reflow straightens a flow that predicts velocities; {source} has learned {learned}.")
    kept = {name: getattr(learned, name) for name in ("draws", "dropout", "mask_padded_steps", "mask_padded_dims")}
    objective = config.Reflow(teacher=str(source), teacher_steps=args.teacher_steps, **kept)
    rate = args.peak_lr or teacher.optim.peak_lr / 4
    changes = {
        "policy": dataclasses.replace(assets.policy, objective=objective),
        "optim.peak_lr": rate,
        "optim.end_lr": rate / 100,
        "optim.warmup_steps": min(teacher.optim.warmup_steps, args.num_steps // 10),
        "optim.decay_steps": None,
        "run_dir": str(args.run_dir),
        "init_from": str(source),
        "init_parts": (),
    }
    changes |= {name: getattr(args, name) for name in ("resume", "overwrite", "seed", "num_steps")}
    run(replace(teacher, changes))
