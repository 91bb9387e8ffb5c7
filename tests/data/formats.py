"""The recorded test episodes in other formats: LeRobot 2.x by hand, pictures inside parquet, other codecs."""

from __future__ import annotations

import io
import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from pi0_jax.data.lerobot import BOOKKEEPING
from tests.data.conftest import FEATURES, LENGTHS, TASKS, episode

CAMERAS = [name for name, feature in FEATURES.items() if feature["dtype"] == "video"]


def write_video(path: Path, images: np.ndarray, codec: str = "libx264", fps: int = 5, **options) -> None:
    """A video file; `options` are the encoder's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width, stream.pix_fmt = *images.shape[1:3], "yuv420p"
        stream.options = {key: str(value) for key, value in options.items()}
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_v2(root: Path, version: str = "v2.1", pictures: bool = False, codec: str = "libx264", **options) -> Path:
    """The five test episodes as LeRobot 2.x lays them out, with video or with pictures in parquet."""
    kind = {"dtype": "image" if pictures else "video"}
    features = {name: {**f, **(kind if name in CAMERAS else {})} for name, f in FEATURES.items()} | BOOKKEEPING
    tasks = list(dict.fromkeys(TASKS))
    total = 0
    for number, length in enumerate(LENGTHS):
        values = episode(number)
        rows = {name: pa.array(list(values[name])) for name in ("observation.state", "action")}
        rows["valid"] = pa.array(values["valid"][:, 0])
        index = np.arange(length)
        rows["timestamp"] = pa.array((index / 5).astype(np.float32))
        rows["frame_index"], rows["index"] = pa.array(index), pa.array(total + index)
        rows["episode_index"] = pa.array(np.full(length, number))
        rows["task_index"] = pa.array(np.full(length, tasks.index(TASKS[number])))
        for camera in CAMERAS:
            if pictures:
                rows[camera] = pa.array([{"bytes": png(image), "path": None} for image in values[camera]])
            else:
                path = root / f"videos/chunk-{number // 2:03d}/{camera}/episode_{number:06d}.mp4"
                write_video(path, values[camera], codec, **options)
        path = root / f"data/chunk-{number // 2:03d}/episode_{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(rows), path, row_group_size=4)
        total += length
    info = {
        "codebase_version": version,
        "fps": 5,
        "features": features,
        "total_episodes": len(LENGTHS),
        "total_frames": total,
        "total_tasks": len(tasks),
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "robot_type": "tabletop",
    }
    lines = {
        "tasks": [{"task_index": i, "task": task} for i, task in enumerate(tasks)],
        "episodes": [{"episode_index": i, "tasks": [TASKS[i]], "length": length} for i, length in enumerate(LENGTHS)],
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    for name, rows_ in lines.items():
        (root / f"meta/{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows_))
    return root
