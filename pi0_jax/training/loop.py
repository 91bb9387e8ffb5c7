"""The run: build, restore or initialise, step, log, validate, save."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax import checkpoint, config_json
from pi0_jax.batch import Batch
from pi0_jax.checkpoint import CheckpointWriter
from pi0_jax.compilation import CompileMonitor, keep_programs
from pi0_jax.config import HostsConfig, TrainConfig
from pi0_jax.model.attention import report_kernel
from pi0_jax.objective import Params
from pi0_jax.training import multihost, optimizer, sharding
from pi0_jax.training.guard import Diverged
from pi0_jax.training.init_weights import first_weights
from pi0_jax.training.inputs import Inputs, load_inputs
from pi0_jax.training.interrupt import Interrupted, StopRequest
from pi0_jax.training.metrics import Reporter, seconds_at_peak
from pi0_jax.training.partition import partition, table
from pi0_jax.training.profiling import Profile
from pi0_jax.training.program import Program, build, compiler_options
from pi0_jax.training.resolve import Run, resolve, wide_enough
from pi0_jax.training.run_dir import delete_run, open_run
from pi0_jax.training.state import TrainState, join, split
from pi0_jax.training.tracker import Tracker, open_service, package

_log = logging.getLogger(__name__)


def run(config: TrainConfig) -> Path:
    """Trains a policy from `config`, and leaves checkpoints, metrics and event files in `config.run_dir`.

    A run that stops, for whatever reason, and is resumed on the same machine gives the losses of one that never
    stopped, bit for bit.

    Started once on every host (`config.hosts`), it trains over all their devices. Then all processes have to see the
    same demonstrations and one folder for the run, each reads its own examples of every batch, the first one writes
    what is not part of a checkpoint, and they stop together.

    Returns:
        The folder of the last checkpoint.

    Raises:
        UserError, OSError: something is wrong with the configuration, its data, or the disk; see `resolve`,
            `open_run`, `load_inputs` and `pi0_jax.checkpoint`.
        Diverged: the weights became NaN or infinite, or loss or gradient more often than
            `config.max_consecutive_skips` and `config.max_total_skips` allow. Nothing is saved from then on.
        Interrupted: SIGINT or SIGTERM came to any process; the state is saved.

    One process of several that fails alone ends without returning: see `multihost.ended_together`.
    """
    multihost.connect(config.hosts)
    advice = "Continue with --resume, once all processes are gone."
    with multihost.ended_together((Diverged, Interrupted), advice):
        return _run(resolve(wide_enough(config)))


def _run(run: Run) -> Path:
    config = run.config
    keep_programs(config.compilation_cache)
    source = open_run(config)
    if config.tracker is not None:
        package(config.tracker)  # its absence is known before anything is loaded
    everywhere = dataclasses.replace(config, hosts=HostsConfig())  # each process has its own address
    multihost.require_same("configuration and newest checkpoint", repr((everywhere, source)).encode())
    resumed = None if source is None else checkpoint.load_assets(source)
    initial = None if config.init_from is None or source is not None else _initial(config.init_from)
    with multihost.first_before_others("demonstrations"):
        inputs = load_inputs(run, resumed=resumed, initial=initial)
    multihost.require_same("the demonstrations", repr((inputs.assets.norm_stats, inputs.assets.tokenizer)).encode())

    program = build(run, inputs.augment)
    _describe(run, program)
    teacher = run.objective.teacher
    teacher_params = () if teacher is None else (checkpoint.restore_params(teacher, program.shapes.weights),)
    with multihost.first_before_others("overwrite"):
        if config.overwrite and multihost.is_first():
            delete_run(run.run_dir)
    with CheckpointWriter(
        run.run_dir, config.keep_checkpoints, keep_every=config.keep_every, keep_best=config.keep_best
    ) as writer:
        writer.reserve(program.shapes, config.num_steps)
        if source is None:
            state = program.start(first_weights(run, program.shapes))
        else:
            state = restore(source, program.shapes)
            inputs.loader.set_state(checkpoint.load_data_state(source))
        return _train(run, program, state, teacher_params, inputs, writer)


def _initial(path: str) -> checkpoint.Assets:
    """The assets of the checkpoint that a run starts from."""
    try:
        return checkpoint.load_assets(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"`init_from`: {error}. Released weights are converted once: pi0 convert pi05_base {path} --tokenizer "
            "paligemma_tokenizer.model (docs/checkpoints.md)."
        ) from error


def restore(folder: Path, shapes: TrainState) -> TrainState:
    """The state of a checkpoint, placed as `shapes` says."""
    weights, rest = split(shapes)
    return join(checkpoint.restore_params(folder, weights), checkpoint.restore_train_state(folder, rest), shapes)


def validate(
    program: Program, weights: Params, batches: Callable[[], Iterator[Batch]], monitor: CompileMonitor
) -> dict[str, float]:
    """Measures weights on held-out demonstrations, with the same noise and times at every call.

    Returns:
        `validation_loss`, the mean loss over all steps; and of a flow its `straightness` on the first batch, 0 where
        one Euler step is exact.
    """
    total, count = 0.0, 0
    for number, batch in enumerate(batches()):
        placed = program.place(batch)
        steps = int(jnp.sum(placed.step_mask))
        value = monitor.call(_named("validation", placed), program.evaluate, weights, placed, jax.random.key(number))
        total += steps * float(value)
        count += steps
    values = {"validation_loss": total / max(count, 1)}
    if program.straightness is not None:
        batch = program.place(next(batches()))
        values["straightness"] = float(program.straightness(weights, batch, jax.random.key(0)))
    return values


def _train(
    run: Run,
    program: Program,
    state: TrainState,
    teacher_params: tuple[Params, ...],
    inputs: Inputs,
    writer: CheckpointWriter,
) -> Path:
    config, run_dir = run.config, run.run_dir
    step, seed = int(state.step), np.uint32(config.seed)
    saved, vote, signal = step, multihost.StopVote(run.mesh), None
    reporter = Reporter(
        run_dir,
        start=step,
        num_steps=config.num_steps,
        batch_size=config.batch_size,
        log_every=config.log_every,
        gauges=getattr(inputs.loader, "gauges", dict),
        max_skips=(config.max_consecutive_skips, config.max_total_skips),
        ideal_seconds=seconds_at_peak(run),
        trackers=_trackers(config, run_dir, resumed=step > 0),
        write=multihost.is_first(),
    )
    monitor, profile = CompileMonitor(), Profile(run.profile, run_dir / "profile")
    with reporter, monitor, profile, StopRequest() as stop:
        try:
            while step < config.num_steps and (signal := vote(stop.number)) is None:
                profile.before(step + 1, state)
                batch = program.place(next(inputs.loader))
                name = _named("update", batch)
                state, metrics = monitor.call(name, program.update, seed, state, batch, *teacher_params)
                step += 1
                reporter.push(step, metrics)
                writer.check()
                last, measured = step == config.num_steps, {}
                if inputs.validation is not None and (last or step % config.validate_every == 0):
                    reporter.flush()
                    measured = validate(program, state.weights, inputs.validation, monitor)
                    reporter.write(step, measured)
                if last or step % config.save_every == 0:
                    reporter.flush()
                    _save(writer, step, state, inputs, measured.get("validation_loss"))
                    saved = step
            if saved != step:
                reporter.flush()
                _save(writer, step, state, inputs)
        except Diverged as error:
            writer.wait()
            newest = checkpoint.latest_step(run_dir)
            kept = "No checkpoint was saved" if newest is None else f"Last checkpoint: {_folder(run_dir, newest)}"
            advice = "Lower --optim.peak-lr, or look at the data of that step."
            raise Diverged(f"{error}. {kept}. {advice}") from error
        writer.wait()
    _log.info("%s", monitor.summary())
    folder = _folder(run_dir, step)
    if signal is not None and step < config.num_steps:
        raise Interrupted(step, folder, signal)
    _log.info("done: %s", folder)
    unseen = "from held-out episodes" if inputs.validation is not None else "--data FOLDER: none were held out"
    _log.info("next: pi0 diagnose %s (%s), or pi0 report %s (in a simulator of the robot)", run_dir, unseen, run_dir)
    return folder


def _trackers(config: TrainConfig, run_dir: Path, *, resumed: bool) -> list[Tracker]:
    """The tracking service of a run, which the first process alone writes to."""
    if config.tracker is None or not multihost.is_first():
        return []
    return [open_service(config.tracker, run_dir, config_json.dump(config), resumed=resumed)]


def _save(writer: CheckpointWriter, step: int, state: TrainState, inputs: Inputs, loss: float | None = None):
    weights, rest = split(state)
    writer.save(step, weights, inputs.assets, rest, inputs.loader.get_state(), loss)


def _named(program: str, batch: Batch) -> str:
    """The name of a program, which is another one for each length of prompts."""
    return f"{program} for prompts of {batch.observation.prompt.shape[1]} tokens"


def _folder(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / str(step)


def _describe(run: Run, program: Program) -> None:
    """Logs what a user wants to know before waiting."""
    model, cameras = run.policy.model, run.cameras
    _log.info("cameras: %s", ", ".join(cameras.present) or "none")
    if cameras.absent and cameras.unused:
        _log.warning(
            "policy.model.cameras names %s, which no robot of this run has, and leaves out %s, which there are",
            ", ".join(cameras.absent),
            ", ".join(cameras.unused),
        )
    state_bytes = sharding.bytes_per_device(program.shapes, jax.tree.map(lambda x: x.sharding, program.shapes))
    kind = run.mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in run.mesh.shape.items())
    report_kernel(model.attention, model.dtype)
    _log.info("devices: %d x %s of %d processes, mesh %s", run.mesh.size, kind, jax.process_count(), axes)
    for name in compiler_options(run.mesh.devices.flat[0].platform, run.mesh.size):
        _log.info("updates send beside kernels; XLA_FLAGS=--%s=false leaves that to XLA", name)
    trained = table(program.shapes.params, program.shapes.frozen)
    _log.info("model: %.3f GB of training state per device\n%s", state_bytes / 1e9, trained)
    _log.info("output: %s (checkpoints, metrics.jsonl, TensorBoard events)", run.run_dir)
    _log.debug("optimizer of each parameter:\n%s", optimizer.describe(partition(run.weights, run.frozen)[0]))
