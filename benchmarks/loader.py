"""How fast batches come: from video and from the cache, with worker processes or threads alone, and 1 to 3 cameras.

Run: python benchmarks/loader.py --frames 600 --size 224 --lerobot-python PATH

It writes an H.264 dataset with a key frame at every second frame, measures PyAV's own ceiling on its first file (single
frames at random, as a loader needs them, in one thread of one process and of as many as there are cores), and the
loader's samples per second against it. PATH is the Python of an environment with LeRobot: its DataLoader then reads the
same folder in turn with ours, with worker processes alone. All are measured in turn `--rounds` times: rates are the
best of them, shares the medians, each within its round. Statistics are measured too, in frames per second and core.
Everything is printed as one JSON object.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import tyro
from av.video.reformatter import VideoReformatter
from sides import Side

from pi0_jax.config import DataConfig, ModelConfig, PolicyConfig, TrainConfig, VisionConfig
from pi0_jax.data.cache import build_cache
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.loader import make_loader
from pi0_jax.data.mixture import open_datasets
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import Source
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.tools.stats import compute_normalizations, summarise_source
from pi0_jax.data.transform import make_transform

FPS = 20
HORIZON = 50
"""Actions of a chunk."""


@dataclasses.dataclass(frozen=True)
class Args:
    frames: int = 600
    """Frames of the dataset, in episodes of 100."""
    size: int = 224
    """Side of the images, pixels."""
    cameras: tuple[int, ...] = (1, 2, 3)
    workers: tuple[int, ...] = (1, 2, 4)
    threads: tuple[int, ...] = (1, 2)
    """Threads of the training process, without worker processes."""
    batch_size: int = 32
    batches: int = 24
    """Batches timed, after the first ones of every worker."""
    rounds: int = 2
    """Times that everything is measured in turn."""
    lerobot_python: Path | None = None
    """Python of an environment with LeRobot's `dataset` extra; None: without LeRobot."""
    stats_frames: int = 1_000_000
    """Frames of 14 states and 14 actions for the statistics."""
    memory_batches: int = 0
    """Batches over which memory is measured, with one thread, from the cache and from video; 0: not."""


def write_dataset(root: Path, args: Args, cameras: int) -> None:
    features = {
        f"observation.images.c{i}": {"dtype": "video", "shape": (args.size,) * 2 + (3,)} for i in range(cameras)
    }
    vector = {"dtype": "float32", "shape": (14,)}
    random = np.random.default_rng(0)
    coarse = random.integers(0, 255, (4, 28, 28, 3), np.uint8)
    scenes = coarse.repeat(args.size // 28, 1).repeat(args.size // 28, 2)
    with LeRobotWriter(
        root, FPS, "bench", features | {"observation.state": vector, "action": vector}, pix_fmt="yuv420p", crf=23
    ) as writer:
        for episode in range(args.frames // 100):
            images = np.stack([np.roll(scenes[(episode + i // 50) % 4], 3 * i, 1) for i in range(100)])
            values = random.normal(size=(2, 100, 14)).astype(np.float32)
            frames = dict.fromkeys([name for name in features], images)
            writer.add_episode(frames | {"observation.state": values[0], "action": values[1]}, "move")


def ceiling(path: Path, frames: int) -> float:
    """Single frames a second at random places of one file: seek, decode, convert to RGB; nothing of ours."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_count = 1
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        reformatter = VideoReformatter()  # a new one for each frame would halve the speed
        order = np.random.default_rng(0).permutation(len(times))[:frames]
        begin = time.perf_counter()
        for i in order.tolist():
            container.seek(times[i], stream=stream)
            for frame in container.decode(stream):
                if frame.pts == times[i]:
                    reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray()
                    break
        return len(order) / (time.perf_counter() - begin)


def ceiling_together(path: Path, frames: int, processes: int) -> float:
    """The sum of `ceiling` over processes that run at the same time."""
    with multiprocessing.get_context("fork").Pool(processes) as pool:
        return sum(pool.starmap(ceiling, [(path, frames)] * processes, chunksize=1))


def config_for(root: Path, args: Args, cameras: int, cache: Path | None, workers: int, threads: int = 1) -> TrainConfig:
    model = ModelConfig(
        vision=VisionConfig(image_size=args.size),
        cameras=tuple(f"c{i}" for i in range(cameras)),
        vocab_size=512,
        action_horizon=HORIZON,
    )
    data = DataConfig(
        str(root), frames="random", cache=None if cache is None else str(cache), num_workers=workers,
        num_threads=threads, prefetch=2 * threads,
    )  # fmt: skip
    return TrainConfig(policy=PolicyConfig(model=model, robot=str(root.parent / "robot.py")), data=data,
                       batch_size=args.batch_size)  # fmt: skip


def loader_for(config: TrainConfig):
    datasets = open_datasets(config.data, config.policy)
    groups = compute_normalizations(datasets, config.policy.model.action_horizon)
    tokenizer = Tokenizer.train(["move"], 512)
    return make_loader(
        [(each, make_transform(config.policy, each.robot, groups[each.stats], tokenizer)) for each in datasets], config
    )


def samples_per_second(iterator, batch_size: int, warm: int, count: int) -> float:
    for _ in itertools.islice(iterator, warm):
        pass
    begin = time.perf_counter()
    for _ in itertools.islice(iterator, count):
        pass
    return count * batch_size / (time.perf_counter() - begin)


def ours(root: Path, args: Args, cameras: int, cache: Path | None, workers: int, threads: int) -> float:
    loader = loader_for(config_for(root, args, cameras, cache, workers, threads))
    try:
        return samples_per_second(loader, args.batch_size, 4 * max(workers, threads), args.batches)
    finally:
        loader.close()


class Memory(Source):
    """Columns in memory, for the statistics."""

    def __init__(self, frames: int, dims: int = 14):
        random = np.random.default_rng(0)
        self.numbers = {key: random.normal(size=(frames, dims)).astype(np.float32)
                       for key in ("observation.state", "action")}  # fmt: skip
        self.features = {key: {"dtype": "float32", "shape": (dims,)} for key in self.numbers}
        self.root, self.fps, self.tasks, self.skipped = Path("memory"), FPS, ["move"], {}
        self.ends = np.arange(500, frames + 1, 500)
        self.episodes = [str(i) for i in range(len(self.ends))]

    def read(self, name, episodes):
        return self.numbers[name][self.frames_of(episodes)]

    task_index = property(lambda self: np.zeros(self.num_frames, int))

    def images(self, camera, rows):
        raise AssertionError("statistics read no pictures")

    def picture_files(self, camera):
        return []


def statistics(args: Args) -> dict[str, float]:
    source, figures = Memory(args.stats_frames), {}
    robot = Robot("memory", {}, ("s",) * 14, ("a",) * 14, None, (8, 8))
    for name, semantics, horizon in (
        ("absolute", ("absolute",) * 14, 1),
        ("relative, 50 steps", ("relative",) * 14, 50),
    ):
        some = range(source.num_episodes if horizon == 1 else max(1, source.num_episodes // 20))
        begin = time.process_time()
        summarise_source(source, robot, semantics, horizon, some)
        figures[name] = round(500 * len(some) / (time.process_time() - begin))
    return figures


def memory_growth(root: Path, args: Args, cache: Path | None) -> dict[str, float]:
    """Resident memory in MB after a tenth of the batches, and at their end."""
    loader = loader_for(config_for(root, args, 1, cache, 0))
    marks = []
    for number, _ in enumerate(itertools.islice(loader, args.memory_batches), 1):
        if number in (args.memory_batches // 10, args.memory_batches):
            marks.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6)
    loader.close()
    return dict(zip(("early", "end"), marks, strict=True))


def compare(measures: dict[str, Callable[[], float]], shares: dict[str, tuple[str, str, float]], rounds: int) -> dict:
    """The best of `rounds` calls of each measure, in turn, and the median of each share.

    Args:
        measures: what gives a rate.
        shares: a measure, the one that it is compared to, and a factor of the first over the second.
        rounds: calls of each.
    """
    found = [{name: measure() for name, measure in measures.items()} for _ in range(rounds)]
    row = {name: round(max(one[name] for one in found), 1) for name in measures}
    for name, (over, under, factor) in shares.items():
        row[name] = round(float(np.median([factor * one[over] / one[under] for one in found])), 2)
    return row


def main(args: Args) -> None:
    cores = len(os.sched_getaffinity(0))
    figures: dict = {"cores": cores, **dataclasses.asdict(args), "lerobot_python": None}
    figures["lerobot_backend"] = None
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        lerobot = None
        if args.lerobot_python is not None:
            command = [str(args.lerobot_python), str(Path(__file__).with_name("lerobot_loader.py"))]
            lerobot = stack.enter_context(Side(command, HF_HUB_OFFLINE="1"))
            figures["lerobot_backend"] = lerobot()
        for cameras in args.cameras:
            root, cache = Path(folder) / f"{cameras}" / "data", Path(folder) / f"{cameras}" / "cache"
            write_dataset(root, args, cameras)
            names = {f"observation.images.c{i}": f"c{i}" for i in range(cameras)}
            joints = tuple(f"joint_{i}" for i in range(14))
            robot = f"Robot('bench', {names!r}, {joints!r}, {joints!r}, {FPS}, (8, 8))"
            (root.parent / "robot.py").write_text(f"from pi0_jax.data.robots import Robot\nROBOT = {robot}\n")
            video = next(root.glob("videos/*/*/*.mp4"))
            source = LeRobotDataset(root)
            nbytes = build_cache(source, cache, list(names), args.size, workers=1)
            row: dict = {"cache_bytes_a_frame": nbytes // (args.frames * cameras)}
            for workers, threads in [(count, 1) for count in args.workers] + [(0, count) for count in args.threads]:
                used = min(workers or threads, cores)
                measures: dict[str, Callable[[], float]] = {
                    "pyav": functools.partial(ceiling, video, args.frames),
                    "pyav_together": functools.partial(ceiling_together, video, args.frames, used),
                    "video": functools.partial(ours, root, args, cameras, None, workers, threads),
                    "cache": functools.partial(ours, root, args, cameras, cache, workers, threads),
                }
                shares = {
                    "video_over_pyav_times_workers": ("video", "pyav", cameras / used),
                    "video_over_pyav_together": ("video", "pyav_together", cameras),
                    "cache_over_video": ("cache", "video", 1.0),
                }
                if lerobot is not None and workers:
                    measures["lerobot"] = functools.partial(
                        lerobot, root=str(root), fps=FPS, workers=workers, batch_size=args.batch_size, horizon=HORIZON,
                        warm=4 * workers, batches=args.batches,
                    )  # fmt: skip
                    shares |= {f"{kind}_over_lerobot": (kind, "lerobot", 1.0) for kind in ("video", "cache")}
                name = f"{workers} workers" if workers else f"{threads} threads"
                row[name] = compare(measures, shares, args.rounds)
                print(cameras, "cameras", name, row[name], file=sys.stderr)
            figures[f"{cameras} cameras"] = row
            if args.memory_batches and cameras == args.cameras[0]:
                kinds = {"cache": cache, "video": None}
                figures["resident_mb"] = {name: memory_growth(root, args, kind) for name, kind in kinds.items()}
    figures["statistics_frames_per_second_and_core"] = statistics(args)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main(tyro.cli(Args))
