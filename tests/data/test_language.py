"""Subtasks of LeRobot datasets: language columns and `subtask_index` become prompts, frame by frame."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.mixture import open_dataset
from pi0_jax.data.source import text_of
from pi0_jax.data.tools.show import show
from pi0_jax.errors import UserError

FPS, LENGTHS, TASKS = 10, (6, 4, 5), ("fold the shirt.", "pour", "fold the shirt.")
EVENT = [("role", pa.string()), ("content", pa.string()), ("style", pa.string()), ("camera", pa.string())]
EVENT += [("tool_calls", None)]
PERSISTENT = [*EVENT[:3], ("timestamp", pa.float32()), *EVENT[3:]]
SUBTASKS = (
    [("take the sleeve", 0.0), ("fold it", 0.3)],
    [("tip the cup", 0.2)],
    [("fold it", 0.0), ("take the sleeve", 0.2), ("lay it down", 0.4)],
)
WANTED = (
    *["take the sleeve"] * 3,
    *["fold it"] * 3,
    *["pour"] * 2,  # before the first subtask
    *["tip the cup"] * 2,
    *["fold it"] * 2,
    *["take the sleeve"] * 2,
    "lay it down",
)


@pytest.fixture
def root(tmp_path):
    vectors = {name: {"dtype": "float32", "shape": (3,), "names": None} for name in ("observation.state", "action")}
    with LeRobotWriter(tmp_path / "data", FPS, "tabletop", vectors) as writer:
        for length, task in zip(LENGTHS, TASKS, strict=True):
            writer.add_episode({name: np.zeros((length, 3), np.float32) for name in vectors}, task)
    return tmp_path / "data"


def add_column(root, name, values, kind):
    """Adds a column to the only data file, as an annotation tool does."""
    (path,) = root.glob("data/*/*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.append_column(name, values), path)
    info = json.loads((root / "meta/info.json").read_text())
    info["features"][name] = {"dtype": kind, "shape": [1], "names": None}
    (root / "meta/info.json").write_text(json.dumps(info))


def rows_array(values, fields):
    """Lists of rows as LeRobot types them; `pa.array` makes no JSON."""
    plain = pa.array(values, pa.list_(pa.struct([*fields[:-1], ("tool_calls", pa.list_(pa.string()))])))
    if not hasattr(pa, "json_"):
        return plain
    rows = plain.values
    calls = rows.field("tool_calls")
    typed = pa.ListArray.from_arrays(calls.offsets, pa.ExtensionArray.from_storage(pa.json_(), calls.values))
    columns = [typed if name == "tool_calls" else rows.field(name) for name, _ in fields]
    return pa.ListArray.from_arrays(plain.offsets, pa.StructArray.from_arrays(columns, [name for name, _ in fields]))


def row(style, content, **more):
    return {"role": "assistant", "content": content, "style": style, "camera": None, "tool_calls": None, **more}


def annotate(root, subtasks=SUBTASKS):
    """Both language columns, with a plan for each episode, and an event in the second frame of the last."""
    persistent = []
    for length, own in zip(LENGTHS, subtasks, strict=True):
        rows = [row("subtask", content, timestamp=time) for content, time in reversed(own)]
        persistent += [[row("plan", "1. think", timestamp=0.0), *rows]] * length
    add_column(root, "language_persistent", rows_array(persistent, PERSISTENT), "language")
    events = [[] for _ in persistent]
    call = json.dumps({"type": "function", "function": {"name": "say", "arguments": {"text": "yes"}}})
    events[-4] = [row("interjection", "wait"), row(None, None, tool_calls=[call])]
    add_column(root, "language_events", rows_array(events, EVENT), "language")
    return root


def index_subtasks(root, indices, column="subtask"):
    add_column(root, "subtask_index", pa.array(indices, pa.int64()), "int64")
    texts = {"subtask_index": [1, 0], column: ["fold it", "take the sleeve"]}
    pq.write_table(pa.table(texts), root / "meta/subtasks.parquet")
    return root


def prompts(dataset):
    return tuple(dataset.task(i) for i in range(dataset.num_frames))


def test_language_columns_do_not_disturb_what_reads_numbers(root):
    dataset = LeRobotDataset(annotate(root), skip_bad_episodes=True)
    assert not dataset.skipped
    assert {"language_persistent", "language_events"}.isdisjoint(dataset.features)
    assert prompts(dataset) == tuple(np.repeat(TASKS, LENGTHS))
    assert dataset.annotations() == {"plan": 3, "subtask": 6, "interjection": 1, "none": 1}


def test_the_latest_subtask_is_the_prompt_and_before_the_first_the_task(root, caplog):
    dataset = LeRobotDataset(annotate(root), prompt_from="subtask")
    assert prompts(dataset) == WANTED
    assert "2 of 15 frames have no subtask" in caplog.text
    assert sorted(dataset.tasks) == sorted(set(WANTED))


def test_both_are_one_prompt(root):
    found = prompts(LeRobotDataset(annotate(root), prompt_from="both"))
    assert found[0] == "fold the shirt. Subtask: take the sleeve"
    assert found[6:9] == ("pour", "pour", "pour. Subtask: tip the cup")


def test_to_be_predicted_a_subtask_stands_beside_the_task(root):
    dataset = pickle.loads(pickle.dumps(LeRobotDataset(annotate(root), prompt_from="predict")))
    assert prompts(dataset) == tuple(np.repeat(TASKS, LENGTHS))
    texts = [text_of(dataset.task(i)) for i in range(dataset.num_frames)]
    assert texts == ["" if text == "pour" else text for text in WANTED]


def test_episodes_that_are_left_out_shift_nothing(root):
    dataset = LeRobotDataset(annotate(root), prompt_from="subtask", without=(0,))
    assert prompts(dataset) == WANTED[6:]


@pytest.mark.parametrize("column", ["subtask", "__index_level_0__"])
def test_subtasks_by_index_are_those_of_earlier_versions(root, column):
    indices = [0, 0, 1, 1, 1, -1, *[1] * 9]
    index_subtasks(root, indices, column)
    dataset = LeRobotDataset(root, prompt_from="subtask")
    texts = {0: "take the sleeve", 1: "fold it", -1: "fold the shirt."}
    assert prompts(dataset) == tuple(texts[i] for i in indices)
    assert dataset.annotations() == {"subtask": 2}


def test_language_columns_come_before_an_index(root):
    dataset = LeRobotDataset(index_subtasks(annotate(root), [0] * 15), prompt_from="subtask")
    assert prompts(dataset) == WANTED


def test_a_dataset_without_subtasks_says_what_it_has(root):
    with pytest.raises(UserError, match=r"has no subtasks.*language rows: none.*'observation.state'.*lerobot-annotate"):
        LeRobotDataset(root, prompt_from="both")
    annotate(root, ([], [], []))
    with pytest.raises(UserError, match="3 of plan, 1 of interjection, 1 of none"):
        LeRobotDataset(root, prompt_from="subtask")


def test_a_config_asks_for_them_and_show_lists_them(root, tmp_path):
    annotate(root)
    (tmp_path / "robot.py").write_text(
        "from pi0_jax.data.robots import Robot\n"
        'ROBOT = Robot("r", {}, ("a", "b", "c"), ("a", "b", "c"), None, (8, 8))\n'
    )
    policy = PolicyConfig(robot=str(tmp_path / "robot.py"))
    dataset = open_dataset(DatasetConfig(str(root), prompt_from="subtask"), DataConfig(), policy)
    assert prompts(dataset.source) == WANTED
    pytest.importorskip("matplotlib")
    show([dataset], tmp_path / "data.html", 3)
    page = (tmp_path / "data.html").read_text()
    assert "6 of subtask" in page
    assert "0.0 s: take the sleeve<br>0.3 s: fold it" in page
