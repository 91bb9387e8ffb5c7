"""Steps per second of a batched evaluation, against a loop of one environment: same policy, simulator and episodes.

    python benchmarks/evaluation.py runs/mine --env metaworld --env-options image_size=96 --episodes 20

The loop has one process with one environment and asks the policy for one chunk at a time; the batched evaluation is
that of `pi0 evaluate`. Compilation and the start of processes are left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from pathlib import Path
from typing import Annotated

import tyro

from pi0_jax.evaluate.environments import open_simulator
from pi0_jax.evaluate.rollout import roll_out
from pi0_jax.evaluate.simulator_flags import parse_options
from pi0_jax.evaluate.simulators.gym import Simulator
from pi0_jax.inference.policy import Policy


@dataclasses.dataclass(frozen=True)
class Args:
    run: Annotated[Path, tyro.conf.Positional]
    env: str
    env_options: tuple[str, ...] = ()
    env_python: Path | None = None
    episodes: int = 16
    batch_size: int | None = None


def measure(args: Args, policy: Policy, batch_size: int, processes: int | None) -> float:
    """Steps per second, after a warm-up of one episode per environment."""
    simulator = open_simulator(args.env, parse_options(args.env_options), args.env_python, processes)
    roll_out(policy, simulator, batch_size, 1, batch_size=batch_size)
    begun = time.perf_counter()
    found = roll_out(policy, simulator, args.episodes, 0, batch_size=batch_size)
    rate = sum(outcome.num_steps for outcome in found.outcomes) / (time.perf_counter() - begun)
    if not isinstance(simulator, Simulator):
        simulator.close()  # type: ignore[attr-defined]
    return rate


def main(args: Args) -> None:
    policy, cores = Policy.load(args.run), os.cpu_count() or 1
    loop = measure(args, policy, 1, 1)
    batch_size = args.batch_size or min(args.episodes, 4 * cores)
    batched = measure(args, policy, batch_size, None)
    figures = {"loop": loop, "batched": batched, "ratio": batched / loop, "batch_size": batch_size, "cores": cores}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Args))
