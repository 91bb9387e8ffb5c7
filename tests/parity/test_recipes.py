"""Prompts and what is to be written, against LeRobot's recipes on the same language columns.

Of these recipes our data has the high level (the instruction, and the subtask is written), the low level (the subtask
is the prompt), and both in one sequence (subtask_joint). Memory, questions about frames and speech have no counterpart.
"""

import json

import numpy as np
import pytest

from pi0_jax.data.lerobot.language import _active, make_prompts
from pi0_jax.data.source import text_of
from tests.conftest import fixtures_root

FILES = sorted(fixtures_root().glob("lerobot_recipes*/cases.json")) or [None]
WAYS = {None: "predict", "high_level_subtask": "predict", "low_level_execution": "subtask"}
"""Component of a recipe (subtask_joint is one whole) to `DatasetConfig.prompt_from`."""


@pytest.mark.parametrize("component", WAYS)
@pytest.mark.parametrize("path", FILES, ids=lambda path: path and path.parent.name)
def test_the_prompt_and_what_is_to_be_written_are_the_recipes_messages(path, component):
    if path is None:
        pytest.skip("no folder of recipes among the fixtures")
    content, seen = json.loads(path.read_text()), set()
    for case in content["cases"]:
        # Without a task LeRobot takes one of the rephrasings; our datasets have a task in every frame.
        if case["weighted_component"] != component or case["task"] is None:
            continue
        rows = content["persistent"] if case["persistent"] == "full" else []
        active = _active([rows], [np.array([case["t"]])])
        (text,), _ = make_prompts([case["task"]], np.zeros(1, int), active, WAYS[component])
        if case["rendered"] is None:  # LeRobot leaves the frame out, and we have the instruction alone
            assert [text, text_of(text)] == [case["task"], ""]
            continue
        messages = [message["content"] for message in case["rendered"]["messages"]]
        if isinstance(messages[0], list):  # a question about this frame came first
            continue
        seen.add(case["recipe"])
        assert [text, *filter(None, [text_of(text)])] == messages
        assert case["rendered"]["target_message_indices"] == [1] * bool(text_of(text))
    assert seen
