"""`pi0 convert`, `pi0 inspect` and `pi0 diff`. Fields of these classes are their flags."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Annotated, Literal

import tyro

from pi0_jax.config import ExpertConfig, ModelConfig
from pi0_jax.convert.agree import Framework
from pi0_jax.convert.describe import describe, differences, text
from pi0_jax.convert.formats import Choices, open_checkpoint
from pi0_jax.convert.run import convert as run
from pi0_jax.convert.run import disagreement

Choice = Annotated[Choices, tyro.conf.arg(name="")]
DEFAULT = Choices()
Offline = Annotated[bool, tyro.conf.arg(help="Open no connection: gs://, s3:// and hf:// have to be in the cache.")]


@dataclasses.dataclass(frozen=True)
class Convert:
    """Converts a checkpoint to another format and compares the result with the source, bit for bit.

    pi0 convert pi0_base/ pi0_base_lerobot/ --to lerobot --horizon 50
    """

    source: tyro.conf.Positional[str]
    """Checkpoint of any format: a folder, a .safetensors, or an .npz of big_vision's; or a gs://, s3:// or hf:// URL
    of one."""
    target: tyro.conf.Positional[str]
    """Folder to write."""
    to: Literal["pi0", "openpi", "openpi-torch", "lerobot"] = "pi0"
    """Format to write; pi0 is ours."""
    choices: Choice = DEFAULT
    dtype: Literal["float32", "bfloat16"] | None = None
    """Round or widen all tensors; otherwise each keeps its dtype."""
    merge_lora: bool = False
    """Add LoRA adapters to their weights, for formats and programs without adapters."""
    action_width: int = 1024
    """Width of a fresh action expert (big_vision, --variant)."""
    action_mlp: int = 4096
    """Width of its feed-forward."""
    verify: bool = True
    """Read the result back and compare every tensor."""
    edited: bool = False
    """The source's weights were changed on purpose since the conversion that wrote them: do not hold them against the
    hashes in its conversion.json."""
    verify_with: Framework | None = None
    """Also run source and result on the same observation and noise and compare their actions: in our network, or the
    folders of LeRobot, or of openpi's PyTorch, in that framework itself, if it is installed."""
    tolerance: float = 1e-4
    """Largest difference of the actions; beyond it the first layer that differs is named, and the exit code is 1."""
    overwrite: bool = False
    """Replace the target if it is there."""
    offline: Offline = False


@dataclasses.dataclass(frozen=True)
class Inspect:
    """Says what a checkpoint is: family, sizes, parameters by part, dtypes, statistics, adapters.

    pi0 inspect pi0_base/
    """

    path: tyro.conf.Positional[str]
    """Checkpoint of any format."""
    choices: Choice = DEFAULT
    json: bool = False
    """Print a JSON object."""
    offline: Offline = False


@dataclasses.dataclass(frozen=True)
class Diff:
    """Compares two checkpoints of any formats, leaf by leaf. Exits with 1 where they differ.

    pi0 diff runs/a runs/b
    """

    first: tyro.conf.Positional[str]
    second: tyro.conf.Positional[str]
    choices: Choice = DEFAULT
    offline: Offline = False


class Differ(ValueError):
    """Two checkpoints differ; the message says where."""


def convert(arguments: Convert) -> None:
    """Runs `pi0 convert`."""
    record = run(
        arguments.source,
        arguments.target,
        arguments.to,
        choices=arguments.choices,
        dtype=arguments.dtype,
        merge_lora=arguments.merge_lora,
        model=ModelConfig(action=ExpertConfig(arguments.action_width, arguments.action_mlp)),
        verify=arguments.verify,
        edited=arguments.edited,
        verify_with=arguments.verify_with,
        tolerance=arguments.tolerance,
        overwrite=arguments.overwrite,
        offline=arguments.offline,
    )
    checked = "compared bit for bit" if record["verified"] else "not compared"
    what = f"{record['parameters']:,} parameters as {record['format']} ({', '.join(record['dtypes'])})"
    print(f"{arguments.target}: {what}, {checked}, {record['seconds']} s")
    if (actions := record["actions"]) is not None:
        if not actions["agree"]:
            raise Differ(f"{arguments.target} is written, but {disagreement(actions)}.")
        by = {"ours": "our network", "lerobot": "LeRobot and ours", "openpi-torch": "openpi's PyTorch and ours"}
        where, largest = by[actions["framework"]], actions["largest_difference"]
        print(f"{actions['steps']}-step actions in {where} differ by at most {largest:.3g}")


def inspect(arguments: Inspect) -> None:
    """Runs `pi0 inspect`."""
    content = describe(open_checkpoint(arguments.path, _any_horizon(arguments.choices), arguments.offline))
    print(json.dumps(content, indent=2) if arguments.json else text(content))


def diff(arguments: Diff) -> None:
    """Runs `pi0 diff`."""
    choices = _any_horizon(arguments.choices)
    a, b = (open_checkpoint(path, choices, arguments.offline) for path in (arguments.first, arguments.second))
    lines = differences(a, b)
    if lines:
        print("\n".join(lines))
        raise Differ(f"{arguments.first} and {arguments.second} differ in {len(lines)} places.")
    print("the same")


def _any_horizon(choices: Choices) -> Choices:
    """Looking needs no horizon and no scale of adapters; what is not stored is shown as 0 and nan."""
    return dataclasses.replace(
        choices,
        horizon=0 if choices.horizon is None else choices.horizon,
        lora_scale=math.nan if choices.lora_scale is None else choices.lora_scale,
    )
