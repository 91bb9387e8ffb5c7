"""What `pi0 diagnose` does; its dataclass is its command line."""

from __future__ import annotations

import dataclasses
import html
import json
import logging
from pathlib import Path
from typing import Annotated

import jax
import tyro

from pi0_jax import checkpoint
from pi0_jax.atomic import written
from pi0_jax.compilation import keep_programs
from pi0_jax.config import DataConfig
from pi0_jax.data.mixture import OpenDataset, open_datasets
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.diagnose import run
from pi0_jax.diagnose.findings import findings
from pi0_jax.diagnose.page import ICONS, diagnosis_page
from pi0_jax.errors import UserError, require_package
from pi0_jax.evaluate.chunk_errors import alike
from pi0_jax.inference.policy import Policy
from pi0_jax.training.inputs import open_held_out

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Diagnose:
    """Looks at what a policy learned, without a robot or a simulator: one HTML page of held-out episodes.

    The policy's chunks beside the demonstrations, the worst moments first; what it uses (error with another
    instruction, without each camera, with another state); and sentences to act on, which are printed, too.

    Examples:

        pi0 diagnose runs/mine

        pi0 diagnose runs/mine --data data/other_day --frames 2000 --batch-size 32
    """

    run: Annotated[Path, tyro.conf.Positional]
    """Run folder, or the folder of one checkpoint in it."""
    data: Path | None = None
    """Dataset to look at in place of the run's held-out episodes, all of it."""
    frames: int = 512
    """Largest number of chunks that are asked for, which are computed four to ten times."""
    train_frames: int = 1024
    """Training frames to look for the nearest among; 0: none."""
    moments: int = 6
    """Worst moments that are shown."""
    batch_size: int = 16
    """Chunks computed at once."""
    seed: int = 0
    """Seed of the noise, and of what is swapped."""
    output: Path | None = None
    """HTML file to write; <run>/diagnose.html by default. The figures are beside it, as .json."""


def diagnose(args: Diagnose) -> None:
    """Runs `pi0 diagnose`.

    Raises:
        UserError, FileNotFoundError, OSError: what the user gave cannot be used; the message says how to go on.
    """
    require_package("matplotlib", "report", "the diagnosis")
    for name in ("frames", "batch_size", "moments"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it has to be at least 1.")
    assets = checkpoint.load_assets(args.run)
    path = args.output or checkpoint.run_folder(args.run) / "diagnose.html"
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write to. Choose another file with --output.")
    held_out, training = open_data(assets, args)
    keep_programs("default")
    policy = Policy.load(args.run)
    figures, evidence = run.diagnose(
        policy,
        held_out,
        training,
        frames=args.frames,
        train_frames=args.train_frames,
        moments=args.moments,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    found = findings(figures)
    content = {"findings": [dataclasses.asdict(x) for x in found], **dataclasses.asdict(figures)}
    data = ", ".join(str(each.source.root) for each in held_out)
    footer = (
        f"{html.escape(str(checkpoint.resolve(args.run)))} on {html.escape(data)}; seed {args.seed}; "
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}. Made by pi0_jax. The figures are in "
        f"<code>{html.escape(path.with_suffix('.json').name)}</code>."
    )
    title = f"{checkpoint.run_folder(args.run).name}: what it learned"
    for file, text in (
        (path, diagnosis_page(title, figures, evidence, found, policy.robot.actions, footer)),
        (path.with_suffix(".json"), json.dumps(content, indent=2) + "\n"),
    ):
        with written(file) as partial:
            partial.write_text(text, encoding="utf-8")
    for x in found:
        print(f"{ICONS[x.kind]} {x.sentence} {x.figure}")
    print(f"\n{path}")


def open_data(assets: checkpoint.Assets, args: Diagnose) -> tuple[list[OpenDataset], list[OpenDataset]]:
    """Held-out and training datasets of the policy's robot; no training datasets where they are not here.

    Raises:
        UserError: there are no held-out episodes.
        FileNotFoundError: they are not here.
    """
    policy, robot = assets.policy, kept_robot(assets.policy.robot, assets.robot)
    data = DataConfig() if assets.train is None else assets.train.data
    training: list[OpenDataset] | None = None
    try:
        training = open_datasets(data, policy) if assets.train is not None else []
        training = [each for each in training if each.source.has_actions]
    except FileNotFoundError as error:
        _log.warning("without the training data: %s", error)
    chosen = dataclasses.replace(data, validation_path=str(args.data)) if args.data is not None else data
    try:
        held_out = open_held_out(chosen, policy, training or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error} To look at other demonstrations: --data FOLDER.") from error
    kept = [each for each in held_out if alike(each.robot, robot) and len(each.held_out)]
    if not kept:
        why = (
            f"held out {', '.join(each.robot.name for each in held_out)} alone" if held_out else "held out no episodes"
        )
        raise UserError(
            f"{args.run} {why}, and the policy is of {robot.name}: name demonstrations that it was not trained on, "
            "--data FOLDER, or train with --data.validation-share 0.05."
        )
    usable = [each for each in training or [] if alike(each.robot, robot) and len(each.training)]
    return kept, usable if args.train_frames > 0 else []
