"""Subtasks to be written, against LeRobot's recipe of π0.5 (subtask_joint) on the same language columns."""

import json

import numpy as np
import pytest

from pi0_jax.data.lerobot.language import _active, make_prompts
from pi0_jax.data.source import text_of
from tests.conftest import fixtures_root

FILES = sorted(fixtures_root().glob("lerobot_recipes*/cases.json")) or [None]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path and path.parent.name)
def test_the_task_and_what_is_to_be_written_are_the_recipes_messages(path, fixtures):
    if path is None:
        pytest.skip("no folder of recipes among the fixtures")
    content = json.loads(path.read_text())
    # Without a task LeRobot takes one of the rephrasings; our datasets have a task in every frame.
    cases = [case for case in content["cases"] if case["recipe"] == "subtask_joint" and case["task"] is not None]
    assert cases
    for case in cases:
        rows = content["persistent"] if case["persistent"] == "full" else []
        (text,), _ = make_prompts([case["task"]], np.zeros(1, int), _active([rows], [np.array([case["t"]])]), "predict")
        messages = [message["content"] for message in case["rendered"]["messages"]]
        assert [text, *filter(None, [text_of(text)])] == messages
        assert case["rendered"]["target_message_indices"] == [1] * bool(text_of(text))
