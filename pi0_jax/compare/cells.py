"""One cell of a comparison: a contender trained with one seed, and what is measured of it."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax import checkpoint
from pi0_jax.atomic import written
from pi0_jax.compare.config import CompareConfig
from pi0_jax.config import PolicyConfig, TrainConfig
from pi0_jax.evaluate.chunk_errors import HeldOut, held_out
from pi0_jax.evaluate.rollout import Rollout, roll_out
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.flow.straightness import straightness
from pi0_jax.inference.policy import Policy
from pi0_jax.training.loop import run

BACKBONE = "backbone"
"""Name of the cell that is trained once, before all others."""
CELL = "cell.json"
BATCH = 64
"""Chunks a call: one size, so that there is little to compile."""
HORIZONS = (8, 16, 50)
CONTROL_STEPS = (1, 2, 4, 10)
STRAIGHTNESS_STEPS = 50


def folder(config: CompareConfig, seed: int, name: str) -> Path:
    """Where a cell's run and its figures are."""
    return Path(config.run_dir) / (name if name == BACKBONE else f"seed{seed}/{name}")


def cells(config: CompareConfig) -> list[tuple[int, str]]:
    """All cells, each after those it needs."""
    names = sorted(config.contenders, key=lambda name: config.contenders[name].teacher is not None)
    return [(config.seeds[0], BACKBONE), *((seed, name) for seed in config.seeds for name in names)]


def needs(config: CompareConfig, seed: int, name: str) -> list[tuple[int, str]]:
    """The cells that have to be done before."""
    if name == BACKBONE:
        return []
    teacher = config.contenders[name].teacher
    return [(config.seeds[0], BACKBONE) if teacher is None else (seed, teacher)]


def is_done(config: CompareConfig, seed: int, name: str) -> bool:
    return (folder(config, seed, name) / CELL).is_file()


def training(config: CompareConfig, seed: int, name: str) -> TrainConfig:
    """How a cell is trained."""
    path = folder(config, seed, name)
    train = dataclasses.replace(config.train, run_dir=str(path), seed=seed)
    if name == BACKBONE:
        return dataclasses.replace(train, flow=config.backbone, num_steps=config.backbone_steps)
    contender = config.contenders[name]
    policy = dataclasses.replace(train.policy, model=contender.model, solver=_solver(contender.solvers[0]))
    train = dataclasses.replace(train, policy=policy, flow=contender.flow)
    if contender.teacher is not None:
        teacher = str(folder(config, seed, contender.teacher))
        return dataclasses.replace(train, init_from=teacher, reflow_from=teacher)
    backbone = str(folder(config, seed, BACKBONE))
    return dataclasses.replace(train, init_from=backbone, init_parts=config.backbone_subtrees)


def run_cell(config: CompareConfig, seed: int, name: str) -> None:
    """Trains and measures one cell, or what is left of it to do, and writes its `cell.json` when all is done."""
    # Cells of one contender and several seeds are the same programs.
    jax.config.update("jax_compilation_cache_dir", str(Path(config.run_dir, "xla").absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    path = folder(config, seed, name)
    train = training(config, seed, name)
    started = checkpoint.latest_step(path) if path.is_dir() else None
    if path.is_dir() and started is None:
        shutil.rmtree(path)
    begin = time.monotonic()
    if started != train.num_steps:
        run(dataclasses.replace(train, resume=started is not None))
    figures: dict[str, Any] = {"name": name, "seed": seed, "training_seconds": time.monotonic() - begin}
    if name != BACKBONE:
        figures |= measure(config, seed, name)
    with written(path / CELL) as file:
        file.write_text(json.dumps(figures, indent=1) + "\n")


def measure(config: CompareConfig, seed: int, name: str) -> dict[str, Any]:
    """Closed loop, held-out error, jitter, latency, and the paths from noise to actions.

    Returns:
        `rows`, one for each solver and number of network evaluations; `straightness` and `paths` of flows and
        diffusions, by solver; sizes, seconds and versions.
    """
    contender, path = config.contenders[name], folder(config, seed, name)
    data = held_out(checkpoint.load_assets(path).train, Policy.load(path).robot)
    assert data is not None, "a comparison needs held-out demonstrations: data.validation_path"
    rows, paths, straight = [], {}, {}
    for solver in contender.solvers:
        policy = Policy.load(path, solver=_solver(solver))
        for evaluations in contender.evaluations:
            rows.append({"sampler": solver, **_measure_one(policy, config, data, seed, evaluations)})
        if contender.model.prediction not in ("bins", "bin_sequence") and solver != "ddpm":
            keys = jax.random.split(jax.random.key(seed), BATCH)
            points = policy.paths(data.observations[:BATCH], keys, STRAIGHTNESS_STEPS)
            straight[solver] = float(straightness(jnp.asarray(points)))
            paths[solver] = _some_paths(policy, data)
    parameters = sum(x.size for x in jax.tree.leaves(checkpoint.restore_params(path)))
    rows_seconds = sum(row.pop("seconds") for row in rows)
    return {
        "prediction": contender.model.prediction,
        "head": contender.model.head,
        "parameters": parameters,
        "rows": rows,
        "straightness": straight,
        "paths": paths,
        "measuring_seconds": rows_seconds,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }


def _measure_one(policy: Policy, config: CompareConfig, data: HeldOut, seed: int, evaluations: int) -> dict[str, Any]:
    begin = time.monotonic()
    # Discretised actions are decoded in as many evaluations as they need, whatever the number of steps.
    steps = 1 if policy.config.model.prediction in ("bins", "bin_sequence") else evaluations
    simulator = get_simulator(config.env)
    rollout = roll_out(policy, simulator, config.episodes, seed=1000 + seed, num_steps=steps, batch_size=BATCH)
    keys = jax.random.split(jax.random.key(0), len(data.observations))
    error = np.concatenate(
        [
            policy.infer_batch(data.observations[i : i + BATCH], keys[i : i + BATCH], steps)
            for i in range(0, len(keys), BATCH)
        ]
    )
    error -= data.expert
    squares = np.where(data.valid[..., None], np.square(error), 0.0)
    counted = np.maximum(data.valid.sum(1), 1) * error.shape[-1]
    each = np.sqrt(squares.sum((1, 2)) / counted)[data.valid.any(1)]
    rates = rollout.rates()
    return {
        "evaluations": evaluations,
        "successes": rates["all"][0],
        "episodes": rates["all"][1],
        "by_task": rates,
        "error": float(np.sqrt(squares.sum() / counted[data.valid.any(1)].sum())),
        "error_floor": float(np.quantile(each, 0.1)),
        "jitter": jitter(rollout),
        "latency_ms": 1000 * latency(policy, data.observations[0], steps),
        "seconds": time.monotonic() - begin,
    }


def jitter(rollout: Rollout) -> float:
    """Mean squared third difference of the executed actions, over all episodes, in squared robot units."""
    thirds = [np.diff(outcome.actions, n=3, axis=0) for outcome in rollout.outcomes]
    values = np.concatenate([np.square(third).ravel() for third in thirds])
    return float(values.mean()) if values.size else float("nan")


def latency(policy: Policy, observation: dict[str, Any], num_steps: int, repeats: int = 15) -> float:
    """Median seconds from one raw observation to its chunk in host memory, after compilation."""
    seconds = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        policy.infer_batch([observation], jax.random.split(jax.random.key(number), 1), num_steps)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def control_latencies(config: CompareConfig) -> dict[str, dict[str, float]]:
    """Seconds per chunk by horizon and Euler steps, for the first flow's network widened to other horizons.

    The weights do not depend on the horizon, so those of one run serve for all.
    """
    first = next(name for name, contender in config.contenders.items() if contender.model.prediction == "velocity")
    run = folder(config, config.seeds[0], first)
    observation = get_simulator(config.env).start(0, 0).observe()
    table: dict[str, dict[str, float]] = {}
    assets = checkpoint.load_assets(run)
    for horizon in HORIZONS:
        policy = Policy.load(run, model=dataclasses.replace(assets.policy.model, action_horizon=horizon))
        table[str(horizon)] = {str(steps): latency(policy, observation, steps) for steps in CONTROL_STEPS}
    return table


def _some_paths(policy: Policy, data: HeldOut, count: int = BATCH) -> list[list[float]]:
    """The way of one action's first coordinate from noise to data for one observation and many noises, model units."""
    observation = data.observations[len(data.observations) // 2]
    keys = jax.random.split(jax.random.key(7), count)
    points = policy.paths([observation] * count, keys, STRAIGHTNESS_STEPS)
    return np.round(points[:, :, 0, 0].T, 4).tolist()


def _solver(name: str) -> Any:
    """A solver for the configuration; discretised actions have none."""
    return PolicyConfig.solver if name == "argmax" else name
