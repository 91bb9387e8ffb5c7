"""Words of a LeRobot dataset beside its instructions: language columns, and the subtasks of earlier versions.

Since LeRobot 0.6 a data file may have two columns of rows {role, content, style, camera, tool_calls}:

    language_persistent    the rows of a whole episode, repeated on each of its frames, with a `timestamp` from which a
                           row counts until the next one of its style; styles subtask, plan, memory, motion, task_aug
    language_events        rows that belong to their own frame: interjection, vqa, trace

Datasets of LeRobot 0.4 and 0.5 have a column `subtask_index` and `meta/subtasks.parquet`; -1 is none.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int, Num

from pi0_jax.config.data import PromptFrom
from pi0_jax.data.lerobot.layout import Episode, RowIndex, read_column, read_table
from pi0_jax.data.source import Instruction
from pi0_jax.errors import UserError

PERSISTENT, EVENTS = "language_persistent", "language_events"
INDEX, TEXTS = "subtask_index", "meta/subtasks.parquet"
STYLE = "subtask"

_log = logging.getLogger(__name__)


class Language:
    """Words of some episodes of a dataset.

    Args:
        rows: of the dataset's files.
        episodes: those that are read.
        columns: of the data files, by meta/info.json.
    """

    def __init__(self, rows: RowIndex, episodes: Sequence[Episode], columns: Sequence[str]):
        self._rows, self._root, self._columns = rows, rows.root, columns
        self._files: dict[str, list[Episode]] = {}
        for episode in episodes:
            self._files.setdefault(episode.data, []).append(episode)

    def styles(self) -> dict[str, int]:
        """How many rows there are of each style; subtasks of earlier versions count once per text."""
        found: collections.Counter[str] = collections.Counter()
        if self._has_index():
            found[STYLE] += len(_read_texts(self._root))
        for rows in self._persistent() if PERSISTENT in self._columns else ():
            found.update(row["style"] or "none" for row in rows)
        for file in self._files if EVENTS in self._columns else ():
            column = _column(self._root / file, EVENTS)
            styles = [] if column is None else column.flatten().field("style").to_pylist()
            found.update(style or "none" for style in styles)
        return dict(found)

    def subtasks(self, timestamps: Num[np.ndarray, "n"]) -> Subtasks:
        """The subtask of each frame of the episodes.

        Args:
            timestamps: of the frames, as in their column.

        Raises:
            UserError: the dataset has none; the message says what it has.
        """
        if PERSISTENT in self._columns:
            found = _active(self._persistent(), np.split(timestamps, np.cumsum(self._lengths())[:-1]))
            if found.texts:
                return found
        if self._has_index():
            return Subtasks(_read_texts(self._root), self._read_index())
        styles = ", ".join(f"{count} of {style}" for style, count in self.styles().items()) or "none"
        raise UserError(
            f"{self._root} has no subtasks for `prompt_from`: no row of style {STYLE!r} in {PERSISTENT} (its language "
            f"rows: {styles}), and not {INDEX} with {TEXTS}; its columns are {sorted(self._columns)}. Set prompt_from "
            "to 'task', or annotate the dataset (lerobot-annotate)."
        )

    def _has_index(self) -> bool:
        return INDEX in self._columns and (self._root / TEXTS).is_file()

    def _lengths(self) -> list[int]:
        return [episode.length for episodes in self._files.values() for episode in episodes]

    def _persistent(self) -> list[list[dict[str, Any]]]:
        """Rows of each episode, which are those of its first frame."""
        found = []
        for file, episodes in self._files.items():
            column, (_, starts) = _column(self._root / file, PERSISTENT), self._rows.locate(file)
            if column is None:
                found += [[] for _ in episodes]
            else:
                found += [
                    rows or [] for rows in column.take(pa.array([starts[e.number] for e in episodes])).to_pylist()
                ]
        return found

    def _read_index(self) -> Int[np.ndarray, "n"]:
        parts = []
        for file, episodes in self._files.items():
            index, _ = self._rows.locate(file)
            keep = np.isin(index, [episode.number for episode in episodes])
            parts.append(read_column(self._root / file, INDEX, (1,), keep)[:, 0].astype(np.int64))
        return np.concatenate(parts)


class Subtasks(NamedTuple):
    """Subtasks of frames."""

    texts: list[str]
    index: Int[np.ndarray, "n"]
    """Of each frame, into `texts`; -1: none."""


def make_prompts(
    tasks: list[str], task_index: Int[np.ndarray, "n"], subtasks: Subtasks, prompt_from: PromptFrom
) -> tuple[list[str], Int[np.ndarray, "n"]]:
    """Prompts of frames, and the index of each frame's: the subtask, the task and the subtask, or the task with the
    subtask to be written.

    Frames without a subtask have their task.
    """
    index = np.where(subtasks.index < len(subtasks.texts), subtasks.index, -1)
    if missing := int((index < 0).sum()):
        _log.warning("%d of %d frames have no subtask; their prompt is the task", missing, len(index))
    pairs, inverse = np.unique(np.stack([task_index, index], axis=1), axis=0, return_inverse=True)
    texts = [
        _prompt(tasks[task], subtasks.texts[subtask] if subtask >= 0 else "", prompt_from)
        for task, subtask in pairs.tolist()
    ]
    if prompt_from == "predict":
        return texts, inverse.reshape(-1)
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return list(numbers), np.array([numbers[text] for text in texts])[inverse.reshape(-1)]


def _prompt(task: str, subtask: str, prompt_from: PromptFrom) -> str:
    if not subtask.strip():
        return task
    if prompt_from == "predict":
        return Instruction(task, subtask)
    return subtask if prompt_from == "subtask" else f"{task.rstrip(' .')}. Subtask: {subtask}"


def _active(episodes: Sequence[list[dict[str, Any]]], timestamps: Sequence[np.ndarray]) -> Subtasks:
    """The latest row of style subtask at each frame's time; of two at one time the last."""
    texts: dict[str, int] = {}
    parts = []
    for rows, times in zip(episodes, timestamps, strict=True):
        chosen = [row for row in rows if row["style"] == STYLE and (row["content"] or "").strip()]
        chosen.sort(key=lambda row: row["timestamp"])
        numbers = np.array([-1, *(texts.setdefault(row["content"], len(texts)) for row in chosen)])
        begin = np.array([row["timestamp"] for row in chosen], np.float32)
        parts.append(numbers[np.searchsorted(begin, times.astype(np.float32), side="right")])
    return Subtasks(list(texts), np.concatenate(parts))


def _read_texts(root: Path) -> list[str]:
    table = read_table(root / TEXTS)
    names = [name for name in (STYLE, "__index_level_0__") if name in table.column_names]
    if not names or INDEX not in table.column_names:
        raise UserError(f"{root / TEXTS} has columns {table.column_names}; expected {STYLE!r} and {INDEX!r}.")
    texts = {row[INDEX]: row[names[0]] for row in table.to_pylist()}
    if sorted(texts) != list(range(len(texts))):
        raise UserError(f"{root / TEXTS} numbers its subtasks {sorted(texts)}; expected 0 to {len(texts) - 1}.")
    return [texts[i] for i in range(len(texts))]


def _column(path: Path, name: str) -> Any:
    """A column as one array; None if the file has it not, as one that nobody annotated."""
    table = read_table(path, [name])
    return table[name].combine_chunks() if name in table.column_names else None
