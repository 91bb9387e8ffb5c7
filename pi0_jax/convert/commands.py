"""`pi0 convert`, `pi0 inspect` and `pi0 diff`. Fields of these classes are their flags."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import TYPE_CHECKING, Annotated

import tyro

from pi0_jax.config import ExpertConfig, ModelConfig
from pi0_jax.convert.change import Dtype
from pi0_jax.convert.describe import describe, differences, text
from pi0_jax.convert.formats import Hints, Overrides, formats, open_checkpoint, writable
from pi0_jax.convert.run import convert as run
from pi0_jax.convert.run import disagreement
from pi0_jax.convert.verify.agree import OURS
from pi0_jax.errors import UserError

if TYPE_CHECKING:
    To = Framework = str
else:
    To = tyro.extras.literal_type_from_choices(writable())
    Framework = tyro.extras.literal_type_from_choices((OURS, *(f.name for f in formats().values() if f.runner)))

Offline = Annotated[bool, tyro.conf.arg(help="Open no connection: gs://, s3:// and hf:// have to be in the cache.")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts a checkpoint to another format and compares the result with the source, bit for bit.

    Examples: openpi's to ours, ready to serve; to a policy that LeRobot loads; the newest checkpoint of a run, for
    openpi; PaliGemma with a fresh action expert; the same policy with room for another robot:

        pi0 convert pi05_droid ours --horizon 15 --robot droid_velocity --tokenizer paligemma_tokenizer.model

        pi0 convert pi05_base pi05_lerobot --to lerobot --horizon 50

        pi0 convert runs/mine mine_openpi --to openpi

        pi0 convert pt_224.npz paligemma_pi0

        pi0 convert runs/mine wide --action-dim 64

    Nothing appears under TARGET before it is whole and checked. conversion.json in it says what was converted and how
    it was checked. `pi0 inspect SOURCE` shows what a checkpoint is; docs/checkpoints.md has formats and differences.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """Folder of any format, a run, a .safetensors, big_vision's .npz; or a gs://, s3://, hf:// URL."""
    target: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="TARGET")]
    """Folder to write."""
    to: To = "pi0"
    """Format to write; pi0 is ours."""
    overrides: Annotated[Overrides, tyro.conf.arg(name="")] = Overrides()
    dtype: Dtype | None = None
    """Round or widen all tensors; otherwise each keeps its dtype."""
    merge_lora: bool = False
    """Add LoRA adapters to their weights, for formats and programs without adapters."""
    action_width: int = 1024
    """Width of a fresh action expert (big_vision, --variant)."""
    action_mlp: int = 4096
    """Width of its feed-forward."""
    verify: bool = True
    """Read the result back and compare every tensor; and the source with what is on record about it."""
    edited: bool = False
    """The source was changed on purpose since it was written: do not compare it with the hashes in it."""
    verify_with: Framework | None = None
    """Also run source and result on the same input and compare actions: in ours, or in that framework itself."""
    tolerance: float = 1e-4
    """Largest difference of actions. Beyond it the first layer that differs is named, and the exit code is 1."""
    overwrite: bool = False
    """Replace the checkpoint at TARGET."""
    license: str | None = None
    """Licence of the weights for the model card (lerobot), as the hub names it, such as apache-2.0 or gemma; by default
    the one that is on record beside them or beside the weights that their training began with."""
    offline: Offline = False


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Says what a checkpoint is: family, sizes, parameters by component, dtypes, statistics, adapters.

    Examples:

        pi0 inspect pi05_base

        pi0 inspect gs://openpi-assets/checkpoints/pi05_base --json

    Numbers are not read, so it takes as long for a large one as for a small one.
    """

    path: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PATH")]
    """Checkpoint of any format, or a URL of one."""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = Hints()
    json: bool = False
    """Print a JSON object."""
    offline: Offline = False


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compares two checkpoints of any formats: policy, statistics, tokenizer, and each parameter's largest difference.

    Example:

        pi0 diff runs/a runs/b

    The exit code is 1 where they differ. What one of them does not store, such as the horizon in openpi's, is no
    difference.
    """

    first: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FIRST")]
    """Checkpoint of any format, or a URL of one."""
    second: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SECOND")]
    """Another one."""
    hints: Annotated[Hints, tyro.conf.arg(name="")] = Hints()
    offline: Offline = False


class Differ(UserError):
    """Two checkpoints differ; the message says where."""


def convert(arguments: Convert) -> None:
    """Runs `pi0 convert`."""
    options = dict(vars(arguments))
    width, mlp_dim = options.pop("action_width"), options.pop("action_mlp")
    record = run(**options, model=ModelConfig(action=ExpertConfig(width, mlp_dim)))
    checked = "compared bit for bit" if record["verified"] else "not compared"
    what = f"{record['parameters']:,} parameters as {record['format']} ({', '.join(record['dtypes'])})"
    print(f"{arguments.target}: {what}, {checked}, {record['seconds']} s")
    if (actions := record["actions"]) is not None:
        if not actions["agree"]:
            raise Differ(f"{arguments.target} is written, but {disagreement(actions)}.")
        runner = formats()[actions["framework"]].runner if actions["framework"] != OURS else None
        where = f"{runner.title} and ours" if runner else "our network"
        print(f"{actions['steps']}-step actions in {where} differ by at most {actions['largest_difference']:.3g}")


def inspect(arguments: Inspect) -> None:
    """Runs `pi0 inspect`."""
    content = describe(open_checkpoint(arguments.path, _hinted(arguments.hints), arguments.offline))
    print(json.dumps(content, indent=2) if arguments.json else text(content))


def diff(arguments: Diff) -> None:
    """Runs `pi0 diff`."""
    overrides = _hinted(arguments.hints)
    a, b = (open_checkpoint(path, overrides, arguments.offline) for path in (arguments.first, arguments.second))
    lines = differences(a, b)
    if lines:
        print("\n".join(lines))
        raise Differ(f"{arguments.first} and {arguments.second} differ in {len(lines)} places.")
    print("the same")


def _hinted(hints: Hints) -> Overrides:
    """Looking needs no horizon and no scale of adapters; what is not stored is shown as 0 and nan."""
    return Overrides(horizon=0, lora_scale=math.nan, **vars(hints))
