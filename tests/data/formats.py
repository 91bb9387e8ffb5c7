"""The recorded test episodes in other formats: LeRobot 2.x by hand, pictures inside parquet, other codecs."""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

from pi0_jax.data.lerobot.layout import BOOKKEEPING
from tests.data.conftest import FEATURES, LENGTHS, TASKS, episode

CAMERAS = [name for name, feature in FEATURES.items() if feature["dtype"] == "video"]


def write_video(
    path: Path,
    images: np.ndarray,
    codec: str = "libx264",
    fps: int = 5,
    pix_fmt: str | None = None,
    times: Sequence[int] | None = None,
    **options,
) -> None:
    """A video file; `options` are the encoder's, `times` when frames are shown, in 1 / 90000 s: by `fps` without."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(fps))
        stream.height, stream.width = images.shape[1:3]
        stream.pix_fmt = pix_fmt or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
        stream.options = {key: str(value) for key, value in options.items()}
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 90000)
        for i, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24" if image.ndim == 3 else "gray16le")
            if times is not None:
                frame.pts, frame.time_base = times[i], Fraction(1, 90000)
            container.mux(stream.encode(frame))
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


RLDS_KEYS = {
    "observation.images.top": "observation/image_top",
    "observation.images.tool": "observation/image_tool",
    "observation.state": "observation/xyz + observation/command",
    "action": "action/xyz",
    "valid": "valid",
}
"""The robot's names → those in `write_rlds`."""


def write_rlds(root: Path, form: str = "tfrecord", shards: int = 2, episodes=range(5), blank=()) -> Path:
    """The test episodes as tensorflow-datasets lays them out, states and actions in parts, other camera names.

    Of the episodes `blank` the pictures of the camera "tool" are black; `has_image_tool` is 0 in them, and
    then `has_image_top` in all, though its pictures are there.
    """
    from tensorflow_datasets.core import features as f
    from tensorflow_datasets.proto import tf_example_pb2

    steps = {
        "observation": {
            "image_top": f.Image(shape=(48, 48, 3), encoding_format="png"),
            "image_tool": f.Image(shape=(48, 48, 3), encoding_format="png"),
            "xyz": f.Tensor(shape=(3,), dtype=np.float32),
            "command": f.Tensor(shape=(3,), dtype=np.float32),
        },
        "action": {"xyz": f.Tensor(shape=(3,), dtype=np.float32)},
        "valid": f.Scalar(dtype=np.float32),
        "is_last": f.Scalar(dtype=np.bool_),
        "language_instruction": f.Text(),
    }
    flags = ("has_image_top", "has_image_tool")
    metadata = {"file_path": f.Text(), "recording_folderpath": f.Text()} | {n: f.Scalar(dtype=np.bool_) for n in flags}
    features = f.FeaturesDict({"steps": f.Dataset(steps), "episode_metadata": metadata})
    root = root / "tiny" / "1.0.0"
    root.mkdir(parents=True)
    (root / "features.json").write_text(json.dumps(features.to_json()))
    split = {"name": "train", "shardLengths": [str(len(episodes[i::shards])) for i in range(shards)]}
    (root / "dataset_info.json").write_text(json.dumps({"name": "tiny", "fileFormat": form, "splits": [split]}))
    for shard in range(shards):
        records = []
        for number in episodes[shard::shards]:
            values = episode(number)
            if number in blank:
                values[CAMERAS[1]][:] = 0
            length = len(values["action"])
            columns = {
                "observation/image_top": [png(image) for image in values[CAMERAS[0]]],
                "observation/image_tool": [png(image) for image in values[CAMERAS[1]]],
                "observation/xyz": values["observation.state"][:, :3],
                "observation/command": values["observation.state"][:, 3:],
                "action/xyz": values["action"],
                "valid": values["valid"],
                "is_last": np.arange(length) == length - 1,
                "language_instruction": [TASKS[number % 5].encode()] * length,
            }
            example = tf_example_pb2.Example()
            for name, value in columns.items():
                feature = example.features.feature[f"steps/{name}"]
                if isinstance(value, list):
                    feature.bytes_list.value.extend(value)
                elif value.dtype == bool:
                    feature.int64_list.value.extend(value.astype(int).tolist())
                else:
                    feature.float_list.value.extend(value.ravel().tolist())
            path = f"/raw/{'success' if number % 2 == 0 else 'failure'}/{number}.h5"
            example.features.feature["episode_metadata/file_path"].bytes_list.value.append(path.encode())
            example.features.feature["episode_metadata/recording_folderpath"].bytes_list.value.append(b"/raw")
            for name, value in zip(flags, (not blank, number not in blank), strict=True):
                example.features.feature[f"episode_metadata/{name}"].int64_list.value.append(int(value))
            records.append(example.SerializeToString())
        name = root / f"tiny-train.{form}-{shard:05d}-of-{shards:05d}"
        write_records(name, records) if form == "tfrecord" else write_array_record(name, records)
    return root


def write_records(path: Path, records: list[bytes]) -> None:
    import google_crc32c

    def checked(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return content + struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)

    path.write_bytes(b"".join(checked(struct.pack("<Q", len(r))) + checked(r) for r in records))


def write_array_record(path: Path, records: list[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
