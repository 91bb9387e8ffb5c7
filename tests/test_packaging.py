"""Dependencies: what is declared is used, and what is optional is missed only where it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CLIENT = tomllib.loads((ROOT / "packages/pi0-client/pyproject.toml").read_text())["project"]
MODULES = {
    "google-crc32c": "google_crc32c",
    "huggingface-hub": "huggingface_hub",
    "orbax-checkpoint": "orbax",
    "pillow": "PIL",
    "rerun-sdk": "rerun",
    "tensorflow-datasets": "tensorflow_datasets",
    "vla-eval": "vla_eval",
}
"""Distribution to the module in it, where the names differ."""
TRANSITIVE = {"absl", "anyio", "array_record", "ml_dtypes", "msgpack", "scipy", "tensorstore"}
"""Modules that a declared dependency requires itself."""
PLUGINS = {"flatbuffers", "gcsfs", "packaging", "s3fs"}
"""Modules that jax.export, fsspec and Meta-World import."""
FOREIGN = {
    "dm_control",
    "gym_aloha",
    "gym_pusht",
    "gymnasium_robotics",
    "lerobot",
    "libero",
    "openpi",
    "pymunk",
    "robosuite",
}
FOREIGN |= {"tensorflow", "torch", "transformers"}
"""Frameworks and simulators of others, in environments of their own."""


def modules(requirements: list[str]) -> set[str]:
    """The modules of requirements; extras of this project, and of jax, are left out."""
    names = {re.split(r"[\[><=]", each)[0] for each in requirements if not each.startswith(("pi0_jax[", "jax["))}
    return {MODULES.get(name, name) for name in names}


def imported(folder: Path) -> set[str]:
    """Top-level names that the files of a folder import anywhere."""
    names = set()
    for path in folder.rglob("*.py"):
        text = path.read_text()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
        names |= set(re.findall(r'require_package\(\s*"(\w+)', text))
    return names - set(sys.stdlib_module_names)


def optional() -> set[str]:
    return modules([each for name, extra in EXTRAS.items() if name != "dev" for each in extra])


def test_every_import_is_declared_and_every_dependency_is_imported():
    names, mandatory = imported(ROOT / "pi0_jax"), modules(PROJECT["dependencies"])
    assert names - PLUGINS <= mandatory | optional() | TRANSITIVE | FOREIGN | {"pi0_jax", "pi0_client"}
    assert (mandatory | optional()) - PLUGINS <= names


def test_the_client_declares_what_it_imports_and_needs_no_jax():
    names = imported(ROOT / "packages/pi0-client/src/pi0_client")
    assert names == modules(CLIENT["dependencies"]) | {"pi0_client"}


def test_extras_in_messages_and_documents_exist():
    paths = [path for folder in ("pi0_jax", "docs", "launch") for path in (ROOT / folder).rglob("*.*")]
    for path in [*paths, ROOT / "README.md", ROOT / "Makefile"]:
        if path.suffix not in (".py", ".md", ".sh", ""):
            continue
        text = path.read_text()
        assert not re.search(r"pip install '?pi0_jax", text), f"{path}: pi0_jax is on no package index"
        names = re.findall(r"install [^\n]*'\.\[([a-z0-9,-]+)\]'", text)
        names += re.findall(r'require_package\(\s*"[^"]+",\s*"([^"]+)"', text)
        assert {name for each in names for name in each.split(",")} <= set(EXTRAS), path


def test_commands_explain_themselves_without_optional_packages(tmp_path):
    code = f"""
import sys
sys.modules.update(dict.fromkeys({sorted(optional())}))  # None: an import of it fails
from pi0_jax import cli
assert cli.main(["--help"]) == 0
for command in cli.COMMANDS:
    try:
        assert cli.main([command, "--help"]) == (command in ("convert", "inspect", "diff")), command
    except SystemExit as end:
        assert not end.code, command
assert cli.main(["serve", {str(tmp_path)!r}]) == 1
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pi0 serve needs prometheus_client, which is not installed: pip install -e '.[serve]'" in done.stderr
    assert "weights of other projects needs einops, which is not installed: pip install -e '.[convert]'" in done.stderr


def test_no_link_is_part_of_the_project():
    listed = subprocess.run(["git", "ls-files", "-s"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    assert [line for line in listed.stdout.splitlines() if line.startswith("120000")] == []
