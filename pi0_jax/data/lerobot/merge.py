"""Turns any dataset that can be read into LeRobot 3.0, in pieces of a few episodes.

Every piece is a complete dataset in `.<name>.pieces` beside the target, renamed into place when it is whole; a stopped
conversion goes on with the first piece that is not there. At the end the pieces' files become the files of the target.
"""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from pi0_jax.atomic import written
from pi0_jax.data.lerobot.writer import (
    BOOKKEEPING,
    DATA_PATH,
    FILES_PER_CHUNK,
    VIDEO_PATH,
    LeRobotWriter,
    merge_stats,
    write_tasks,
)
from pi0_jax.data.source import Source

EPISODES_PER_PIECE = 16


def convert(
    source: Source,
    output: Path,
    robot_type: str,
    *,
    crf: int = 18,
    workers: int | None = None,
    episodes_per_piece: int = EPISODES_PER_PIECE,
) -> None:
    """Writes `source` as a LeRobot 3.0 dataset, with all features that the format can hold.

    Args:
        source: the dataset.
        output: folder to create.
        robot_type: as stored in `meta/info.json`.
        crf: quality of the video, 0 (best) to 51.
        workers: processes; None: one a core.
        episodes_per_piece: episodes between two points from which a stopped conversion goes on.

    Raises:
        FileExistsError: `output` exists.
        ValueError, FileNotFoundError: an episode cannot be read; the message names the file and the episode.
    """
    if output.exists():
        raise FileExistsError(f"{output} exists. Choose another folder, or remove it.")
    fps = round(source.fps)
    if fps != source.fps:
        raise ValueError(f"{source.root} has {source.fps} frames a second; LeRobot 3.0 stores a whole number.")
    pieces = output.absolute().parent / f".{output.name}.pieces"
    pieces.mkdir(parents=True, exist_ok=True)
    description = {"source": str(source.root.resolve()), "episodes": source.episodes, "crf": crf,
                   "piece": episodes_per_piece, "features": repr(_features(source))}  # fmt: skip
    known = pieces / "of.json"
    if not any(path.is_dir() and path.name.isdigit() for path in pieces.iterdir()):
        known.write_text(json.dumps(description))
    elif json.loads(known.read_text()) != description:
        raise ValueError(f"{pieces} holds pieces of another conversion. Remove it, or choose another folder.")
    count = -(-source.num_episodes // episodes_per_piece)
    folders = [pieces / f"{number:06d}" for number in range(count)]
    work = []
    for number, folder in enumerate(folders):
        if not folder.exists():
            first = number * episodes_per_piece
            end = min(first + episodes_per_piece, source.num_episodes)
            work.append((source, folder, robot_type, fps, crf, first, end))
    done = source.num_episodes - sum(end - first for *_, first, end in work)
    with tqdm(total=source.num_episodes, initial=done, desc=f"converting {source.root.name}", unit="episode") as bar:
        for written in _each(work, workers or os.cpu_count() or 1):
            bar.update(written)
    _merge(folders, output)
    shutil.rmtree(pieces)


def _features(source: Source) -> dict[str, dict[str, Any]]:
    features = {}
    for name, feature in source.features.items():
        shape = tuple(feature["shape"])
        if name in source.cameras:
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
                    frames[stored] = source.read(name, episode, episode + 1).reshape(len(rows), *shape)
            writer.add_episode(frames, [source.tasks[i] for i in source.task_index[rows].tolist()])
    return end - first


def _each(work: list[tuple], workers: int) -> Iterator[int]:
    if workers <= 1 or len(work) < 2:
        yield from (_write_piece(*task) for task in work)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(min(workers, len(work)), mp_context=context) as pool:
        for future in concurrent.futures.as_completed([pool.submit(_write_piece, *task) for task in work]):
            yield future.result()


def _merge(folders: list[Path], output: Path) -> None:
    """One dataset of several, one after another; videos are linked, so that nothing is lost if it stops."""
    with written(output.absolute()) as partial:
        infos = [json.loads((folder / "meta/info.json").read_text()) for folder in folders]
        cameras = [name for name, feature in infos[0]["features"].items() if feature["dtype"] == "video"]
        tasks: dict[str, int] = {}
        rows: list[dict[str, Any]] = []
        files, frames = 0, 0
        videos = dict.fromkeys(cameras, 0)
        for folder in folders:
            table = pq.read_table(folder / "meta/tasks.parquet").to_pylist()
            own = np.array([tasks.setdefault(r["task"], len(tasks)) for r in sorted(table, key=_task_index)])
            episodes = pq.read_table(folder / "meta/episodes/chunk-000/file-000.parquet").to_pylist()
            offset = len(rows)
            numbers = sorted({(row["data/chunk_index"], row["data/file_index"]) for row in episodes})
            place = {number: files + i for i, number in enumerate(numbers)}
            for chunk, file in numbers:
                data = pq.read_table(folder / DATA_PATH.format(chunk_index=chunk, file_index=file))
                for name, shift in (("episode_index", offset), ("index", frames)):
                    data = _replaced(data, name, data[name].to_numpy() + shift)
                data = _replaced(data, "task_index", own[data["task_index"].to_numpy()])
                chunk, file = divmod(place[chunk, file], FILES_PER_CHUNK)
                target = partial / DATA_PATH.format(chunk_index=chunk, file_index=file)
                target.parent.mkdir(parents=True, exist_ok=True)
                pq.write_table(data, target)
            moved: dict[tuple[str, int, int], int] = {}
            for camera in cameras:
                keys = sorted({(r[f"videos/{camera}/chunk_index"], r[f"videos/{camera}/file_index"]) for r in episodes})
                for i, (chunk, file) in enumerate(keys):
                    moved[camera, chunk, file] = videos[camera] + i
                    template = VIDEO_PATH.replace("{video_key}", camera)
                    new_chunk, new_file = divmod(videos[camera] + i, FILES_PER_CHUNK)
                    target = partial / template.format(chunk_index=new_chunk, file_index=new_file)
                    target.parent.mkdir(parents=True, exist_ok=True)
                    _link(folder / template.format(chunk_index=chunk, file_index=file), target)
                videos[camera] += len(keys)
            for row in episodes:
                row["episode_index"] += offset
                row["dataset_from_index"] += frames
                row["dataset_to_index"] += frames
                at = place[row["data/chunk_index"], row["data/file_index"]]
                row["data/chunk_index"], row["data/file_index"] = divmod(at, FILES_PER_CHUNK)
                for camera in cameras:
                    chunk, file = (f"videos/{camera}/{key}_index" for key in ("chunk", "file"))
                    row[chunk], row[file] = divmod(moved[camera, row[chunk], row[file]], FILES_PER_CHUNK)
            rows += episodes
            files += len(numbers)
            frames = rows[-1]["dataset_to_index"]
        (partial / "meta/episodes/chunk-000").mkdir(parents=True)
        pq.write_table(pa.Table.from_pylist(rows), partial / "meta/episodes/chunk-000/file-000.parquet")
        write_tasks(list(tasks), partial / "meta/tasks.parquet")
        columns = sorted(partial.glob("data/*/*.parquet"))
        pieces = [json.loads((folder / "meta/stats.json").read_text()) for folder in folders]
        stats = merge_stats(columns, infos[0]["features"], cameras, pieces)
        (partial / "meta/stats.json").write_text(json.dumps(stats, indent=4))
        info = infos[0] | {
            "total_episodes": len(rows),
            "total_frames": frames,
            "total_tasks": len(tasks),
            "splits": {"train": f"0:{len(rows)}"},
        }
        (partial / "meta/info.json").write_text(json.dumps(info, indent=4, ensure_ascii=False))


def _task_index(row: dict[str, Any]) -> int:
    return row["task_index"]


def _replaced(table: pa.Table, name: str, values: np.ndarray) -> pa.Table:
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))


def _link(path: Path, target: Path) -> None:
    try:
        os.link(path, target)
    except OSError:
        shutil.copy2(path, target)
