"""What `pi0 infer`, `pi0 evaluate`, `pi0 report` and `pi0 record` do; their dataclasses are their command lines."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import jax
import numpy as np
import tyro

from pi0_jax.checkpoint import load_assets, resolve, run_folder
from pi0_jax.compilation import keep_programs
from pi0_jax.config_file import parse
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.data.robots import RawObservation, Robot
from pi0_jax.errors import UserError, require_package
from pi0_jax.evaluate.demonstrate import Noise
from pi0_jax.evaluate.environments import install, open_simulator
from pi0_jax.evaluate.latency import STRATEGIES, Latency, describe, simulate, summary
from pi0_jax.evaluate.outcomes import OutcomeFile
from pi0_jax.evaluate.page import encode_mp4, hold_last
from pi0_jax.evaluate.record import Rollouts, Source, record_questions
from pi0_jax.evaluate.record import record as record_demonstrations
from pi0_jax.evaluate.report import write_report
from pi0_jax.evaluate.rollout import Outcome, Rate, roll_out
from pi0_jax.evaluate.simulator_flags import Run, SimulatorFlags, parse_options, with_simulator
from pi0_jax.evaluate.simulators import has_option
from pi0_jax.evaluate.simulators.gym import Episodes, Simulator
from pi0_jax.inference.files import format_chunk, load_observation, plot_chunk, save_observation
from pi0_jax.inference.policy import Policy


@dataclasses.dataclass(frozen=True)
class Infer(SimulatorFlags):
    """Runs a trained policy: on one observation from a file, or in closed loop in a simulator.

    On an observation it prints a chunk of actions in robot units and saves it with a plot. In a simulator it prints
    success by task with 95 % Wilson intervals and the latency, and saves each episode's outcome and videos.

    Examples:

        python infer.py runs/tabletop --write-example observation.npz

        python infer.py runs/tabletop --observation observation.npz

        python infer.py runs/tabletop --env tabletop --episodes 200 --seed 1 --num-steps 10
    """

    observation: Path | None = None
    """An .npz with the arrays images/<camera>, state and prompt; or a .json that names pictures beside it."""
    write_example: Path | None = None
    """Write an observation of the right form (all zeros) to this .npz, to be filled in."""
    prompt: str | None = None
    """Instruction to give instead of the observation's."""
    episodes: int | None = None
    """Episodes in the simulator; by default as many of each task as its protocol has."""
    resume: bool = False
    """In the simulator: go on with an evaluation that was interrupted, or to more episodes."""
    videos: Literal["first", "failures", "all", "none"] = "first"
    """In the simulator: the episodes of which videos are saved; first: the first of each task."""
    record: Path | None = None
    """In the simulator: folder to create, a LeRobot v3.0 dataset of all episodes, successes and failures, each marked.
    Every step is drawn, and episodes are in memory until they end."""
    overwrite: bool = False
    """Replace an existing dataset at --record."""
    num_steps: int | None = None
    """Solver steps from noise to actions; the checkpoint's own number by default."""
    sampler: str | None = None
    """Sampler, such as Heun or DDIM (`pi0_jax.sampler`); the checkpoint's own by default."""
    grid_power: float | None = None
    """Above 1, more of the solver's steps are near the data; the checkpoint's own by default."""
    guidance_scale: float | None = None
    """Classifier-free guidance, for policies trained with dropped conditions; 1 is none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of matrices and activations; by default float32 on a CPU, which bfloat16 makes no faster, and elsewhere as it was
    trained."""
    bits: Literal["int8", "fp8"] | None = None
    """Round the weights to eight bits; what that changes is logged. fp8 is quick on GPUs that multiply float8."""
    execute_steps: int | None = None
    """Actions of a chunk executed before the policy is asked again; the checkpoint's own number by default."""
    subtask_every: int | None = None
    """1: the policy writes a subtask before each chunk (policies trained on subtasks); 0: it writes none. By default as
    the checkpoint says."""
    batch_size: int | None = None
    """Episodes side by side in the simulator; 64 by default, or 4 per core where environments live in processes."""
    strategy: Literal["synchronous", "asynchronous", "ensemble", "guidance", "identity", "trained"] | None = None
    """In the simulator: how to act while the policy computes, in simulated time; the last three are real-time chunking.
    By default the simulator waits, and nothing is late."""
    latency: float = 0.0
    """With --strategy: milliseconds from an observation to its chunk."""
    jitter: float = 0.0
    """Milliseconds by which that is more or less."""
    drop: float = 0.0
    """Probability that an answer is lost, and asked for again after a second."""
    repeat: int = 20
    """On an observation: at most so many further calls, to measure the time of; 0: none."""
    repeat_seconds: float = 10.0
    """No further call begins later than this after the first chunk; one is made in any case, unless --repeat is 0."""
    output: Path | None = None
    """Folder for what is saved; <run>/infer by default."""


@dataclasses.dataclass(frozen=True)
class Evaluate(Infer):
    """Runs a trained policy in closed loop in a simulator: `pi0 infer RUN --env ENV`, by default that of its robot.

    Example:

        pi0 evaluate runs/tabletop --episodes 200 --seed 1 --num-steps 10

        pi0 evaluate runs/tabletop --strategy guidance --latency 300 --jitter 100
    """


@dataclasses.dataclass(frozen=True)
class Report(SimulatorFlags):
    """Evaluates a run in closed loop and writes its report: one HTML file, with plots and videos inside."""

    episodes: int = 200
    """Episodes for each number of solver steps."""
    output: Path | None = None
    """HTML file to write; <run>/report.html by default."""


@dataclasses.dataclass(frozen=True)
class Record:
    """Records demonstrations of a simulator's scripted expert, as a LeRobot v3.0 dataset.

    Examples:

        pi0 record data/tabletop --env tabletop

        pi0 record data/questions --env tabletop_stages --questions 1000
    """

    path: Run
    """Folder to create."""
    env: str
    """Simulator: its name, or a Python file."""
    env_options: tuple[str, ...] = ()
    """Options of the simulator, as NAME=VALUE."""
    env_python: Path | None = None
    """Interpreter that has the simulator's packages, as in `pi0 evaluate`."""
    noise: float | None = None
    """Chance per step that a burst of random motion begins, which shows how to recover; its actions are not learnt. By
    default 0.08 where actions are changes, else 0."""
    episodes: int = 1200
    """Demonstrations, the tasks in turn."""
    questions: int | None = None
    """In place of demonstrations: so many pictures with questions and answers, as a folder of image-text pairs."""
    split: Literal["train", "validation"] = "train"
    """Layouts of the two never overlap, nor with those of evaluation."""
    seed: int = 0
    """Another seed gives other layouts of the split."""
    overwrite: bool = False
    """Replace an existing dataset."""


@dataclasses.dataclass(frozen=True)
class Env:
    """Installs a simulator's packages in an environment of their own, where `pi0 evaluate` and `record` find them.

    Example:

        pi0 env install metaworld
    """

    action: Annotated[Literal["install"], tyro.conf.Positional]
    """What to do."""
    name: Annotated[str, tyro.conf.Positional]
    """Simulator: its name, or a Python file that names its PACKAGES."""


def infer(args: Infer) -> None:
    """Runs `pi0 infer`.

    Raises:
        UserError, FileNotFoundError, OSError: what the user gave cannot be used; the message says how to go on.
    """
    evaluates = isinstance(args, Evaluate) or args.env is not None
    asked = sum((args.observation is not None, evaluates, args.write_example is not None))
    if asked != 1:
        raise UserError(
            f"{asked} of three things to do were given; "
            "say what to run on: --observation FILE (one observation), --env NAME (closed loop in a simulator), or "
            "--write-example FILE (a template of an observation)."
        )
    if evaluates:
        args = with_simulator(args)
        assert args.env is not None
    simulator = open_simulator(args.env, parse_options(args.env_options), args.env_python) if args.env else None
    if args.observation is not None and not args.observation.is_file():
        load_observation(args.observation)  # fails before the weights are read
    if args.strategy is None and (args.latency or args.jitter or args.drop):
        raise UserError("--latency, --jitter and --drop need a --strategy, which says what the robot does meanwhile.")
    if args.record is not None:
        _check_recording(args.record, args, evaluates)
    if args.write_example is not None:
        example = args.write_example
        example = example if example.suffix == ".npz" else Path(f"{example}.npz")
        save_observation(example, {**_robot(args.run).example()})
        print(f"wrote {example}; fill it in, then: pi0 infer {args.run} --observation {example}")
        return
    if args.repeat < 0:
        raise UserError(f"--repeat is {args.repeat}; it has to be at least 0.")
    keep_programs("default")
    policy = Policy.load(args.run, dtype=args.dtype, bits=args.bits, **_changes(args))
    if simulator is not None:
        (_evaluate if args.strategy is None else _evaluate_in_time)(simulator, policy, args)
        return
    _act(policy, args)


def _check_recording(path: Path, args: Infer, evaluates: bool) -> None:
    if not evaluates or args.resume or args.strategy is not None:
        raise UserError(
            "--record takes the episodes of one evaluation from its beginning, in a simulator that waits: without "
            "--resume and --strategy, and with --env."
        )
    if path.exists() and not args.overwrite:
        raise FileExistsError(f"{path} exists. Choose another folder, or replace it with --overwrite.")


def evaluate(args: Evaluate) -> None:
    """Runs `pi0 evaluate`; errors as of `infer`."""
    infer(args)


def _act(policy: Policy, args: Infer) -> None:
    """Prints and saves a chunk for an observation in a file as soon as there is one, and then measures the time."""
    assert args.observation is not None
    observation = cast(RawObservation, load_observation(args.observation))  # the policy checks it
    if args.prompt is not None:
        observation["prompt"] = args.prompt
    output = _folder(args.output or run_folder(args.run) / "infer")
    start = time.perf_counter()
    actions = policy.infer(observation, args.seed)
    first = time.perf_counter()
    names = policy.robot.actions
    print(format_chunk(actions, names))
    print(f"first chunk after {first - start:.1f} s, with compilation", flush=True)
    np.savez(output / "actions.npz", actions=actions, names=np.array(names))
    print(f"saved {output / 'actions.npz'}")
    try:
        plot_chunk(actions, names, output / "actions.png", str(observation["prompt"]))
        print(f"saved {output / 'actions.png'}")
    except UserError as error:  # the plot is an extra
        print(error)
    if args.repeat == 0:
        return
    print(f"measuring: up to {args.repeat} calls, in {args.repeat_seconds:g} s", flush=True)
    policy.forget_latency()
    calls, start = 0, time.perf_counter()
    while calls < args.repeat and (calls == 0 or time.perf_counter() - start < args.repeat_seconds):
        policy.infer(observation, args.seed)
        calls += 1
    stages = policy.latency()
    total = ", ".join(f"{name} {value:.1f}" for name, value in stages.pop("total").items())
    medians = ", ".join(f"{name} {values['p50']:.1f}" for name, values in stages.items())
    print(f"ms per chunk, over {calls} calls after compilation: {total} (median {medians})")


def _evaluate(simulator: Episodes, policy: Policy, args: Infer) -> None:
    output, (episodes, batch_size) = _folder(args.output or run_folder(args.run) / "infer"), _sizes(simulator, args)
    about = _about(simulator, args)
    recording = None if args.record is None else Rollouts(args.record, simulator, about, overwrite=args.overwrite)
    log = OutcomeFile(output / f"{simulator.name}.jsonl", about, resume=args.resume)
    films = output / f"{simulator.name}_videos"
    saved = []

    def keep(outcome: Outcome) -> Outcome:
        log.add(outcome)
        if rollouts is not None:
            rollouts.add(outcome)
        if outcome.pictures and not (outcome.success and args.videos == "failures"):
            name = f"{outcome.index:05}_{outcome.task.replace(' ', '_')}_{'success' if outcome.success else 'failure'}"
            film = _folder(films) / f"{name}.mp4"
            film.write_bytes(encode_mp4(hold_last(outcome.pictures, simulator.fps), simulator.fps))
            saved.append(film)
        return dataclasses.replace(outcome, pictures=(), frames={})

    film = range({"first": len(simulator.tasks), "none": 0}.get(args.videos, episodes))
    how: dict[str, Any] = {"batch_size": batch_size, "film": film, "done": log.done, "keep": keep}
    with recording or contextlib.nullcontext() as rollouts:
        how["record"] = {} if rollouts is None else rollouts.robot.cameras
        result = roll_out(policy, simulator, episodes, args.seed, **how, progress="closed loop")
    print(result.table())
    failed = Counter(outcome.task for outcome in result.outcomes if not outcome.success)
    if failed:
        print("failures:", ", ".join(f"{task} {count}" for task, count in failed.most_common()))
    filmed = f"; videos of {len(saved)} episodes: {films}" if saved else ""
    recorded = "" if args.record is None else f"; {len(result.outcomes)} episodes recorded: {args.record}"
    print(f"device {jax.devices()[0].device_kind}; outcomes: {log.path}{filmed}{recorded}")


def _sizes(simulator: Episodes, args: Infer) -> tuple[int, int]:
    """Episodes in all, and side by side."""
    episodes = len(simulator.tasks) * simulator.per_task if args.episodes is None else args.episodes
    light = isinstance(simulator, Simulator)
    return episodes, args.batch_size or (64 if light else min(64, 4 * (os.cpu_count() or 1)))


def _about(simulator: Episodes, args: Infer) -> dict[str, Any]:
    """What an episode's outcome depends on, beside its index."""
    return {
        "policy": str(args.run.absolute()),
        "step": _step(args.run),
        "changes": {name: repr(value) for name, value in _changes(args).items()},
        "simulator": simulator.name,
        "options": parse_options(args.env_options),
        "seed": args.seed,
        "dtype": args.dtype,
        "bits": args.bits,
    }


def _evaluate_in_time(simulator: Episodes, policy: Policy, args: Infer) -> None:
    assert args.strategy is not None
    latency, (episodes, batch_size) = Latency(args.latency, args.jitter, args.drop), _sizes(simulator, args)
    strategy = STRATEGIES[args.strategy][0](policy.config.execute_steps)
    how = (policy, simulator, strategy, latency, episodes, args.seed)
    traces = simulate(*how, batch_size=batch_size, progress="simulated time")
    print(describe(args.strategy, latency, summary(traces, simulator.fps)))


def report(args: Report) -> None:
    """Runs `pi0 report`; errors as in `infer`."""
    require_package("matplotlib", "report", "the report")
    args, run = with_simulator(args), run_folder(args.run)
    assert args.env is not None
    name, options = args.env, parse_options(args.env_options)
    simulator, counterfactual = open_simulator(name, options, args.env_python), None
    if has_option(name, "counterfactual"):
        counterfactual = open_simulator(name, options | {"counterfactual": True}, args.env_python)
    path = args.output or run / "report.html"
    _folder(path.parent)
    keep_programs("default")
    policy = Policy.load(args.run)
    measured = {"step": _step(args.run), "simulator": Path(name).stem}
    figures = write_report(policy, run, simulator, counterfactual, args.episodes, args.seed, path, measured)
    print()
    width = max(18, *map(len, figures["success"]))
    for task, rate in figures["success"].items():
        print(f"{task:<{width}} {Rate(**rate)}")
    if control := figures["success_under_counterfactual_instructions"]:
        print(f"counterfactual instructions: {control['rate']:.1%} of {control['episodes']}")
    by_steps = figures["success_by_steps"]
    if not policy.config.objective.decodes:
        print("by solver steps: " + ", ".join(f"{steps}: {by_steps[steps]['rate']:.1%}" for steps in sorted(by_steps)))
    print(f"\nsuccess rate {figures['success']['all']['rate']:.1%}, report: {path}")


def record(args: Record) -> None:
    """Runs `pi0 record`; errors as in `infer`."""
    options = tuple(parse_options(args.env_options).items())
    python = None if args.env_python is None else str(args.env_python)
    source = Source(args.env, args.split, args.seed, None if args.noise is None else Noise(args.noise), options, python)
    if args.questions is not None:
        count = record_questions(args.path, source, args.questions)
        print(f"{args.questions} pictures, {count} questions with answers: {args.path}")
        return
    summary = record_demonstrations(args.path, source, args.episodes, overwrite=args.overwrite)
    failed = f"; {summary['dropped']} failures of the expert were left out" if summary["dropped"] else ""
    print(f"{args.episodes} demonstrations, {summary['frames']} frames: {args.path}{failed}")


def env(args: Env) -> None:
    """Runs `pi0 env`; errors as in `infer`."""
    print(f"the simulator {args.name} runs in {install(args.name)}")


def _robot(run: Path) -> Robot:
    assets = load_assets(run)
    return kept_robot(assets.policy.robot, assets.robot)


def _changes(args: Infer) -> dict[str, Any]:
    """Fields of the checkpoint's policy that the flags set anew."""
    now, scale = load_assets(args.run).policy, args.guidance_scale
    values = {
        "sampler": args.sampler,
        "sampler.num-steps": args.num_steps,
        "sampler.grid-power": args.grid_power,
        "guidance": None if scale is None else "Guidance",
        "guidance.scale": scale,
        "execute-steps": args.execute_steps,
        "subtask-every": args.subtask_every,
    }
    flags = [word for name, value in values.items() if value is not None for word in (f"--{name}", str(value))]
    policy = parse(now, flags, prog="pi0 infer", description="Fields of the policy.") if flags else now
    if args.strategy is not None and (real_time := STRATEGIES[args.strategy][1]) is not None:
        policy = dataclasses.replace(policy, real_time=real_time)
    fields = [field.name for field in dataclasses.fields(policy)]
    return {name: getattr(policy, name) for name in fields if getattr(policy, name) != getattr(now, name)}


def _step(path: Path) -> int | None:
    """The step of the checkpoint that a path means; None for one that is of no run."""
    name = resolve(path).name
    return int(name) if name.isdecimal() else None


def _folder(path: Path) -> Path:
    """Makes a folder; one clear error where that is not possible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        if not os.access(path, os.W_OK):
            raise PermissionError("no permission to write")
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error}). Choose another folder with --output.") from error
    return path
