"""The Python of the documentation runs, and its command lines are flags that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import jax
import pytest
import tyro

from pi0_jax import pi0
from pi0_jax.config import TrainConfig
from pi0_jax.experiment import load_config
from pi0_jax.training import loop

ROOT = Path(__file__).parents[1]
FLOW = (ROOT / "docs" / "flow.md").read_text()
COMMANDS = [line.strip() for line in re.findall(r"^    (pi0 train (?:.*\\\n)*.*)$", FLOW, re.MULTILINE)]


def test_the_blocks_of_the_page_on_flow_run_one_after_another():
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", FLOW, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 8
    for block in blocks:
        # Blank lines put the block where it stands, so that an error names the page's line.
        code = "\n" * FLOW[: block.start(1)].count("\n") + block.group(1)
        exec(compile(code, "docs/flow.md", "exec"), namespace)
    assert all(bool(jax.numpy.isfinite(namespace[name]).all()) for name in ("chunk", "error", "value", "ddpm", "bend"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_the_page_on_flow_make_configs_that_go_together(command):
    _, _, path, *flags = shlex.split(command.replace("\\\n", " "))
    config = tyro.cli(TrainConfig, default=load_config(ROOT / path, TrainConfig), args=flags)
    pi0.check_policy(config.policy)
    loop._check_objective(config)
