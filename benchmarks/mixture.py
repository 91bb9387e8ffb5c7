"""Splits a LeRobot dataset of the tabletop into a mixture: half as LeRobot, half as RLDS under other names.

Run: python benchmarks/mixture.py data/tabletop data/tabletop-halves

It writes `lerobot/`, the first half of the episodes as they are; `rlds/1.0.0/`, the others as tensorflow-datasets
would lay them out in tfrecord shards, cameras of other names, the state in two parts, pictures as PNG; and `robot.py`,
which describes the robot of the second half. `configs/tabletop_mixture.py` trains on both: its success beside that of
`configs/tabletop.py` on the whole says what the mixture costs.
"""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import Annotated

import google_crc32c
import numpy as np
import PIL.Image
import tyro
from tensorflow_datasets.core import features as f
from tensorflow_datasets.proto import tf_example_pb2
from tqdm import tqdm

from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.lerobot.layout import BOOKKEEPING

CAMERAS = {"observation.images.top": "observation/view_above", "observation.images.tool": "observation/view_ring"}
ROBOT = '''"""The tabletop as its RLDS copy names it."""

import dataclasses

from pi0_jax.data.robots.tabletop import ROBOT as TABLETOP

ROBOT = dataclasses.replace(
    TABLETOP,
    name="tabletop_rlds",
    cameras={"observation/view_above": "top", "observation/view_ring": "tool"},
)
'''


def write_lerobot(source: LeRobotDataset, root: Path, episodes: range) -> None:
    """Some episodes as a LeRobot dataset."""
    features = {name: feature for name, feature in source.features.items() if name not in BOOKKEEPING}
    with LeRobotWriter(root, int(source.fps), "tabletop", features) as writer:
        for episode in tqdm(episodes, desc=root.name, unit="episode"):
            rows = np.arange(*source.episode_range(episode))
            frames = {
                name: source.images(name, rows) if name in CAMERAS else source.columns(name)[rows] for name in features
            }
            writer.add_episode(frames, source.task(int(rows[0])))


def write_rlds(source: LeRobotDataset, root: Path, episodes: range, shards: int) -> None:
    """Some episodes as an RLDS dataset, `root/1.0.0`."""
    height, width, _ = source.features["observation.images.top"]["shape"]
    picture = f.Image(shape=(height, width, 3), encoding_format="png")
    steps = {
        "observation": {
            "view_above": picture,
            "view_ring": picture,
            "ring": f.Tensor(shape=(3,), dtype=np.float32),
            "command": f.Tensor(shape=(3,), dtype=np.float32),
        },
        "action": f.Tensor(shape=(3,), dtype=np.float32),
        "valid": f.Tensor(shape=(1,), dtype=np.float32),
        "language_instruction": f.Text(),
    }
    root = root / "1.0.0"
    root.mkdir(parents=True)
    features = f.FeaturesDict({"steps": f.Dataset(steps)})
    (root / "features.json").write_text(json.dumps(features.to_json()))
    split = {"name": "train", "shardLengths": [str(len(episodes[i::shards])) for i in range(shards)]}
    info = {"name": "tabletop", "fileFormat": "tfrecord", "splits": [split]}
    (root / "dataset_info.json").write_text(json.dumps(info))
    for shard in tqdm(range(shards), desc="rlds", unit="shard"):
        with (root / f"tabletop-train.tfrecord-{shard:05d}-of-{shards:05d}").open("wb") as file:
            for episode in episodes[shard::shards]:
                record = example(source, np.arange(*source.episode_range(episode)))
                file.write(checked(struct.pack("<Q", len(record))) + checked(record))


def example(source: LeRobotDataset, rows: np.ndarray) -> bytes:
    """One episode as a serialised tf.train.Example."""
    state = source.columns("observation.state")[rows]
    numbers = {"observation/ring": state[:, :3], "observation/command": state[:, 3:]}
    numbers |= {name: source.columns(name)[rows] for name in ("action", "valid")}
    texts = {"language_instruction": [source.task(i).encode() for i in rows.tolist()]}
    texts |= {name: [png(image) for image in source.images(camera, rows)] for camera, name in CAMERAS.items()}
    result = tf_example_pb2.Example()
    for name, values in numbers.items():
        result.features.feature[f"steps/{name}"].float_list.value.extend(values.ravel().tolist())
    for name, values in texts.items():
        result.features.feature[f"steps/{name}"].bytes_list.value.extend(values)
    return result.SerializeToString()


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def checked(content: bytes) -> bytes:
    """The content and its masked checksum, as tfrecord files store both lengths and records."""
    crc = google_crc32c.value(content)
    return content + struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def main(
    source: Annotated[Path, tyro.conf.Positional], output: Annotated[Path, tyro.conf.Positional], shards: int = 8
) -> None:
    """Splits the LeRobot dataset `source` into the two halves in `output`."""
    dataset = LeRobotDataset(source)
    half = dataset.num_episodes // 2
    write_lerobot(dataset, output / "lerobot", range(half))
    write_rlds(dataset, output / "rlds", range(half, dataset.num_episodes), shards)
    (output / "robot.py").write_text(ROBOT)


if __name__ == "__main__":
    tyro.cli(main)
