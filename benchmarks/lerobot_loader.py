"""LeRobot's own DataLoader for `benchmarks/loader.py`, run by the Python of an environment that has LeRobot.

It answers `{}` by the name of the video decoder, and the arguments below by the samples per second. The order is random
and endless, so that no epoch ends; pictures are uint8, as in LeRobot's training, and its default decoder makes them
(torchcodec where it can be loaded, else PyAV).
"""

import itertools
import time

import torch  # pyright: ignore[reportMissingImports]
from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]
from lerobot.utils.import_utils import get_safe_default_video_backend  # pyright: ignore[reportMissingImports]
from sides import answer


def samples_per_second(
    root: str, fps: int, workers: int, batch_size: int, horizon: int, warm: int, batches: int
) -> float:
    deltas = {"action": [step / fps for step in range(horizon)]}
    dataset = LeRobotDataset("bench/bench", root=root, delta_timestamps=deltas, return_uint8=True)
    order = torch.utils.data.RandomSampler(dataset, replacement=True, num_samples=10**6)
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size, sampler=order, num_workers=workers))
    for _ in itertools.islice(loader, warm):
        pass
    begin = time.perf_counter()
    for _ in itertools.islice(loader, batches):
        pass
    return batches * batch_size / (time.perf_counter() - begin)


answer(lambda request: samples_per_second(**request) if request else get_safe_default_video_backend())
