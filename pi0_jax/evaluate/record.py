"""Records episodes as LeRobot datasets: demonstrations of a simulator's scripted expert, on all cores and reproducibly,
and the episodes of a policy that is being evaluated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
from tqdm import tqdm

from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.data.source import SUCCESS
from pi0_jax.errors import UserError
from pi0_jax.evaluate.demonstrate import ACTION, STATE, VALID, Demonstration, Noise, demonstrate
from pi0_jax.evaluate.environments import open_simulator
from pi0_jax.evaluate.processes import Processes
from pi0_jax.evaluate.rollout import Outcome
from pi0_jax.evaluate.simulators import MAX_DEMONSTRATIONS
from pi0_jax.evaluate.simulators.gym import Episodes, Simulator

if TYPE_CHECKING:
    from pi0_jax.data.lerobot import LeRobotWriter

INTERVENTION = "complementary_info.is_intervention"
"""Feature of recorded rollouts, `[n, 1]`, named as in LeRobot's recordings with a human in the loop: 1 where a human
acted instead of the policy, so 0 here. `SUCCESS` is True where the episode succeeded with this frame's action."""
STORY = Path("meta/recording.json")
"""How the episodes of a dataset came about."""
SUBTASK_INDEX = "subtask_index"
"""Feature of a dataset with subtasks; `pi0_jax.data.lerobot.language` has the same."""
MIN_SHARE = 4
"""Episodes that make another process worth its start."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Which demonstrations to record; equal sources give equal demonstrations."""

    simulator: str
    """Name of a simulator that has a scripted expert."""
    split: str = "train"
    """"train" or "validation". Evaluation layouts are refused: nobody should train on them."""
    seed: int = 0
    """Other seeds give other episodes of the split."""
    noise: Noise | None = None
    """None: the default `Noise` where actions are changes (`Robot.changes`), and none where a random action is a far
    target."""
    options: tuple[tuple[str, Any], ...] = ()
    """Options of the simulator."""
    python: str | None = None
    """Interpreter that has the simulator's packages; None: as `open_simulator` finds it."""

    def __post_init__(self):
        if self.split not in ("train", "validation"):
            raise UserError(f'split is {self.split!r}; demonstrations are recorded for "train" or "validation".')


def demonstrations(source: Source, num_episodes: int, workers: int | None = None) -> Iterator[Demonstration]:
    """The first demonstrations of a source, the simulator's tasks in turn.

    `num_episodes` is at most `MAX_DEMONSTRATIONS`. `workers` are processes, None: one per core; they change nothing in
    the result.

    Raises:
        UserError: no such simulator, or it has no expert, or `num_episodes` is out of range.
    """
    yield from _record(_open(source, num_episodes, workers), source, num_episodes)


def _open(source: Source, num_episodes: int, workers: int | None) -> Simulator | Processes:
    """The source's simulator: in processes, unless it is light and one process is enough."""
    if not 0 < num_episodes <= MAX_DEMONSTRATIONS:
        raise UserError(
            f"num_episodes is {num_episodes}; expected 1 to {MAX_DEMONSTRATIONS}. Record more under another seed."
        )
    options, most = dict(source.options), min(workers or os.cpu_count() or 1, -(-num_episodes // MIN_SHARE))
    simulator = open_simulator(source.simulator, options, source.python, most)
    assert isinstance(simulator, Simulator | Processes)
    alone = isinstance(simulator, Processes) or most == 1
    return simulator if alone else Processes(source.simulator, options, most=most)


def _record(simulator: Simulator | Processes, source: Source, num_episodes: int) -> Iterator[Demonstration]:
    robot = get_robot(simulator.robot)
    what = (source.seed, source.split, _noise(source, robot), robot.cameras)
    if isinstance(simulator, Processes):
        yield from simulator.demonstrations(num_episodes, *what)
        simulator.close()
    else:
        yield from (demonstrate(simulator, number, *what) for number in range(num_episodes))


def _noise(source: Source, robot: Robot) -> Noise:
    return source.noise or (Noise() if robot.changes else Noise(0.0))


def features(frames: Mapping[str, np.ndarray], robot: Robot) -> dict[str, dict[str, Any]]:
    """The dataset's columns in LeRobot's terms."""
    names = {STATE: [*robot.state], ACTION: [*robot.actions]}
    names |= {name: [name.rpartition(".")[2]] for name in (VALID, SUCCESS, INTERVENTION)}
    names |= {camera: ["height", "width", "channels"] for camera in robot.cameras}
    names |= {SUBTASK_INDEX: None}
    return {
        name: {"dtype": "video" if name in robot.cameras else str(x.dtype), "shape": x.shape[1:], "names": names[name]}
        for name, x in frames.items()
    }


def record(
    root: str | Path, source: Source, num_episodes: int = 1000, workers: int | None = None, overwrite: bool = False
) -> dict[str, Any]:
    """Writes `demonstrations(...)` to `root` as a LeRobot dataset, and how they came about to `meta/recording.json`.

    Where the simulator has subtasks, each frame has its `subtask_index`, and `meta/subtasks.parquet` the texts.

    Returns:
        The content of `meta/recording.json`: the source's fields, `frames`, `dropped` (failed attempts, left out of
        the dataset), and for each episode its task's name, its layout's seed, and its mode where there are several.
    """
    # Here, so that worker processes start without video and parquet.
    from pi0_jax.data.lerobot import LeRobotWriter
    from pi0_jax.data.lerobot.writer import write_texts

    simulator = _open(source, num_episodes, workers)
    robot, found = get_robot(simulator.robot), _record(simulator, source, num_episodes)
    subtasks: dict[str, int] = {}
    found = (_with_subtasks(each, subtasks) for each in found)
    first = next(found)
    columns = features(first.frames, robot)
    episodes, frames, dropped = [], 0, 0
    with LeRobotWriter(root, simulator.fps, robot_type=robot.name, features=columns, overwrite=overwrite) as writer:
        found = tqdm(itertools.chain([first], found), f"recording {source.split}", num_episodes, unit="episode")
        for episode in found:
            writer.add_episode(episode.frames, task=episode.prompt)
            mode = {} if episode.mode is None else {"mode": episode.mode}
            episodes.append({"task": episode.task, "seed": episode.seed, **mode})
            frames += len(episode.frames["action"])
            dropped += episode.dropped
    summary = dataclasses.asdict(dataclasses.replace(source, noise=_noise(source, robot))) | {
        "frames": frames,
        "dropped": dropped,
        "episodes": episodes,
    }
    if subtasks:
        write_texts(Path(root) / "meta" / "subtasks.parquet", "subtask", [*subtasks])
    (Path(root) / STORY).write_text(json.dumps(summary, indent=1))
    return summary


def _with_subtasks(demonstration: Demonstration, texts: dict[str, int]) -> Demonstration:
    """A demonstration whose frames have the index of their subtask in `texts`, which grow."""
    if not demonstration.subtasks:
        return demonstration
    index = [texts.setdefault(text, len(texts)) for text in demonstration.subtasks]
    column = np.array(index, np.int64)[:, None]
    return demonstration._replace(frames={**demonstration.frames, SUBTASK_INDEX: column})


def record_questions(root: str | Path, source: Source, num_pictures: int) -> int:
    """Writes pictures of a source's layouts to a new folder, and what the simulator asks about them with the answers
    to `questions.jsonl`, as `data.pairs` reads them.

    Returns:
        The number of questions.

    Raises:
        FileExistsError: there is such a folder.
        UserError: the simulator asks no questions.
    """
    simulator = open_simulator(source.simulator, dict(source.options), source.python)
    if not isinstance(simulator, Simulator) or simulator.questions is None:
        raise UserError(f"the simulator {source.simulator} asks no questions about its pictures.")
    folder, lines = Path(root), []
    folder.mkdir(parents=True)
    for number in tqdm(range(num_pictures), "drawing", unit="picture"):
        episode = simulator.start(number, source.seed, source.split)
        camera, asked = episode.questions()
        name = f"{number:06}.png"
        PIL.Image.fromarray(episode.observe()["images"][camera]).save(folder / name)
        episode.close()
        lines += [{"image": name, "question": question, "answer": answer} for question, answer in asked.items()]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return len(lines)


class Rollouts:
    """A LeRobot dataset of a policy's episodes, successes and failures; use it in a `with` statement.

    Each frame has `SUCCESS` and `INTERVENTION` beside observation and action, and each episode's row in `meta/episodes`
    has `episode_success`, "success" or "failure". Episodes are in the order in which they ended; `meta/recording.json`
    has each one's index. The dataset appears at the end, and not at all after an error.

    Args:
        root: folder to create.
        simulator: the one that the policy is evaluated in.
        about: what the episodes depend on, as JSON, for `meta/recording.json`.
        overwrite: whether to replace an existing folder.
    """

    def __init__(self, root: Path, simulator: Episodes, about: Mapping[str, Any], *, overwrite: bool = False):
        self._root, self._fps, self._about, self._overwrite = root, simulator.fps, about, overwrite
        self.robot = get_robot(simulator.robot)
        self.episodes: list[dict[str, Any]] = []
        self._writer: LeRobotWriter | None = None

    def __enter__(self) -> Rollouts:
        return self

    def add(self, outcome: Outcome) -> None:
        """Appends an episode with its `frames`; errors are those of `LeRobotWriter`."""
        from pi0_jax.data.lerobot import LeRobotWriter

        marks = np.zeros((outcome.num_steps, 1), bool)
        success = marks.copy()
        success[-1] = outcome.success
        frames = {**outcome.frames, SUCCESS: success, INTERVENTION: marks.astype(np.float32)}
        if self._writer is None:
            what = (self._root, self._fps, self.robot.name, features(frames, self.robot))
            self._writer = LeRobotWriter(*what, overwrite=self._overwrite)
        label = {"episode_success": "success" if outcome.success else "failure"}
        self._writer.add_episode(frames, task=outcome.prompt, labels=label)
        names = ("index", "task", "seed", "success", "mode")
        self.episodes.append({name: getattr(outcome, name) for name in names})

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self._writer is None:
            return
        if error is not None:
            self._writer.discard()
            return
        self._writer.close()
        summary = {**self._about, "frames": self._writer.num_frames, "episodes": self.episodes}
        (self._root / STORY).write_text(json.dumps(summary, indent=1, default=repr))
