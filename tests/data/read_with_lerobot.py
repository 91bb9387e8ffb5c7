"""Reads LeRobot datasets with LeRobot itself, in whose Python it runs: read_with_lerobot.py HORIZON ROOT OUTPUT ...

Each OUTPUT is an .npz with every column of the whole dataset at ROOT, one row a frame, as LeRobot's own class gives
them: action chunks of HORIZON steps, pictures as uint8 [n h w 3], decoded by both of LeRobot's video backends.
"""

import sys

import numpy as np
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]


def read(root: str, horizon: int, backend: str | None) -> dict[str, np.ndarray]:
    plain = LeRobotDataset("owner/name", root=root)
    deltas = {"action": [step / plain.meta.fps for step in range(horizon)]}
    dataset = LeRobotDataset("owner/name", root=root, delta_timestamps=deltas, video_backend=backend, return_uint8=True)
    rows = [dataset[i] for i in range(len(dataset))]
    columns = {}
    for name in rows[0]:
        values = np.stack([np.asarray(row[name]) for row in rows])
        columns[name] = np.moveaxis(values, 1, -1) if name in dataset.meta.camera_keys else values
    return columns


horizon, *paths = sys.argv[1:]
for root, output in zip(paths[::2], paths[1::2], strict=True):
    columns = read(root, int(horizon), "pyav")
    default = read(root, int(horizon), None)  # torchcodec, where it can be loaded
    columns |= {f"default/{name}": values for name, values in default.items() if values.dtype == np.uint8}
    np.savez(output, allow_pickle=False, **columns)
