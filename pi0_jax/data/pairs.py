"""Images with a question and its answer, to train on beside demonstrations: a folder with pictures and *.jsonl files.

    {"image": "kitchen/17.jpg", "question": "where is the cup?", "answer": "left of the sink"}
    {"image": "kitchen/17.jpg", "question": "caption en", "answer": "a kitchen with a cup on the table"}
    {"image": "kitchen/17.jpg", "question": "detect cup", "boxes": [{"label": "cup", "box": [120, 40, 260, 190]}]}

`box` is left, top, right and bottom in pixels of the picture. An answer of boxes is written as PaliGemma writes it:
`<loc0160><loc0480><loc0760><loc1023> cup`, top, left, bottom and right in 1024ths of the square that the model sees,
boxes separated by " ; ". The prompt is the question alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import Int, UInt8

from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE, Instruction, Rows, Source
from pi0_jax.data.transform import resize_with_pad
from pi0_jax.errors import UserError, did_you_mean, listed

IMAGE = "image"
"""The one camera of such a dataset."""
LOCATIONS = 1023
"""Last of PaliGemma's location tokens."""
EXAMPLE = '{"image": "a.jpg", "question": "where is the cup?", "answer": "on the table"}'
KEYS = ("image", "question", "answer", "boxes")


def is_pairs(root: Path) -> bool:
    """Whether a folder has image-text pairs: *.jsonl files, and no dataset of another kind."""
    return any(root.glob("*.jsonl")) and not (root / "meta").exists()


class Box(NamedTuple):
    """What is where in a picture, in pixels."""

    label: str
    left: float
    top: float
    right: float
    bottom: float


class Pair(NamedTuple):
    """One line."""

    image: Path
    question: str
    answer: str
    """Empty where `boxes` are the answer."""
    boxes: tuple[Box, ...]


class PairsDataset(Source):
    """Image-text pairs, each an episode of one frame, without actions. Pictures come at the model's resolution.

    Args:
        root: of the folder.
        robot: the policy's, whose state and actions are zeros here.
        size: pixels of a side of the model's images.

    Raises:
        FileNotFoundError: a picture is missing.
        UserError: a line that is no such pair; the message names it.
    """

    has_actions = False

    def __init__(self, root: Path, robot: Robot, size: int):
        self.root, self.fps, self._size = root, robot.fps or 1, size
        self._pairs = [pair for path in sorted(root.glob("*.jsonl")) for pair in read_pairs(path)]
        if not self._pairs:
            raise UserError(f"the *.jsonl files of {root} have no line, so there is nothing to learn.")
        vectors = {STATE: len(robot.model_state), ACTION: len(robot.model_actions)}
        self.features = {IMAGE: {"dtype": "image", "shape": (size, size, 3), "names": None}}
        self.features |= {name: {"dtype": "float32", "shape": (n,), "names": None} for name, n in vectors.items()}
        self._check_images()
        self.tasks = [Instruction(pair.question, _answer(pair)) for pair in self._pairs]
        self.episodes = [f"{pair.image.name}: {pair.question}" for pair in self._pairs]
        self.ends = np.arange(1, len(self._pairs) + 1)
        self.skipped = {}

    @property
    def has_boxes(self) -> bool:
        """Whether answers say where things are in the picture."""
        return any(pair.boxes for pair in self._pairs)

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        self.check_column(name)
        return np.zeros((len(episodes), *self.features[name]["shape"]), np.float32)

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return np.arange(len(self._pairs))

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        rows = np.asarray(rows)
        found = np.zeros((*rows.shape, self._size, self._size, 3), np.uint8)
        for place in np.ndindex(rows.shape):
            path = self._pairs[int(rows[place])].image
            try:
                with PIL.Image.open(path) as image:
                    found[place] = resize_with_pad(np.asarray(image.convert("RGB")), self._size)
            except OSError as error:
                raise UserError(f"{path} cannot be read as a picture: {error}. Remove its lines.") from error
        return found

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        return list(dict.fromkeys(pair.image for pair in self._pairs))

    def _check_images(self) -> None:
        missing = [str(path) for path in self.picture_files(IMAGE) if not path.is_file()]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} pictures that the *.jsonl files of {self.root} name are missing: "
                f"{listed(missing, 3)}. They are named relative to the folder."
            )


def read_pairs(path: Path) -> Iterator[Pair]:
    """The pairs of a file; UserError names the line that is none."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _pair(json.loads(line), path.parent)
                except (ValueError, TypeError, KeyError, AttributeError) as error:
                    reason = error if isinstance(error, UserError) else repr(error)
                    where = f"line {number} of {path}"
                    raise UserError(f"{where} is no pair such as {EXAMPLE}: {reason}") from error


def _pair(row: dict[str, Any], folder: Path) -> Pair:
    if unknown := sorted(set(row) - set(KEYS)):
        raise UserError(f"it has {listed(unknown)}, and pairs have {', '.join(KEYS)}.{did_you_mean(unknown[0], KEYS)}")
    boxes = tuple(Box(str(each["label"]), *map(float, each["box"])) for each in row.get("boxes", ()))
    if wrong := [box for box in boxes if not (box.left < box.right and box.top < box.bottom)]:
        raise UserError(f"the box of {wrong[0].label!r} is {list(wrong[0][1:])}; expected left, top, right, bottom.")
    answer, question = str(row.get("answer", "")), str(row["question"])
    if not question.strip() or bool(answer.strip()) == bool(boxes):
        raise UserError("it needs a question, and either an answer or boxes.")
    return Pair(folder / row["image"], question, answer, boxes)


def _answer(pair: Pair) -> str:
    if not pair.boxes:
        return pair.answer
    with PIL.Image.open(pair.image) as image:  # reads the size alone
        return locations(pair.boxes, image.width, image.height)


def locations(boxes: Sequence[Box], width: int, height: int) -> str:
    """Boxes in PaliGemma's words, in a picture of some pixels that is padded to a square.

    What lies outside the picture is cut off.
    """
    side = max(width, height)
    across, down = (side - width) / 2, (side - height) / 2

    def token(value: float, extent: int, border: float) -> str:
        place = (min(max(value, 0), extent) + border) / side
        return f"<loc{round(place * LOCATIONS):04}>"

    return " ; ".join(
        token(box.top, height, down)
        + token(box.left, width, across)
        + token(box.bottom, height, down)
        + token(box.right, width, across)
        + f" {box.label}"
        for box in boxes
    )
