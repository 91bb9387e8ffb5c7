"""The policy server under load, and in closed loop with openpi's own client. The server is `pi0 serve` in a process.

    python benchmarks/serving.py load runs/tabletop --clients 64 --seconds 300
    python benchmarks/serving.py closed-loop runs/tabletop --episodes 200      # pip install --no-deps openpi-client

`load` has many clients send requests at once, as fast as they get answers or at a rate, and compares each answer with
the one that a single client got. `closed-loop` runs the tabletop over the network and in this process, with the same
layouts and noise, and compares episode by episode. Both print JSON.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import json
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import jax
import numpy as np
import tyro
from websockets.asyncio.client import connect

from pi0_client.client import Client
from pi0_client.msgpack_numpy import pack, unpack
from pi0_jax.evaluate.rollout import roll_out
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.inference.policy import Policy

Run = Annotated[Path, tyro.conf.Positional]
NUM_REQUESTS = 50
"""Different observations, each with a seed of its own."""


@dataclasses.dataclass(frozen=True)
class Load:
    """Many clients at once."""

    run: Run
    clients: int = 64
    seconds: float = 300.0
    rate: float = 0.0
    """Requests per client and second; 0: the next as soon as the last is answered."""
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8)


@dataclasses.dataclass(frozen=True)
class ClosedLoop:
    """The tabletop over the network and in this process."""

    run: Run
    episodes: int = 200
    seed: int = 1
    clients: int = 8


@contextlib.contextmanager
def served(run: Path, *flags: str) -> Iterator[tuple[str, int]]:
    """The address and the process id of `pi0 serve`."""
    command = [sys.executable, "-m", "pi0_jax.cli", "serve", str(run), "--port", "0", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("ready: "):
            raise SystemExit(f"the server did not start; try: pi0 serve {run}")
        try:
            yield line.split()[1], process.pid
        finally:
            process.terminate()


def load(args: Load) -> dict[str, Any]:
    """Latencies, memory and agreement."""
    flags = ["--batch-sizes", *map(str, args.batch_sizes)]
    with served(args.run, *flags) as (uri, pid):
        frames = request_frames(uri)
        with Client(uri) as client:
            solo = [unpack(client._request(frame))["actions"] for frame in frames]
        before, start = counters(uri), time.perf_counter()
        seconds, worst, memory = asyncio.run(_send_all(uri, frames, solo, args, pid))
        elapsed, after = time.perf_counter() - start, counters(uri)
    p50, p95, p99 = np.percentile(1000 * np.array(seconds), [50, 95, 99])
    grown = {name: after[name] - before.get(name, 0) for name in after}
    return {
        "clients": args.clients,
        "rate": args.rate,
        "seconds": round(elapsed, 1),
        "answers": len(seconds),
        "answers_per_second": round(len(seconds) / elapsed, 1),
        "p50_ms": round(p50, 1),
        "p95_ms": round(p95, 1),
        "p99_ms": round(p99, 1),
        "max_ms": round(1000 * max(seconds), 1),
        "mean_batch": round(grown["pi0_batch_size_sum"] / grown["pi0_batch_size_count"], 2),
        "largest_difference_from_solo": float(worst),
        "outcomes": {n.split('"')[1]: int(v) for n, v in grown.items() if n.startswith("pi0_requests_total{") and v},
        "memory_mib": [round(m, 1) for m in memory],
    }


def request_frames(uri: str) -> list[bytes]:
    """Frames with observations of the served robot, of random pixels and states."""
    with Client(uri) as client:
        metadata = client.metadata
    rng, size = np.random.default_rng(0), metadata["image_size"]
    frames = []
    for seed in range(NUM_REQUESTS):
        images = {camera: rng.integers(0, 256, (size, size, 3), np.uint8) for camera in metadata["cameras"]}
        state = rng.normal(size=len(metadata["state"])).astype(np.float32) / 10
        frames.append(pack({"images": images, "state": state, "prompt": "do the task", "seed": seed}))
    return frames


async def _send_all(uri: str, frames: list[bytes], solo: list[np.ndarray], args: Load, pid: int):
    """Seconds of each answer, the largest difference from a solo answer, and the server's memory now and then."""
    end = time.perf_counter() + args.seconds
    seconds: list[float] = []
    worst, memory = 0.0, [resident(pid)]

    async def send(n: int) -> None:
        nonlocal worst
        rng = np.random.default_rng(n)
        await asyncio.sleep(rng.random() / (args.rate or 10))
        async with connect(uri, compression=None, max_size=None) as connection:
            await connection.recv()
            while (start := time.perf_counter()) < end:
                i = int(rng.integers(len(frames)))
                await connection.send(frames[i])
                answer = await connection.recv()
                seconds.append(time.perf_counter() - start)
                if isinstance(answer, str):
                    raise RuntimeError(answer)
                worst = max(worst, float(np.abs(unpack(answer)["actions"] - solo[i]).max()))
                if args.rate:
                    await asyncio.sleep(max(0.0, start + 1 / args.rate - time.perf_counter()))

    async def watch() -> None:
        while time.perf_counter() < end:
            await asyncio.sleep(max(args.seconds / 10, 1.0))
            memory.append(resident(pid))

    await asyncio.gather(watch(), *(send(n) for n in range(args.clients)))
    return seconds, worst, memory


def counters(uri: str) -> dict[str, float]:
    """The server's metrics by name."""
    with urllib.request.urlopen(uri.replace("ws", "http", 1) + "/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line[0] != "#")}


def resident(pid: int) -> float:
    """Resident memory of a process, MiB (Linux)."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


class Remote:
    """Stands in for a policy whose chunks come from a server, through one of openpi's clients per observation."""

    def __init__(self, policy: Policy, clients: list[Any]):
        self.robot, self.config = policy.robot, policy.config
        self._clients = clients
        self._threads = concurrent.futures.ThreadPoolExecutor(len(clients))

    def infer_batch(self, observations, keys, num_steps=None):
        """Chunks with the noise of these keys."""
        words = np.asarray(jax.random.key_data(keys))
        requests = [observation | {"seed": seed} for observation, seed in zip(observations, words, strict=True)]
        answers = self._threads.map(lambda client, request: client.infer(request), self._clients, requests)
        return np.stack([answer["actions"] for answer in answers])


def closed_loop(args: ClosedLoop) -> dict[str, Any]:
    """Success over the network and in this process, with the same layouts and the same noise."""
    try:
        from openpi_client.websocket_client_policy import WebsocketClientPolicy
    except ImportError as error:
        raise SystemExit(
            "pip install --no-deps openpi-client==0.1.2 (it asks for an older numpy than works)"
        ) from error
    policy, simulator = Policy.load(args.run), get_simulator("tabletop")
    with served(args.run) as (uri, _):
        remote = Remote(policy, [WebsocketClientPolicy(uri) for _ in range(args.clients)])
        over, alone = (
            roll_out(each, simulator, args.episodes, args.seed, batch_size=args.clients, progress=name)
            for each, name in ((remote, "over the network"), (policy, "in this process"))
        )
    pairs = list(zip(over.outcomes, alone.outcomes, strict=True))
    same = [a for a, b in pairs if a.actions.shape == b.actions.shape and np.allclose(a.actions, b.actions, atol=1e-4)]
    return {
        "episodes": args.episodes,
        "over_the_network": str(over.rates()["all"]),
        "in_this_process": str(alone.rates()["all"]),
        "episodes_of_the_same_outcome": sum(a.success == b.success for a, b in pairs),
        "episodes_of_the_same_actions": len(same),
        f"ms_for_{args.clients}_chunks_over_the_network": round(1000 * float(np.median(over.seconds)), 1),
        f"ms_for_{args.clients}_chunks_in_this_process": round(1000 * float(np.median(alone.seconds)), 1),
    }


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server ends too
    args = tyro.extras.subcommand_cli_from_dict({"load": Load, "closed-loop": ClosedLoop})
    print(json.dumps(load(args) if isinstance(args, Load) else closed_loop(args), indent=1))
