"""Converts any dataset that can be read to LeRobot 3.0, in pieces of a few episodes.

Every piece is a complete dataset in `.<name>.pieces` beside the target, renamed into place when it is whole; a stopped
conversion goes on with the first piece that is not there. At the end the pieces' files become the files of the target.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.lerobot.layout import BOOKKEEPING, DATA_PATH, FILES_PER_CHUNK, VIDEO_PATH
from pi0_jax.data.lerobot.stats import merge_stats
from pi0_jax.data.lerobot.writer import LeRobotWriter, write_meta
from pi0_jax.data.names import is_depth
from pi0_jax.data.pool import run_tasks
from pi0_jax.data.source import BadEpisode, Source
from pi0_jax.errors import UserError

EPISODES_PER_PIECE = 16


def convert(
    source: Source,
    output: Path,
    robot_type: str,
    *,
    crf: int = 18,
    workers: int | None = None,
    episodes_per_piece: int = EPISODES_PER_PIECE,
    settings: str = "",
) -> None:
    """Writes `source` as a LeRobot 3.0 dataset, with all features that the format can hold: no text, no depth.

    `crf` is the quality of the video, 0 (best) to 51; `workers` are processes, None: one per core. A stopped conversion
    goes on from the last multiple of `episodes_per_piece` episodes, if `settings`, what else decides its content, are
    the same.

    Raises:
        FileExistsError: `output` exists.
        UserError, FileNotFoundError: an episode cannot be read; the message names the file and the episode.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Choose another folder, or remove it.")
    fps = round(source.fps)
    if fps != source.fps:
        raise UserError(f"{source.root} has {source.fps} frames per second; LeRobot 3.0 stores a whole number.")
    pieces = output.absolute().parent / f".{output.name}.pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    description = {
        "source": str(source.root.resolve()),
        "episodes": source.episodes,
        "crf": crf,
        "piece": episodes_per_piece,
        "features": repr(_features(source)),
        "settings": settings,
    }
    known = pieces / "of.json"
    if not any(path.is_dir() and path.name.isdigit() for path in pieces.iterdir()):
        known.write_text(json.dumps(description))
    elif json.loads(known.read_text()) != description:
        raise UserError(f"{pieces} holds pieces of another conversion. Remove it, or choose another folder.")
    count = -(-source.num_episodes // episodes_per_piece)
    folders = [pieces / f"{number:06d}" for number in range(count)]
    tasks = []
    for number, folder in enumerate(folders):
        if not folder.exists():
            first = number * episodes_per_piece
            end = min(first + episodes_per_piece, source.num_episodes)
            tasks.append((source, folder, robot_type, fps, crf, first, end))
    done = source.num_episodes - sum(end - first for *_, first, end in tasks)
    with tqdm(total=source.num_episodes, initial=done, desc=f"converting {source.root.name}", unit="episode") as bar:
        for episodes in run_tasks(_write_piece, tasks, workers):
            bar.update(episodes)
    _merge(folders, output)
    shutil.rmtree(pieces)


def _features(source: Source) -> dict[str, dict[str, Any]]:
    features = {}
    for name, feature in source.features.items():
        shape = tuple(feature["shape"])
        if name in source.cameras:
            if is_depth(feature):
                continue  # colours of 8 bits cannot hold it
            height, width, _ = shape
            features[name] = {"dtype": "video", "shape": (height - height % 2, width - width % 2, 3), "names": None}
        elif name not in BOOKKEEPING and feature["dtype"] != "string" and len(shape) <= 1:
            features[name] = {"dtype": feature["dtype"], "shape": shape or (1,), "names": feature.get("names")}
    return {name.replace("/", "."): feature for name, feature in features.items()}


def _write_piece(source: Source, folder: Path, robot_type: str, fps: int, crf: int, first: int, end: int) -> int:
    features = _features(source)
    with LeRobotWriter(folder, fps, robot_type, features, pix_fmt="yuv420p", crf=crf) as writer:
        for episode in range(first, end):
            rows = np.arange(*source.episode_range(episode))
            frames = {}
            for name in source.features:
                if (stored := name.replace("/", ".")) not in features:
                    continue
                shape = features[stored]["shape"]
                if name in source.cameras:
                    frames[stored] = source.images(name, rows)[:, : shape[0], : shape[1]]
                else:
                    frames[stored] = source.read(name, np.array([episode])).reshape(len(rows), *shape)
            try:
                writer.add_episode(frames, [source.tasks[i] for i in source.task_index[rows].tolist()])
            except UserError as error:
                raise BadEpisode(f"{source.episodes[episode]} of {source.root}: {error}") from error
    return end - first


def _merge(folders: list[Path], output: Path) -> None:
    """One dataset of several, one after another; videos are linked, so that nothing is lost if it stops."""
    with written(output.absolute()) as partial:
        infos = [json.loads((folder / "meta/info.json").read_text()) for folder in folders]
        cameras = [name for name, feature in infos[0]["features"].items() if feature["dtype"] == "video"]
        templates = {f"videos/{camera}": VIDEO_PATH.replace("{video_key}", camera) for camera in cameras}
        templates["data"] = DATA_PATH
        tasks: dict[str, int] = {}
        merged: list[dict[str, Any]] = []
        files, frames = dict.fromkeys(templates, 0), 0
        for folder in folders:
            table = pq.read_table(folder / "meta/tasks.parquet").sort_by("task_index").to_pylist()
            own = np.array([tasks.setdefault(row["task"], len(tasks)) for row in table])
            rows = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()

            def copy_shifted(path: Path, target: Path, own=own, episodes=len(merged), frames=frames) -> None:
                data = pq.read_table(path)
                for name, shift in (("episode_index", episodes), ("index", frames)):
                    data = _replaced(data, name, data[name].to_numpy() + shift)
                pq.write_table(_replaced(data, "task_index", own[data["task_index"].to_numpy()]), target)

            for key, template in templates.items():
                put = copy_shifted if key == "data" else _link
                files[key] += _put_files(folder, partial, template, key, rows, files[key], put)
            for row in rows:
                row["episode_index"] += len(merged)
                row["dataset_from_index"] += frames
                row["dataset_to_index"] += frames
            merged += rows
            frames = merged[-1]["dataset_to_index"]
        columns = sorted(partial.glob("data/*/*.parquet"))
        pieces = [json.loads((folder / "meta/stats.json").read_text()) for folder in folders]
        stats = merge_stats(columns, infos[0]["features"], cameras, pieces)
        write_meta(partial, infos[0], merged, list(tasks), stats)


def _put_files(
    folder: Path,
    target: Path,
    template: str,
    key: str,
    rows: list[dict[str, Any]],
    before: int,
    put: Callable[[Path, Path], None],
) -> int:
    """Puts the numbered files of a piece behind `before` others, and corrects the numbers in `rows`.

    Returns:
        The number of files.
    """
    chunk, file = f"{key}/chunk_index", f"{key}/file_index"
    numbers = sorted({(row[chunk], row[file]) for row in rows})
    for i, number in enumerate(numbers):
        place = divmod(before + i, FILES_PER_CHUNK)
        old, new = (template.format(chunk_index=c, file_index=f) for c, f in (number, place))
        (target / new).parent.mkdir(parents=True, exist_ok=True)
        put(folder / old, target / new)
    for row in rows:
        row[chunk], row[file] = divmod(before + numbers.index((row[chunk], row[file])), FILES_PER_CHUNK)
    return len(numbers)


def _replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
