"""What `pi0 infer`, `pi0 evaluate`, `pi0 report` and `pi0 record` do; their dataclasses are their command lines."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro

from pi0_jax.evaluate.latency import STRATEGIES, Latency, describe, simulate, summary
from pi0_jax.evaluate.report import encode_mp4, write_report
from pi0_jax.evaluate.rollout import roll_out, table
from pi0_jax.evaluate.simulators.suites import get_suite
from pi0_jax.inference.files import format_chunk, load_observation, plot_chunk, save_observation
from pi0_jax.inference.policy import Policy

Run = Annotated[Path, tyro.conf.Positional]


@dataclasses.dataclass(frozen=True)
class Infer:
    """Runs a trained policy: on one observation from a file, or in closed loop in a simulator.

    On an observation it prints a chunk of actions in robot units and saves it with a plot. In a simulator it prints
    success by instruction with 95 % Wilson intervals and the latency, and saves a video.

    Examples:

        python infer.py runs/tabletop --write-example observation.npz

        python infer.py runs/tabletop --observation observation.npz

        python infer.py runs/tabletop --env tabletop --episodes 200 --seed 1 --num-steps 10
    """

    run: Run
    """Run folder, or the folder of one checkpoint in it."""
    observation: Path | None = None
    """An .npz with the arrays images/<camera>, state and prompt; or a .json that names pictures beside it."""
    env: str | None = None
    """Simulator to run in: tabletop; or tabletop_centre, which has other tasks."""
    write_example: Path | None = None
    """Write an observation of the right form (all zeros) to this .npz, to be filled in."""
    prompt: str | None = None
    """Instruction to give instead of the observation's."""
    episodes: int = 60
    """Episodes in the simulator."""
    seed: int = 0
    """Of the noise, and of the simulator's layouts."""
    num_steps: int | None = None
    """Solver steps from noise to actions; the checkpoint's own number by default."""
    solver: Literal["euler", "midpoint", "heun", "rk4", "ddim", "ddpm"] | None = None
    """Solver; the checkpoint's own by default. ddim and ddpm are for diffusion policies."""
    grid_power: float | None = None
    """Above 1, more of the solver's steps are near the data; the checkpoint's own by default."""
    guidance_scale: float | None = None
    """Classifier-free guidance, for policies trained with dropped conditions; 1 is none."""
    bits: Literal["int8", "fp8"] | None = None
    """Round the weights to eight bits; what that changes is logged. fp8 is quick on GPUs that multiply float8."""
    execute_steps: int | None = None
    """Actions of a chunk executed before the policy is asked again; the checkpoint's own number by default."""
    distract: bool = False
    """In the simulator: name another object than the one that is scored, to see whether the policy listens."""
    batch_size: int = 64
    """Episodes side by side in the simulator."""
    strategy: Literal["synchronous", "asynchronous", "ensemble", "guidance", "identity", "trained"] | None = None
    """In the simulator: how to act while the policy computes, in simulated time; the last three are real-time chunking.
    By default the simulator waits, and nothing is late."""
    latency: float = 0.0
    """With --strategy: milliseconds from an observation to its chunk."""
    jitter: float = 0.0
    """Milliseconds by which that is more or less."""
    drop: float = 0.0
    """Share of the answers that are lost, and asked for again after a second."""
    repeat: int = 20
    """On an observation: calls to measure the time of, after the one that compiles."""
    output: Path | None = None
    """Folder for what is saved; <run>/infer by default."""


@dataclasses.dataclass(frozen=True)
class Evaluate(Infer):
    """Runs a trained policy in closed loop in a simulator: the same as `pi0 infer RUN --env tabletop`.

    Example:

        pi0 evaluate runs/tabletop --episodes 200 --seed 1 --num-steps 10

        pi0 evaluate runs/tabletop --strategy guidance --latency 300 --jitter 100
    """

    env: str | None = "tabletop"
    """Simulator to run in: tabletop; or tabletop_centre, which has other tasks."""


@dataclasses.dataclass(frozen=True)
class Report:
    """Evaluates a run in closed loop and writes its report: one HTML file, with plots and videos inside."""

    run: Run
    """Run folder."""
    env: str = "tabletop"
    """Simulator to evaluate in."""
    episodes: int = 200
    """Episodes for each number of solver steps."""
    seed: int = 0
    """Of the evaluation layouts, which never overlap with those of demonstrations."""
    output: Path | None = None
    """HTML file to write; <run>/report.html by default."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Records demonstrations of the scripted expert in the tabletop simulator, as a LeRobot v3.0 dataset."""

    path: Run
    """Folder to create."""
    episodes: int = 1200
    """Demonstrations, the tasks in turn."""
    env: Literal["tabletop", "tabletop_centre"] = "tabletop"
    """tabletop: the six tasks. tabletop_centre: three new ones, to bring an object to the table's centre."""
    split: Literal["train", "validation"] = "train"
    """Layouts of the two never overlap, nor with those of evaluation."""
    seed: int = 0
    """Another seed gives other layouts of the split."""
    overwrite: bool = False
    """Replace an existing dataset."""


def infer(args: Infer) -> None:
    """Runs `pi0 infer`.

    Raises:
        FileNotFoundError, ValueError, OSError: what the user gave cannot be used; the message says how to go on.
    """
    asked = sum(x is not None for x in (args.observation, args.env, args.write_example))
    if asked != 1:
        raise ValueError(
            f"{asked} of three things to do were given; "
            "say what to run on: --observation FILE (one observation), --env tabletop (closed loop), or "
            "--write-example FILE (a template of an observation)."
        )
    suite = None if args.env is None else get_suite(args.env)
    if args.observation is not None and not args.observation.is_file():
        load_observation(args.observation)  # fails before the weights are read
    settings = ("num_steps", "solver", "grid_power", "guidance_scale", "execute_steps")
    changes: dict[str, Any] = {name: value for name in settings if (value := getattr(args, name)) is not None}
    if args.strategy is None and (args.latency or args.jitter or args.drop):
        raise ValueError("--latency, --jitter and --drop need a --strategy, which says what the robot does meanwhile.")
    if args.strategy is not None and (real_time := STRATEGIES[args.strategy][1]) is not None:
        changes["real_time"] = real_time
    policy = Policy.load(args.run, bits=args.bits, **changes)
    if args.write_example is not None:
        save_observation(args.write_example, policy.robot.example())
        print(f"wrote {args.write_example}; fill it in, then: pi0 infer {args.run} --observation {args.write_example}")
        return
    output = _folder(args.output or _run_folder(args.run) / "infer")
    if suite is not None and args.strategy is not None:
        _act_in_time(suite, policy, args)
        return
    if suite is not None:
        _infer_in(suite, policy, args, output)
        return
    assert args.observation is not None
    observation = load_observation(args.observation)
    if args.prompt is not None:
        observation["prompt"] = args.prompt
    if args.repeat < 1:
        raise ValueError(f"--repeat is {args.repeat}; it has to be at least 1.")
    policy.infer(observation, args.seed)  # compiles
    policy.forget_latency()
    for _ in range(args.repeat):
        actions = policy.infer(observation, args.seed)
    names = policy.robot.actions
    print(format_chunk(actions, names))
    np.savez(output / "actions.npz", actions=actions, names=np.array(names))
    plot_chunk(actions, names, output / "actions.png", str(observation["prompt"]))
    parts = policy.latency()
    total = ", ".join(f"{name} {value:.1f}" for name, value in parts.pop("total").items())
    print(f"ms a chunk, over {args.repeat} calls after compilation: {total}", end=" (median ")
    print(", ".join(f"{name} {values['p50']:.1f}" for name, values in parts.items()) + ")")
    print(f"saved {output / 'actions.npz'} and actions.png")


def evaluate(args: Evaluate) -> None:
    """Runs `pi0 evaluate`; errors as of `infer`."""
    infer(args)


def _infer_in(suite, policy: Policy, args: Infer, output: Path) -> None:
    film = range(min(len(suite.tasks), args.episodes))
    result = roll_out(
        policy,
        suite,
        args.episodes,
        args.seed,
        batch_size=args.batch_size,
        distract=args.distract,
        film=film,
        progress="closed loop",
    )
    print(table(result))
    video = output / f"{args.env}.mp4"
    pictures = [picture for i in film for picture in _held(result.outcomes[i].pictures, suite.fps)]
    video.write_bytes(encode_mp4(pictures, suite.fps))
    failed = Counter(outcome.task for outcome in result.outcomes if not outcome.success)
    if failed:
        print("failures:", ", ".join(f"{task} {count}" for task, count in failed.most_common()))
    print(f"device {jax.devices()[0].device_kind}; video of {len(film)} episodes: {video}")


def _act_in_time(suite, policy: Policy, args: Infer) -> None:
    assert args.strategy is not None
    latency = Latency(args.latency, args.jitter, args.drop)
    strategy = STRATEGIES[args.strategy][0](policy.config.execute_steps)
    traces = simulate(
        policy,
        suite,
        strategy,
        latency,
        args.episodes,
        args.seed,
        batch_size=args.batch_size,
        progress="simulated time",
    )
    print(describe(args.strategy, latency, summary(traces, suite.fps)))


def _held(pictures: tuple[np.ndarray, ...], fps: int) -> list[np.ndarray]:
    """Pictures of an episode, the last one for a moment longer."""
    return [*pictures, *[pictures[-1]] * fps]


def report(args: Report) -> None:
    """Runs `pi0 report`; errors as in `infer`."""
    suite = get_suite(args.env)
    policy = Policy.load(args.run)
    path = args.output or _run_folder(args.run) / "report.html"
    _folder(path.parent)
    figures = write_report(policy, _run_folder(args.run), suite, args.episodes, args.seed, path)
    print()
    for name, rate in figures["success"].items():
        span = f"[{rate['low']:.1%}, {rate['high']:.1%}]"
        print(f"{name:<18} {rate['successes']:>4} of {rate['episodes']:<4} {rate['rate']:>6.1%}   {span}")
    other = figures["success_when_told_another_object"]
    print(f"told to use another object: {other['rate']:.1%} of {other['episodes']}")
    by_steps = figures["success_by_steps"]
    print("by Euler steps: " + ", ".join(f"{steps}: {by_steps[steps]['rate']:.1%}" for steps in sorted(by_steps)))
    print(f"\nsuccess rate {figures['success']['all']['rate']:.1%}, report: {path}")


def record(args: Record) -> None:
    """Runs `pi0 record`; errors as in `infer`."""
    try:
        from pi0_jax.evaluate.simulators.tabletop.record import record as record_episodes
    except ImportError as error:
        raise ValueError("recording needs the simulator: pip install pi0_jax[sim]") from error
    summary = record_episodes(args.path, args.episodes, args.split, args.seed, overwrite=args.overwrite, env=args.env)
    print(f"{args.episodes} demonstrations, {summary['frames']} frames: {args.path}")


def _run_folder(path: Path) -> Path:
    """The run that a path belongs to, where it names one checkpoint of it."""
    return path.parents[1] if path.parent.name == "checkpoints" else path


def _folder(path: Path) -> Path:
    """Makes a folder; one clear error where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). Choose another folder with --output.") from error
    return path
