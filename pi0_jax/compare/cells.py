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
from pi0_jax.compare.behaviour import modes, reactions, recorded_modes
from pi0_jax.compare.config import CompareConfig
from pi0_jax.compare.learning import curve
from pi0_jax.config import Reflow, TrainConfig
from pi0_jax.config.replace import replace
from pi0_jax.data.robots import RawObservation, get_robot
from pi0_jax.evaluate.chunk_errors import HeldOut, held_out
from pi0_jax.evaluate.environments import open_simulator
from pi0_jax.evaluate.rollout import Rollout, roll_out
from pi0_jax.flow.straightness import straightness
from pi0_jax.inference.policy import Policy
from pi0_jax.sampler import Euler
from pi0_jax.sampler.solver import Solver
from pi0_jax.training.loop import run

BACKBONE = "backbone"
"""Name of the cell that is trained once, before all others."""
CELL = "cell.json"
BATCH = 64
"""Chunks per call: one size, so that there is little to compile."""
HORIZONS = (8, 16, 50)
CONTROL_STEPS = (1, 2, 4, 10)
STRAIGHTNESS_STEPS = 50


def folder(config: CompareConfig, seed: int, name: str) -> Path:
    """Where a cell's run and its figures are."""
    return Path(config.run_dir) / (name if name == BACKBONE else f"seed{seed}/{name}")


def cells(config: CompareConfig) -> list[tuple[int, str]]:
    """All cells, each after those it needs."""
    names = sorted(config.contenders, key=lambda name: config.contenders[name].teacher is not None)
    first = [] if config.backbone is None else [(config.seeds[0], BACKBONE)]
    return [*first, *((seed, name) for seed in config.seeds for name in names)]


def needs(config: CompareConfig, seed: int, name: str) -> list[tuple[int, str]]:
    """The cells that have to be done before."""
    if name == BACKBONE:
        return []
    teacher = config.contenders[name].teacher
    if teacher is not None:
        return [(seed, teacher)]
    return [] if config.backbone is None else [(config.seeds[0], BACKBONE)]


def is_done(config: CompareConfig, seed: int, name: str) -> bool:
    return (folder(config, seed, name) / CELL).is_file()


def training(config: CompareConfig, seed: int, name: str) -> TrainConfig:
    """How a cell is trained."""
    path = folder(config, seed, name)
    train = replace(config.train, {"run_dir": str(path), "seed": seed})
    if name == BACKBONE:
        return replace(train, {"policy.objective": config.backbone, "num_steps": config.backbone_steps})
    contender = config.contenders[name]
    train = replace(train, dict(contender.changes))
    if every := config.measure_every:
        train = dataclasses.replace(train, save_every=every, keep_every=every)
    objective, first = contender.objective, (None, ())
    if config.backbone is not None:
        first = str(folder(config, seed, BACKBONE)), config.backbone_subtrees
    if isinstance(objective, Reflow):
        first = str(folder(config, seed, objective.teacher)), ()
        objective = dataclasses.replace(objective, teacher=first[0])
    policy = dataclasses.replace(
        train.policy, model=contender.model, objective=objective, sampler=next(iter(contender.samplers.values()))
    )
    return dataclasses.replace(train, policy=policy, init_from=first[0], init_parts=first[1])


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
        `rows`, one for each sampler and number of network evaluations; `curve`, success while it learnt;
        `demonstrated`, the modes of the demonstrations;
        `delays`, one row for each way of acting and latency; `straightness` and `paths` of deterministic
        solvers; sizes, seconds and versions.
    """
    contender, path = config.contenders[name], folder(config, seed, name)
    simulator = open_simulator(config.env, dict(config.env_options))
    train = checkpoint.load_assets(path).train
    data = held_out(train, get_robot(simulator.robot))
    assert train is not None
    assert data is not None, "a comparison needs held-out demonstrations: data.validation_path"
    rows, paths, straight = [], {}, {}
    begin = time.monotonic()
    for label, sampler in contender.samplers.items():
        policy = Policy.load(path, sampler=sampler)
        for evaluations in contender.evaluations:
            # Action tokens are decoded in as many evaluations as they need.
            steps = evaluations if isinstance(sampler, Solver) else None
            rollout = roll_out(policy, simulator, config.episodes, 1000 + seed, num_steps=steps, batch_size=BATCH)
            figures = _figures(policy, rollout, data, steps) | modes(rollout, simulator.modes)
            rows.append({"sampler": label, "evaluations": evaluations, **figures})
        if isinstance(sampler, Solver) and not sampler.stochastic:
            keys = jax.random.split(jax.random.key(seed), BATCH)
            points = policy.paths(data.observations[:BATCH], keys, STRAIGHTNESS_STEPS)
            straight[label] = float(straightness(jnp.asarray(points)))
            paths[label] = _some_paths(policy, data)
    first, most = next(iter(contender.samplers.items())), max(contender.evaluations)
    how = first[1], most if isinstance(first[1], Solver) else None
    points = curve(config, path, how, simulator, 1000 + seed, BATCH)
    if config.measure_every:
        last = next(row for row in rows if (row["sampler"], row["evaluations"]) == (first[0], most))
        points.append({"step": train.num_steps, "successes": last["successes"], "episodes": last["episodes"]})
    return {
        "parameters": sum(x.size for x in jax.tree.leaves(checkpoint.restore_params(path))),
        "rows": rows,
        "curve": points,
        "demonstrated": recorded_modes(config.train.data.path, simulator.modes),
        "delays": reactions(config, contender, path, simulator, seed),
        "straightness": straight,
        "paths": paths,
        "measuring_seconds": time.monotonic() - begin,
        "device": str(jax.devices()[0].device_kind),
        "jax": jax.__version__,
    }


def _figures(policy: Policy, rollout: Rollout, data: HeldOut, steps: int | None) -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), len(data.observations))
    batches = [slice(i, i + BATCH) for i in range(0, len(keys), BATCH)]
    chunks = np.concatenate([policy.infer_batch(data.observations[rows], keys[rows], steps) for rows in batches])
    squares = np.where(data.valid[..., None], np.square(chunks - data.expert), 0.0)
    counted, some = data.valid.sum(1) * chunks.shape[-1], data.valid.any(1)
    each = np.sqrt(squares.sum((1, 2))[some] / counted[some])
    rates = rollout.rates()
    return {
        "successes": rates["all"].successes,
        "episodes": rates["all"].episodes,
        "by_task": {task: rate[:2] for task, rate in rates.items()},
        "error": float(np.sqrt(squares.sum() / counted.sum())),
        "error_floor": float(np.quantile(each, 0.1)),
        "jitter": jitter(rollout),
        "latency_ms": 1000 * latency(policy, data.observations[0], steps),
    }


def jitter(rollout: Rollout) -> float:
    """Mean squared third difference of the executed actions, over all episodes, in squared robot units."""
    thirds = [np.diff(outcome.actions, n=3, axis=0) for outcome in rollout.outcomes]
    values = np.concatenate([np.square(third).ravel() for third in thirds])
    return float(values.mean()) if values.size else float("nan")


def latency(policy: Policy, observation: RawObservation, num_steps: int | None, repeats: int = 15) -> float:
    """Median seconds from one raw observation to its chunk in host memory, after compilation."""
    seconds = []
    for number in range(repeats + 1):
        begin = time.perf_counter()
        policy.infer_batch([observation], jax.random.key(number)[None], num_steps)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds[1:]))


def control_latencies(config: CompareConfig) -> dict[str, dict[str, float]]:
    """Seconds per chunk by horizon and Euler steps, for the first flow's network widened to other horizons.

    The weights do not depend on the horizon, so those of one run serve for all.
    """
    flows = [n for n, c in config.contenders.items() if not c.objective.decodes]
    path = folder(config, config.seeds[0], flows[0])
    observation = open_simulator(config.env, dict(config.env_options)).start(0, 0).observe()
    table: dict[str, dict[str, float]] = {}
    model = checkpoint.load_assets(path).policy.model
    for horizon in HORIZONS:
        policy = Policy.load(path, sampler=Euler(), model=dataclasses.replace(model, action_horizon=horizon))
        table[str(horizon)] = {str(steps): latency(policy, observation, steps) for steps in CONTROL_STEPS}
    return table


def _some_paths(policy: Policy, data: HeldOut) -> list[list[float]]:
    """The way of one action's first coordinate from noise to data for one observation and many noises, model units."""
    observation = data.observations[len(data.observations) // 2]
    keys = jax.random.split(jax.random.key(7), BATCH)
    points = policy.paths([observation] * BATCH, keys, STRAIGHTNESS_STEPS)
    return np.round(points[:, :, 0, 0].T, 4).tolist()
