"""Invalid frames: no crash, no leak, and no wrong answer to others.

PI0_FUZZ_FRAMES=100000 python -m pytest -n 0 -s tests/serving/test_fuzz.py
"""

from __future__ import annotations

import asyncio
import os
import time
import urllib.request
from pathlib import Path

from tests.policies import TINY
from tests.serving.fake import command
from tests.serving.fuzz import drive

FRAMES = int(os.environ.get("PI0_FUZZ_FRAMES", "400"))


def memory(process) -> float:
    """MiB that a process holds."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


def connections(uri: str) -> float:
    """Clients connected, by the server's metrics."""
    with urllib.request.urlopen(uri.replace("ws", "http", 1) + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("pi0_connections "))


def test_invalid_frames_harm_nobody(checkpoint_folder, tmp_path):
    model = TINY.model
    flags = ("--real-time", "--batch-sizes", "2", "--log", "json")
    with command(checkpoint_folder, tmp_path / "log", *flags) as (uri, process):
        start, before, files = time.perf_counter(), memory(process), len(os.listdir(f"/proc/{process.pid}/fd"))
        counts = asyncio.run(drive(uri, FRAMES // 2, model.action_horizon, 3))
        halfway = memory(process)
        counts += asyncio.run(drive(uri, FRAMES - FRAMES // 2, model.action_horizon, 3, seed=1))
        after, seconds = memory(process), time.perf_counter() - start
        while connections(uri):
            time.sleep(0.05)
        time.sleep(0.1)
        left = len(os.listdir(f"/proc/{process.pid}/fd")) - files
    print(f"{FRAMES} frames in {seconds:.0f} s: {dict(counts)}; {before:.0f} → {halfway:.0f} → {after:.0f} MiB")
    log = (tmp_path / "log").read_text().splitlines()
    assert "failed" not in counts, [line for line in log if "traceback" in line][:3]
    assert set(counts) <= {"invalid", "answered", "reset", "bystander", "not even a connection", "not_finite"}
    assert counts["bystander"] > 5
    assert min(counts["invalid"], counts["answered"]) > FRAMES / 50
    assert left <= 1
    assert after - halfway < 150  # MiB; the allocator holds some hundred now and then, and gives them back
