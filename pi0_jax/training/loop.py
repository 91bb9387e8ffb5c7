"""The run: build, restore or initialise, step, log, validate, save."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from pi0_jax import checkpoint, pi0
from pi0_jax.batch import Batch
from pi0_jax.checkpoint import CheckpointWriter
from pi0_jax.config import HostsConfig, TrainConfig
from pi0_jax.model.attention import report_kernel
from pi0_jax.training import multihost, optimizer, sharding
from pi0_jax.training.compilation import CompileMonitor, keep_programs
from pi0_jax.training.guard import Diverged
from pi0_jax.training.init_weights import check_start, first_weights
from pi0_jax.training.inputs import Inputs, load_inputs
from pi0_jax.training.interrupt import Interrupted, StopRequest
from pi0_jax.training.metrics import Reporter, seconds_at_peak
from pi0_jax.training.partition import flat, table, with_adapters
from pi0_jax.training.profiling import Profile, parse_span
from pi0_jax.training.program import Program, build
from pi0_jax.training.run_dir import delete_run, open_run
from pi0_jax.training.state import TrainState, join, split

_log = logging.getLogger(__name__)


def run(config: TrainConfig) -> Path:
    """Trains a policy from `config`, and leaves checkpoints, metrics and event files in `config.run_dir`.

    A run that stops, for whatever reason, and is resumed on the same machine gives the losses of one that never
    stopped, bit for bit.

    Started once on every host (`config.hosts`), it trains over all their devices. Then all processes have to see the
    same demonstrations and one folder for the run, each reads its own part of every batch, the first one writes what
    is not part of a checkpoint, and they stop together.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError, OSError: something is wrong with the configuration, its data, or the disk; see `open_run`,
            `load_inputs` and `pi0_jax.checkpoint`.
        Diverged: the weights became NaN or infinite, or loss or gradient more often than `config.skip_in_row` and
            `config.skip_in_total` allow. Nothing is saved from then on.
        Interrupted: SIGINT or SIGTERM came to any process; the state is saved.

    One process of several that fails alone ends without returning: see `multihost.ended_together`.
    """
    multihost.connect(config.hosts)
    advice = "Continue with --resume, once all processes are gone."
    with multihost.ended_together((Diverged, Interrupted), advice):
        return _run(config)


def _run(config: TrainConfig) -> Path:
    config = with_adapters(config)
    for name in ("batch_size", "num_steps", "log_every", "validate_every", "save_every", "keep_checkpoints", "parts"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it has to be at least 1.")
    if config.augment.square_symmetries and config.policy.model.variant == "pi05":
        raise ValueError(
            "augment.square_symmetries turns the state, but π0.5 reads it from the prompt, where it would stay as it "
            "was. Turn the symmetries off, or train pi0."
        )
    if config.keep_best and config.save_every % config.validate_every:
        raise ValueError(
            f"keep_best needs the validation loss at every save: make save_every {config.save_every} a multiple of "
            f"validate_every {config.validate_every}."
        )
    pi0.check_policy(config.policy)
    _check_objective(config)
    mesh = sharding.make_mesh(config.mesh)
    batch_placement = sharding.batch_sharding(mesh, config.batch_size, config.parts)
    optimizer.make_schedule(config.optim, config.num_steps)  # refuses what cannot work, before data are read
    run_dir = Path(config.run_dir).expanduser()
    parse_span(config.profile)
    keep_programs(config.compilation_cache)
    source = open_run(config)
    multihost.require_same("configuration and newest checkpoint", repr((_shared(config), source)).encode())
    resumed = None if source is None else checkpoint.load_assets(source)
    initial = None if config.init_from is None or source is not None else checkpoint.load_assets(config.init_from)
    rows = sharding.local_rows(batch_placement, config.batch_size)
    with multihost.first_before_others("demonstrations"):
        inputs = load_inputs(config, resumed=resumed, initial=initial, rows=rows)
    multihost.require_same("the demonstrations", repr((inputs.assets.norm_stats, inputs.assets.tokenizer)).encode())

    program = build(config, mesh, inputs.robot, inputs.stats, rows)
    check_start(config, program.shapes)
    _describe(mesh, program, config)
    frozen = (
        () if config.reflow_from is None else (checkpoint.restore_params(config.reflow_from, program.shapes.weights),)
    )
    with multihost.first_before_others("overwrite"):
        if config.overwrite and multihost.is_first():
            delete_run(run_dir)
    with CheckpointWriter(
        run_dir, config.keep_checkpoints, keep_every=config.keep_every, keep_best=config.keep_best
    ) as writer:
        writer.reserve(program.shapes, config.num_steps)
        if source is None:
            state = program.start(first_weights(config, program.network, program.shapes))
        else:
            state = restore(source, program.shapes)
            inputs.loader.set_state(checkpoint.load_data_state(source))
        return _train(config, run_dir, state, program, frozen, inputs, writer, mesh)


def _shared(config: TrainConfig) -> TrainConfig:
    """What has to be the same for all processes."""
    return dataclasses.replace(config, hosts=HostsConfig())


def _check_objective(config: TrainConfig) -> None:
    """Raises ValueError for settings of the objective that do not go together."""
    flow, prediction = config.flow, config.policy.model.prediction
    for name in ("drop_prompt", "drop_images", "drop_both"):
        if not 0 <= getattr(flow, name) <= 1:
            raise ValueError(f"flow.{name} is {getattr(flow, name)}; it is a probability, between 0 and 1.")
    if flow.drop_prompt + flow.drop_images + flow.drop_both > 1:
        raise ValueError("flow.drop_prompt, drop_images and drop_both exclude one another; their sum is above 1.")
    if not 0 < flow.shortcut_share < 1:
        raise ValueError(f"flow.shortcut_share is {flow.shortcut_share}; it is a share of the batch, between 0 and 1.")
    if prediction == "average_velocity" and (taught := pi0.taught_examples(config.batch_size, flow)) % config.parts:
        raise ValueError(
            f"flow.shortcut_share makes {taught} examples of a batch teach shortcuts, and {config.parts} parts cannot "
            "have an equal number of them; take --parts that divides it, or another share."
        )
    if config.init_parts and config.init_from is None:
        raise ValueError(f"init_parts {list(config.init_parts)} are parts of nothing: name a checkpoint, --init-from.")
    if prediction != "velocity" and (config.reflow_from is not None or flow.coupling != "independent"):
        raise ValueError(f"reflow and couplings straighten a flow; this network predicts {prediction}.")
    if config.reflow_from is not None and (flow.coupling != "independent" or flow.mean_draw or flow.mean_steps):
        raise ValueError("reflow has its own pairs of noise and actions: turn flow.coupling and the mean draw off.")
    if (flow.mean_draw or flow.mean_steps) and prediction not in ("velocity", "v"):
        raise ValueError(f"the mean draw teaches a velocity at t = 1; this network predicts {prediction}.")


def restore(folder: Path, shapes: TrainState) -> TrainState:
    """The state of a checkpoint, placed as `shapes` says."""
    weights, rest = split(shapes)
    return join(checkpoint.restore_params(folder, weights), checkpoint.restore_train_state(folder, rest), shapes)


def validate(
    config: TrainConfig, program: Program, weights, validation: Callable[[], Iterator[Batch]], watch: CompileMonitor
) -> dict[str, float]:
    """Measures weights on held-out demonstrations, with the same noise and times whenever it is asked.

    Returns:
        `validation_loss`, the mean loss over all steps; and of a flow its `straightness` on the first batch, 0 where
        one Euler step is exact.
    """
    total, count = 0.0, 0
    for number, batch in enumerate(validation()):
        placed = program.place(batch)
        steps = int(jnp.sum(placed.step_mask))
        name = "validation" + _prompts(config, placed)
        value, _ = watch.call(name, program.evaluate, weights, placed, jax.random.key(number))
        total += steps * float(value)
        count += steps
    values = {"validation_loss": total / max(count, 1)}
    if program.straightness is not None:
        batch = program.place(next(validation()))
        values["straightness"] = float(program.straightness(weights, batch, jax.random.key(0)))
    return values


def _train(
    config: TrainConfig, run_dir: Path, state: TrainState, program: Program, frozen: tuple, inputs: Inputs,
    writer: CheckpointWriter, mesh: Mesh,
) -> Path:  # fmt: skip
    step, seed = int(state.step), np.uint32(config.seed)
    saved, vote = step, multihost.Vote(mesh)
    reporter = Reporter(
        run_dir, start=step, num_steps=config.num_steps, batch_size=config.batch_size, log_every=config.log_every,
        gauges=getattr(inputs.loader, "gauges", dict), max_skips=(config.skip_in_row, config.skip_in_total),
        ideal_seconds=seconds_at_peak(config, mesh, flat(program.shapes.frozen)), write=multihost.is_first(),
    )  # fmt: skip
    signal = None
    watch, profile = CompileMonitor(), Profile(parse_span(config.profile), run_dir / "profile")
    with reporter, watch, profile, StopRequest() as stop:
        try:
            while step < config.num_steps and (signal := vote(stop.number)) is None:
                mean = step < config.flow.mean_steps
                profile.before(step + 1, state)
                batch = program.place(next(inputs.loader))
                name, update = ("mean's update", program.update_mean) if mean else ("update", program.update)
                name += _prompts(config, batch)
                state, metrics = watch.call(name, update, seed, state, batch, *frozen)
                step += 1
                reporter.push(step, metrics)
                writer.check()
                last, measured = step == config.num_steps, {}
                if inputs.validation is not None and (last or step % config.validate_every == 0):
                    reporter.flush()
                    measured = validate(config, program, state.weights, inputs.validation, watch)
                    reporter.write(step, measured)
                if last or step % config.save_every == 0:
                    reporter.flush()
                    _save(writer, step, state, inputs, measured.get("validation_loss"))
                    saved = step
            if saved != step:
                reporter.flush()
                _save(writer, step, state, inputs)
                saved = step
        except Diverged as error:
            writer.wait()
            advice = "Lower --optim.peak-lr, or look at the data of that step."
            raise Diverged(f"{error}. {_kept(run_dir, checkpoint.latest_step(run_dir))} {advice}") from error
        writer.wait()
    _log.info("%s", watch.summary())
    folder = run_dir / "checkpoints" / str(step)
    if signal is not None and step < config.num_steps:
        raise Interrupted(step, folder, signal)
    _log.info("done: %s\nTry it: pi0 infer %s --write-example observation.npz", folder, run_dir)
    _log.info("Evaluate it: pi0 report %s", run_dir)
    return folder


def _save(writer: CheckpointWriter, step: int, state: TrainState, inputs: Inputs, loss: float | None = None):
    weights, rest = split(state)
    writer.save(step, weights, inputs.assets, rest, inputs.loader.get_state(), loss)


def _prompts(config: TrainConfig, batch: Batch) -> str:
    """What tells the programs for batches of different prompt lengths apart."""
    return f" for prompts of {batch.observation.prompt.shape[1]} tokens" if config.data.prompt_buckets else ""


def _kept(run_dir: Path, step: int | None) -> str:
    return "No checkpoint was saved." if step is None else f"Last checkpoint: {run_dir / 'checkpoints' / str(step)}."


def _describe(mesh, program: Program, config: TrainConfig):
    """Logs what a user wants to know before waiting."""
    held = sharding.bytes_per_device(program.shapes, jax.tree.map(lambda x: x.sharding, program.shapes))
    kind = mesh.devices.flat[0].device_kind
    axes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    report_kernel(config.policy.model.attention, config.policy.model.dtype)
    _log.info("devices: %d x %s of %d processes, mesh %s", mesh.size, kind, jax.process_count(), axes)
    _log.info(
        "model: %.3f GB of training state a device\n%s", held / 1e9, table(program.shapes.params, program.shapes.frozen)
    )
    _log.info("output: %s (checkpoints, %s, TensorBoard events)", config.run_dir, "metrics.jsonl")
    _log.debug("optimizer of each parameter:\n%s", optimizer.describe(program.boxed))
