"""The model card of a policy on the Hugging Face hub: what it is, from which data, how often it succeeds, its licence.

Everything in it is read from the checkpoint and the run around it. What is not known is said to be unknown.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pi0_jax import checkpoint
from pi0_jax.config import TrainConfig
from pi0_jax.convert.files import RECORD, read_json
from pi0_jax.convert.formats import OpenCheckpoint
from pi0_jax.convert.relative import relative_actions, robot_of

CARD = "README.md"
_REPORT = "report.json"
_TITLES = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}
_LOAD = """\
In LeRobot 0.6:

```python
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.{variant}.modeling_{variant} import {kind}
{imports}
policy = {load}
preprocess, postprocess = make_pre_post_processors(policy.config, "OWNER/{name}")
```

"""
_LOAD_HERE = """\
In pi0_jax:

```
pi0 convert hf://OWNER/{name} {name}{base}
pi0 serve {name}
```"""


def find_license(opened: OpenCheckpoint) -> str | None:
    """The licence that goes with the weights; None: nothing says.

    It is read from the folder's model card, the record of its conversion, or those of the weights that its training
    started from.
    """
    return _license(opened.path, opened.train)


def _license(folder: Path, train: TrainConfig | None) -> str | None:
    if (card := folder / CARD).is_file():
        front = re.match(r"---\n(.*?)\n---\n", card.read_text(errors="replace"), re.DOTALL)
        stated = re.search(r"^license:\s*(\S+)", front.group(1), re.MULTILINE) if front else None
        if stated:
            return stated.group(1).strip("\"'")
    if (record := folder / RECORD).is_file() and (stated := read_json(record).get("license")):
        return stated
    if train is None or train.init_from is None or not Path(train.init_from).expanduser().exists():
        return None
    before = checkpoint.resolve(train.init_from)
    return _license(before, checkpoint.load_assets(before).train)


def model_card(opened: OpenCheckpoint, name: str, license: str | None, *, adapters: bool = False) -> str:
    """The card of a policy in LeRobot's format, Markdown below the hub's YAML.

    Args:
        opened: the policy; of a run, the success that `pi0 report` measured of this step is in the card.
        name: of the policy, its folder's.
        license: as the hub names it, such as "apache-2.0"; None: it is not known.
        adapters: whether LoRA adapters are in the folder, and not their base weights.
    """
    policy, data = opened.policy, _datasets(opened.train)
    variant = policy.model.variant
    front = {
        **({} if license is None else {"license": license}),
        "library_name": "lerobot",
        "pipeline_tag": "robotics",
        "tags": ["lerobot", "robotics", variant, *(["peft", "lora"] if adapters else []), "pi0_jax"],
        **(
            {"datasets": on_hub} if (on_hub := [n.removeprefix("hf://") for n in data if n.startswith("hf://")]) else {}
        ),
    }
    what = "LoRA adapters of a" if adapters else "A"
    title = f"{what} {_TITLES[variant]} policy in LeRobot's format, written by `pi0 convert` of pi0_jax."
    unknown = (
        "Not known. Nothing beside the weights says it; the licence of the weights that training began with holds."
    )
    parts = [
        "---\n" + "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items()) + "\n---",
        f"# {name}\n\n{title}",
        "## Robot\n\n" + _table(_robot(opened)),
        *_warning(opened),
        "## Training\n\n"
        + (_table(_training(opened, data)) or "Converted weights: how they were trained is not known."),
        "## Success\n\n" + _success(opened),
        "## Loading\n\n" + _loading(variant, name, adapters),
        "## Licence\n\n" + (unknown if license is None else f"{license}."),
    ]
    return "\n\n".join(parts) + "\n"


def _table(rows: dict[str, Any]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]) if rows else ""


def _robot(opened: OpenCheckpoint) -> dict[str, Any]:
    policy, model = opened.policy, opened.policy.model
    stats = (opened.norm_stats or {}).get("norm_stats", {})
    widths = {
        f"{what} dimensions": len(stats[key]["mean"])
        for what, key in (("state", "state"), ("action", "actions"))
        if key in stats
    }
    robot = robot_of(opened)
    return {
        "robot": Path(policy.robot).stem if robot is None else robot.name,
        "cameras": f"{', '.join(model.cameras)}, resized to {model.vision.image_size} px",
        **widths,
        "actions per chunk": model.action_horizon,
        "executed of each chunk": policy.execute_steps,
    }


def _warning(opened: OpenCheckpoint) -> list[str]:
    relative = relative_actions(opened)
    if not relative.count:
        return []
    what = "action dimension is a difference" if relative.count == 1 else "action dimensions are differences"
    said = f"{relative.count} {what} to the state when the chunk begins."
    if relative.names is None:
        return [f"**{said} LeRobot does not add it back: {relative.reason}.**"]
    return [
        f"{said} LeRobot's `absolute_actions_processor` adds it back: `postprocess` takes a whole chunk of "
        "`predict_action_chunk`, with the state that `preprocess` saw last. A loop that calls `preprocess` before each "
        "`select_action` adds a later state to what is left of a chunk; LeRobot's own rollout does not since July 2026."
    ]


def _datasets(train: TrainConfig | None) -> list[str]:
    """Datasets of the hub as hf://owner/name, and the names of folders, not where they were."""
    if train is None:
        return []
    paths = [dataset.path for dataset in train.data.datasets] or [train.data.path or ""]
    return [path if path.startswith("hf://") else Path(path).name for path in paths if path]


def _training(opened: OpenCheckpoint, data: list[str]) -> dict[str, Any]:
    if (train := opened.train) is None:
        return {}
    steps = {} if opened.step is None else {"steps": f"{opened.step:,} of {train.num_steps:,}"}
    return {
        "data": ", ".join(data) or "not recorded",
        **steps,
        "batch size": train.batch_size,
        "trained parameters": train.tune.recipe,
        "peak learning rate": train.optim.peak_lr,
        "started from": "random weights" if train.init_from is None else Path(train.init_from).name,
    }


def _success(opened: OpenCheckpoint) -> str:
    """What `pi0 report` measured in closed loop, where it measured these weights."""
    path = checkpoint.run_folder(opened.path) / _REPORT
    if not path.is_file():
        return "Not measured."
    report = read_json(path)
    if report.get("step", "unknown") != opened.step:
        return f"Not measured for these weights, but for those of step {report.get('step', 'unknown')}."
    rows = ["| task | successes | episodes | rate | 95 % interval |", "|---|---|---|---|---|"]
    for task, r in report["success"].items():
        rows.append(
            f"| {task} | {r['successes']} | {r['episodes']} | {r['rate']:.1%} | {r['low']:.1%} to {r['high']:.1%} |"
        )
    where = f"In closed loop in the simulator `{report['simulator']}`, seed {report['seed']}, on {report['device']}."
    return "\n".join([where, "", *rows])


def _loading(variant: str, name: str, adapters: bool) -> str:
    kind = {"pi0": "PI0Policy", "pi05": "PI05Policy"}.get(variant)
    here = _LOAD_HERE.format(name=name, base=" --base BASE" if adapters else "")
    if kind is None:
        return here
    load, imports = f'{kind}.from_pretrained("OWNER/{name}")', ""
    if adapters:
        load = f'PeftModel.from_pretrained({kind}.from_pretrained("BASE"), "OWNER/{name}")'
        imports = "from peft import PeftModel\n"
    return _LOAD.format(variant=variant, kind=kind, name=name, load=load, imports=imports) + here
