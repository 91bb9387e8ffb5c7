"""The Python of the documentation runs, and its command lines are flags that exist."""

from __future__ import annotations

import re
import shlex
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest

from pi0_client.client import Client
from pi0_jax import pi0
from pi0_jax.config import TrainConfig
from pi0_jax.config_file import load_config, parse
from pi0_jax.data.robots import get_robot
from pi0_jax.inference.policy import Policy
from pi0_jax.serving.robot_policy import RobotPolicy
from pi0_jax.training.resolve import resolve
from tests.objective.cases import weights
from tests.serving.fake import serving

ROOT = Path(__file__).parents[1]
FLOW = (ROOT / "docs" / "flow.md").read_text()
SERVING = (ROOT / "docs" / "serving.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", SERVING, re.MULTILINE | re.DOTALL)
COMMANDS = [line.strip() for line in re.findall(r"^    (pi0 train (?:.*\\\n)*.*)$", f"{FLOW}\n{SERVING}", re.MULTILINE)]


def test_the_blocks_of_the_page_on_flow_run_one_after_another(monkeypatch):
    made = []

    def init_params(objective, key):
        """The page's six networks start at random; of all but the first, NumPy draws: it takes long to compile."""
        made.append(objective)
        return weights(objective) if len(made) > 1 else pi0.init_params(objective, key)

    monkeypatch.setattr("pi0_jax.init_params", init_params)
    namespace: dict = {}
    blocks = list(re.finditer(r"^```python\n(.*?)^```", FLOW, re.MULTILINE | re.DOTALL))
    assert len(blocks) > 8
    for block in blocks:
        # Blank lines put the block where it stands, so that an error names the page's line.
        code = "\n" * FLOW[: block.start(1)].count("\n") + block.group(1)
        exec(compile(code, "docs/flow.md", "exec"), namespace)
    assert len(made) == 6
    assert all(bool(jax.numpy.isfinite(namespace[name]).all()) for name in ("chunk", "error", "value", "ddpm", "bend"))


def test_the_blocks_of_the_page_on_action_tokens_run():
    pytest.importorskip("tokenizers")
    namespace: dict = {}
    text = (ROOT / "docs" / "action_tokens.md").read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        exec(compile(block, "docs/action_tokens.md", "exec"), namespace)
    assert namespace["valid"].all()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_flags_of_the_pages_on_flow_and_serving_make_configs_that_go_together(command):
    _, _, path, *flags = shlex.split(command.replace("\\\n", " "))
    resolve(parse(load_config(ROOT / path, TrainConfig), flags, prog="pi0 train", description=""))


def test_the_robot_loop_of_the_page_on_serving_sends_actions(checkpoint_folder, monkeypatch):
    load = Policy.load
    monkeypatch.setattr(Policy, "load", lambda path, **changes: load(checkpoint_folder, **changes))
    monkeypatch.setattr(time, "sleep", lambda seconds: wait_for_answers(namespace))
    sent = []
    robot = types.SimpleNamespace(observe=get_robot("tabletop").example, send=sent.append, done=lambda: len(sent) >= 3)
    namespace: dict = {"robot": robot}
    (robot_loop,) = (block for block in BLOCKS if "with Executor(" in block)
    exec(compile(robot_loop, "docs/serving.md", "exec"), namespace)
    stats = namespace["executor"].stats
    assert stats.steps >= 4
    assert stats.failures == 0
    assert np.isfinite(sent).all()


def test_the_quick_start_of_the_page_on_serving_moves_a_robot(checkpoint_folder, monkeypatch):
    sent = []
    robot = types.SimpleNamespace(
        observe=get_robot("tabletop").example,
        send=sent.append,
        still=get_robot("tabletop").still,
        done=lambda: len(sent) >= 8,
    )
    namespace: dict = {"robot": robot}
    acting, plain = BLOCKS[:2]
    with serving(RobotPolicy(Policy.load(checkpoint_folder), (1,), real_time=True)) as server:
        monkeypatch.setattr("pi0_client.client.Client", lambda uri: Client(server.uri))
        monkeypatch.setattr(time, "sleep", lambda seconds: wait_for_answers(namespace))
        exec(compile(acting, "docs/serving.md", "exec"), namespace)
        exec(compile(plain, "docs/serving.md", "exec"), namespace)
    assert namespace["executor"].stats.chunks >= 2
    assert namespace["executor"].stats.failures == 0
    assert len(sent) >= 12
    assert np.isfinite(sent).all()


def wait_for_answers(namespace: dict) -> None:
    """In place of the time between two control steps."""
    answer = namespace["executor"]._answer
    if answer is not None:
        answer.exception(timeout=60)
