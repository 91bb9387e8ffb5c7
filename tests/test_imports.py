"""Which room may import which, and what importing the package costs."""

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "pi0_jax"

MAY_IMPORT = {
    "errors": set(),
    "flow": set(),
    "sampler": {"flow"},
    "config": {"flow", "sampler"},
    "config_file": {"config_json"},
    "batch": {"config"},
    "atomic": set(),
    "compat": set(),
    "compilation": {"compat", "data"},
    "model": {"config", "batch"},
    "data": {"atomic", "config", "batch"},
    "objective": {"config", "batch", "model", "flow", "sampler"},
    "pi0": {"config", "batch", "objective", "sampler"},
    "flops": {"batch", "config", "objective", "pi0", "sampler"},
    "config_json": set(),
    "checkpoint": {"compat", "config", "config_json"},
    "training": {
        "atomic",
        "batch",
        "checkpoint",
        "compat",
        "compilation",
        "config",
        "config_json",
        "data",
        "flops",
        "flow",
        "model",
        "objective",
        "pi0",
        "sampler",
    },
    "plan": {"batch", "compat", "config", "data", "flops", "inference", "model", "objective", "training"},
    "inference": {
        "atomic",
        "batch",
        "checkpoint",
        "config",
        "data",
        "flow",
        "model",
        "objective",
        "sampler",
    },
    "serving": {"checkpoint", "compilation", "config", "data", "inference"},
    "convert": {"atomic", "batch", "checkpoint", "compat", "config", "data", "model", "objective", "sampler"},
    "evaluate": {"checkpoint", "compilation", "config", "config_file", "data", "inference", "training"},
    "diagnose": {
        "atomic",
        "batch",
        "checkpoint",
        "compilation",
        "config",
        "data",
        "evaluate",
        "inference",
        "model",
        "objective",
        "training",
    },
    "compare": {
        "atomic",
        "config",
        "config_file",
        "data",
        "flow",
        "sampler",
        "training",
        "inference",
        "evaluate",
        "checkpoint",
    },
    "cli": {"checkpoint", "config", "config_file", "data"},
}
"""Room to the rooms it may import, beside `errors`. A room is a folder or a module at the top of the package."""


def imports() -> dict[str, set[str]]:
    """Room to the rooms it imports, at the top of files and inside functions; `errors` is for all, and left out."""
    found: dict[str, set[str]] = {}
    for path in ROOT.rglob("*.py"):
        room = path.relative_to(ROOT).parts[0].removesuffix(".py")
        names = found.setdefault(room, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pi0_jax":
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"relative import in {path}"
                names |= {node.module.split(".")[1]} if (node.module or "").startswith("pi0_jax.") else set()
            elif isinstance(node, ast.Import):
                names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pi0_jax.")}
    return {room: names - {room, "errors"} for room, names in found.items() if room != "__init__"}


def test_rooms_import_only_what_they_may():
    for room, names in imports().items():
        assert room in MAY_IMPORT, f"say what the new room {room} may import"
        assert names <= MAY_IMPORT[room], f"{room} imports {sorted(names - MAY_IMPORT[room])}"


def test_no_two_rooms_import_one_another():
    found = imports()
    pairs = [(a, b) for a, b in itertools.combinations(found, 2) if b in found[a] and a in found[b]]
    assert not pairs


@pytest.mark.parametrize(
    "module",
    ["pi0_jax", "pi0_jax.pi0", "pi0_jax.inference.policy", "pi0_jax.training.loop", "pi0_jax.convert.verify.agree"],
)
def test_no_other_framework_and_no_simulator_is_loaded(module):
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "tensorflow", "mujoco", "gymnasium", "wandb"} & set(loaded)


def test_importing_the_package_costs_little_beyond_jax():
    code = "import jax, time; t = time.process_time(); import pi0_jax; print(time.process_time() - t)"
    seconds = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for _ in range(3)
    ]
    assert min(seconds) < 0.5


def test_what_a_checkpoint_is_can_be_read_without_orbax():
    code = "import sys, pi0_jax.checkpoint as c; c.load_assets; print('orbax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
