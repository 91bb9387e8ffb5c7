"""What datasets of any size cost before training: seconds, bytes written and memory, as commands that users run.

Run: nice python benchmarks/datasets.py --episodes 1000 10000 100000 --folder /tmp/made --real REAL

It makes LeRobot 3.0 datasets of episodes of 40 to 60 frames, 14 dimensions and one camera of 64 px, 200 episodes per
file: each data file has its own numbers; video files are links to one video, whose content does not matter here.
With --one-file-each they are LeRobot 2.1, with a data file and a video per episode. REAL are folders of real datasets
as `FOLDER:ROBOT`, with a built-in robot or a robot's file. For each these are run as processes of their own, with a
fresh cache folder:

    stats           pi0 data stats CONFIG
    first batch     opening, statistics and the first batch, as training does it, after imports
    first step      pi0 train CONFIG --num-steps 1, a small model, with imports and a checkpoint: the second of two
                    runs, whose programs are compiled

Each is a row of a table, and everything is printed as JSON: seconds, CPU seconds (user), the largest resident memory of
the process, and bytes written outside the run's folder. Files have been read before; made ones were written just now.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from pi0_jax.data.lerobot import LeRobotWriter, layout
from pi0_jax.data.video import VideoWriter

FPS, DIMS, SIZE = 20, 14, 64
PER_FILE = 200
"""Episodes in a data file, and in a video."""
LINKS = 2**15
"""Names that one video file gets."""
LENGTHS = 40 + np.arange(PER_FILE) % 21
FILES_PER_META = 50
CONFIG = """
from pi0_jax.config import *

expert = ExpertConfig(width=64, mlp_dim=128)
model = ModelConfig(
    vision=VisionConfig(width=64, depth=1, mlp_dim=128, num_heads=4, image_size=48, patch_size=12, position="sincos2d"),
    language=expert, action=expert, depth=2, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=512,
    action_dim=32, action_horizon={horizon}, prompt_length=24, dtype="float32", remat="none",
)
config = TrainConfig(
    policy=PolicyConfig(model=model, robot={robot!r}),
    data=DataConfig(path={path!r}, skip_bad_episodes={skip}), run_dir={run!r}, batch_size=32, num_steps=1,
    optim=OptimConfig(warmup_steps=0),
)
"""
ROBOT = """
from pi0_jax.data.robots import Robot

joints = tuple(f"joint_{{i}}" for i in range({dims}))
ROBOT = Robot("made", {{"observation.images.top": "base_0_rgb"}}, joints, joints, {fps}, ({size}, {size}),
              semantics=("{kind}",) * {dims})
"""
FIRST_BATCH = """
import sys, time
import pi0_jax.training.loop
from pi0_jax.config import TrainConfig
from pi0_jax.config_file import load_config
from pi0_jax.training.inputs import load_inputs
from pi0_jax.training.resolve import resolve

config = load_config(sys.argv[1], TrainConfig)
run = resolve(config)
begin, cpu = time.perf_counter(), time.process_time()
inputs = load_inputs(run)
next(inputs.loader)
print(time.perf_counter() - begin, time.process_time() - cpu)
"""


@dataclasses.dataclass(frozen=True)
class Args:
    episodes: tuple[int, ...] = (1000, 10_000)
    """Numbers of episodes of made datasets, multiples of 200."""
    folder: Path | None = None
    """Where made datasets are kept; None: in a temporary folder."""
    one_file_each: bool = False
    """Made datasets are LeRobot 2.1, with one data file and one video per episode, all of 40 frames."""
    relative: bool = False
    """Made robots' actions are relative to the state, whose statistics are of whole chunks."""
    horizon: int = 50
    """Actions per chunk."""
    real: tuple[str, ...] = ()
    """Real datasets, FOLDER:ROBOT, or FOLDER:ROBOT:skip to leave out episodes that cannot be read."""


def make_dataset(root: Path, episodes: int) -> None:
    """Writes a LeRobot 3.0 dataset, a multiple of `PER_FILE` episodes; see above."""
    random = np.random.default_rng(0)
    vector = {"dtype": "float32", "shape": (DIMS,), "names": [f"joint_{i}" for i in range(DIMS)]}
    features = {"observation.images.top": {"dtype": "video", "shape": (SIZE, SIZE, 3)}}
    scene = random.integers(0, 255, (8, 8, 3), np.uint8).repeat(SIZE // 8, 0).repeat(SIZE // 8, 1)
    with LeRobotWriter(
        root, FPS, "made", features | {"observation.state": vector, "action": vector}, pix_fmt="yuv420p", crf=23
    ) as writer:
        for length in LENGTHS.tolist():
            images = np.stack([np.roll(scene, i, 1) for i in range(length)])
            values = random.normal(size=(2, length, DIMS)).astype(np.float32)
            writer.add_episode(
                {"observation.images.top": images, "observation.state": values[0], "action": values[1]}, "move"
            )
    video = root / layout.VIDEO_PATH.format(video_key="observation.images.top", chunk_index=0, file_index=0)
    rows = pq.read_table(root / layout.DATA_PATH.format(chunk_index=0, file_index=0))
    meta = pq.read_table(next((root / "meta/episodes").glob("*/*.parquet")))
    metas = []
    for number in range(episodes // PER_FILE):
        where = {"chunk_index": number // layout.FILES_PER_CHUNK, "file_index": number % layout.FILES_PER_CHUNK}
        if number:
            target = root / layout.VIDEO_PATH.format(video_key="observation.images.top", **where)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(video, target)
            target = root / layout.DATA_PATH.format(**where)
            target.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(_numbered(rows, number, random), target)
        moved = _shifted(meta, "episode_index", PER_FILE * number)
        for name in ("dataset_from_index", "dataset_to_index"):
            moved = _shifted(moved, name, len(rows) * number)
        for key, value in where.items():
            for name in ("data", "videos/observation.images.top"):
                moved = _shifted(moved, f"{name}/{key}", value)
        metas.append(moved)
        if len(metas) == FILES_PER_META or number + 1 == episodes // PER_FILE:
            pq.write_table(
                pa.concat_tables(metas), root / f"meta/episodes/chunk-000/file-{number // FILES_PER_META:03d}.parquet"
            )
            metas = []
    info = json.loads((root / "meta/info.json").read_text())
    info |= {"total_episodes": episodes, "total_frames": episodes // PER_FILE * len(rows)}
    (root / "meta/info.json").write_text(json.dumps(info))


def make_dataset_v2(root: Path, episodes: int) -> None:
    """Writes a LeRobot 2.1 dataset with a data file and a video per episode, all of them as long as the first one of
    `make_dataset`."""
    random, length = np.random.default_rng(0), int(LENGTHS[0])
    with tempfile.TemporaryDirectory() as folder:
        make_dataset(made := Path(folder) / "made", PER_FILE)
        info = json.loads((made / "meta/info.json").read_text())
        rows = pq.read_table(next(made.glob("data/*/*.parquet"))).slice(0, length)
    templates = {
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
    }
    info |= templates | {"codebase_version": "v2.1", "total_episodes": episodes, "total_frames": episodes * length}
    (root / "meta").mkdir(parents=True)
    (root / "meta/info.json").write_text(json.dumps(info))
    (root / "meta/tasks.jsonl").write_text('{"task_index": 0, "task": "move"}\n')
    lines = [json.dumps({"episode_index": i, "tasks": ["move"], "length": length}) for i in range(episodes)]
    (root / "meta/episodes.jsonl").write_text("\n".join(lines))
    video = root / "videos/first.mp4"
    for number in range(episodes):
        where = {"episode_chunk": number // layout.FILES_PER_CHUNK, "episode_index": number}
        paths = [root / name.format(video_key="observation.images.top", **where) for name in templates.values()]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(_numbered(rows, number, random, 1), paths[0], compression="none", use_dictionary=False)
        if number % LINKS == 0:
            writer = VideoWriter(video := paths[1], (SIZE, SIZE), FPS, "yuv420p", 23)
            writer.write(random.integers(0, 255, (length, SIZE, SIZE, 3), np.uint8))
            writer.close()
        else:
            os.link(video, paths[1])


def _numbered(rows: pa.Table, number: int, random: np.random.Generator, per_file: int = PER_FILE) -> pa.Table:
    """Rows of a data file, with numbers of its own."""
    for name in ("observation.state", "action"):
        values = pa.array(random.standard_normal(len(rows) * DIMS, np.float32))
        column = pa.FixedSizeListArray.from_arrays(values, DIMS)
        rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), column)
    return _shifted(_shifted(rows, "episode_index", per_file * number), "index", len(rows) * number)


def _shifted(table: pa.Table, name: str, by: int) -> pa.Table:
    values = pa.array(table[name].to_numpy() + by)
    return table.set_column(table.column_names.index(name), table.schema.field(name), values)


def run(command: list[str], scratch: Path) -> dict[str, float | str]:
    """Runs a command with its own cache and temporary folders: seconds, memory in MB, bytes written there."""
    for name in ("cache", "tmp"):
        shutil.rmtree(scratch / name, ignore_errors=True)
        (scratch / name).mkdir()
    environment = os.environ | {"PI0_CACHE": str(scratch / "cache"), "TMPDIR": str(scratch / "tmp")}
    environment |= {"JAX_PLATFORMS": "cpu"}
    begin = time.perf_counter()
    with (scratch / "log").open("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=scratch)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        seconds = time.perf_counter() - begin
        log.seek(0)
        said = log.read().strip().splitlines()
    files = [path for name in ("cache", "tmp") for path in (scratch / name).rglob("*") if path.is_file()]
    found: dict[str, float | str] = {
        "seconds": round(seconds, 1),
        "cpu": round(usage.ru_utime, 1),
        "memory_mb": round(usage.ru_maxrss / 1e3),
        "bytes_written": sum(path.stat().st_blocks * 512 for path in files),
        "said": said[-1] if said else "",
    }
    return found | ({"error": "\n".join(said[-3:])} if process.returncode else {})


def measure(path: Path, robot: str, horizon: int, scratch: Path, skip: bool) -> dict[str, dict[str, float | str]]:
    """The three measurements of one dataset."""
    config = scratch / "config.py"
    config.write_text(CONFIG.format(horizon=horizon, robot=robot, path=str(path), run=str(scratch / "run"), skip=skip))
    pi0 = [sys.executable, "-m", "pi0_jax.cli"]
    found = {"stats": run([*pi0, "data", "stats", str(config)], scratch)}
    found["first batch"] = run([sys.executable, "-c", FIRST_BATCH, str(config)], scratch)
    if "error" not in found["first batch"]:
        wall, cpu = map(float, str(found["first batch"]["said"]).split())
        found["first batch"] |= {"seconds": round(wall, 1), "cpu": round(cpu, 1)}
    for _ in range(2):
        shutil.rmtree(scratch / "run", ignore_errors=True)
        found["first step"] = run([*pi0, "train", str(config), "--compilation-cache", str(scratch / "xla")], scratch)
    return found


def main(args: Args) -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        kept = args.folder or Path(scratch)
        robot = Path(scratch) / "robot.py"
        kind = "relative" if args.relative else "absolute"
        robot.write_text(ROBOT.format(dims=DIMS, fps=FPS, size=SIZE, kind=kind))
        prefix, make = ("v2-", make_dataset_v2) if args.one_file_each else ("", make_dataset)
        datasets = [(kept / f"made-{prefix}{count}", str(robot), count) for count in args.episodes]
        datasets += [(Path(each.split(":")[0]), each.split(":")[1], 0) for each in args.real]
        for path, robot_of_it, count in datasets:
            if count and not path.exists():
                make(path, count)
            figures[path.name] = measure(
                path.absolute(), robot_of_it, args.horizon, Path(scratch), f"{path}:{robot_of_it}:skip" in args.real
            )
            for what, row in figures[path.name].items():
                if "error" in row:
                    print(f"| {path.name} | {what} | refused: {row['error']} |")
                    continue
                columns = (f"{row[key]:,}" for key in ("seconds", "cpu", "memory_mb", "bytes_written"))
                print(f"| {path.name} | {what} | {' | '.join(columns)} |", flush=True)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
