"""The run: build, restore or initialise, step, log, validate, save."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax.linen import meta
from jaxtyping import Array, PRNGKeyArray

from pi0_jax import checkpoint, pi0
from pi0_jax.batch import Batch
from pi0_jax.checkpoint import CheckpointWriter
from pi0_jax.config import FlowConfig, TrainConfig
from pi0_jax.data.augment import augment
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.training import optimizer, sharding
from pi0_jax.training.folder import delete_run, open_run
from pi0_jax.training.inputs import Inputs, load_inputs
from pi0_jax.training.interrupt import Interrupted, StopRequest
from pi0_jax.training.metrics import Diverged, Reporter
from pi0_jax.training.state import TrainState, create, join, split
from pi0_jax.training.step import Metrics, make_update

_log = logging.getLogger(__name__)


class Program(NamedTuple):
    """The compiled parts of a run."""

    update: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    """Donates the state that it is given."""
    update_mean: Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
    """The same for the first `flow.mean_steps` updates."""
    evaluate: Callable[[Any, Batch, PRNGKeyArray], tuple[Array, Metrics]]
    """Loss of given weights on a batch, with the noise and times of a key."""
    place: Callable[[Batch], Batch]
    """Puts a batch on the devices."""


def run(config: TrainConfig) -> Path:
    """Trains a policy from `config`, and leaves checkpoints, metrics and event files in `config.run_dir`.

    A run that stops, for whatever reason, and is resumed on the same machine gives the losses of one that never
    stopped, bit for bit.

    Returns:
        The folder of the last checkpoint.

    Raises:
        ValueError, OSError: something is wrong with the configuration, its data, or the disk; see `open_run`,
            `load_inputs` and `pi0_jax.checkpoint`.
        Diverged: the loss or a norm became NaN or infinite. Nothing is saved from then on.
        Interrupted: SIGINT or SIGTERM came; the state is saved.
    """
    for name in ("batch_size", "num_steps", "log_every", "validate_every", "save_every", "keep_checkpoints"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} is {getattr(config, name)}; it has to be at least 1.")
    if config.augment.square_symmetries and config.policy.model.variant == "pi05":
        raise ValueError(
            "augment.square_symmetries turns the state, but π0.5 reads it from the prompt, where it would stay as it "
            "was. Turn the symmetries off, or train pi0."
        )
    mesh = sharding.make_mesh(config.mesh)
    batch_placement = sharding.batch_sharding(mesh, config.batch_size)
    schedule = optimizer.make_schedule(config.optim, config.num_steps)
    run_dir = Path(config.run_dir).expanduser()
    source = open_run(config)
    resumed = None if source is None else checkpoint.load_assets(source)
    initial = None if config.init_from is None or source is not None else checkpoint.load_assets(config.init_from)
    inputs = load_inputs(config, resumed=resumed, initial=initial)

    network = VelocityNetwork(config.policy.model)
    boxed = jax.eval_shape(functools.partial(pi0.init_params, network), jax.random.key(0))
    transform = optimizer.make_optimizer(config.optim, schedule, boxed)
    start = functools.partial(create, optimizer=transform, ema=config.optim.ema_decay is not None)
    boxed_state = jax.eval_shape(start, boxed)
    placement = sharding.shardings(mesh, boxed_state)
    shapes = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), meta.unbox(boxed_state), placement
    )
    _describe(mesh, shapes, placement, boxed, config)

    def compiled_update(flow: FlowConfig):
        update = make_update(
            sharding.keep_batch_divided(mesh, functools.partial(_loss, network, flow)),
            functools.partial(
                augment, config=config.augment, robot=inputs.robot, stats=inputs.stats, mode=config.policy.normalization
            ),
            transform,
            schedule,
            ema_decay=config.optim.ema_decay,
            seed=config.seed,
        )
        return jax.jit(update, donate_argnums=0, out_shardings=(placement, None))

    # Whatever training does, validation counts the steps inside episodes alone, which also drops the last batch's fill.
    validation_flow = dataclasses.replace(config.flow, mask_padded_steps=True)
    program = Program(
        compiled_update(config.flow),
        compiled_update(dataclasses.replace(config.flow, samples_per_observation=1, mean_draw=True)),
        jax.jit(sharding.keep_batch_divided(mesh, functools.partial(_loss, network, validation_flow))),
        lambda batch: jax.device_put(batch, batch_placement),
    )
    if config.overwrite:
        delete_run(run_dir)
    with CheckpointWriter(run_dir, config.keep_checkpoints) as writer:
        writer.reserve(checkpoint.tree_bytes(shapes))
        if source is None:
            params = _first_params(config, network, shapes.params)
            state = jax.jit(start, out_shardings=placement)(params)
        else:
            state = restore(source, shapes)
            inputs.loader.set_state(checkpoint.load_data_state(source))
        return _train(config, run_dir, state, program, inputs, writer)


def _loss(network: VelocityNetwork, flow: FlowConfig, params, batch: Batch, key: PRNGKeyArray):
    return pi0.loss(network, params, batch, key, flow)


def _first_params(config: TrainConfig, network: VelocityNetwork, shapes):
    """Weights of another checkpoint, or random ones, made where they will live."""
    if config.init_from is not None:
        return checkpoint.restore_params(config.init_from, shapes)
    init = jax.jit(
        lambda key: meta.unbox(pi0.init_params(network, key)), out_shardings=jax.tree.map(lambda x: x.sharding, shapes)
    )
    return init(jax.random.key(config.seed))


def restore(folder: Path, shapes: TrainState) -> TrainState:
    """The state of a checkpoint, placed as `shapes` says."""
    weights, rest = split(shapes)
    return join(checkpoint.restore_params(folder, weights), checkpoint.restore_train_state(folder, rest))


def validation_loss(program: Program, weights, batches: Iterator[Batch]) -> float:
    """Mean loss over all steps of held-out demonstrations, with the same noise and times whenever it is asked."""
    total, count = 0.0, 0
    for number, batch in enumerate(batches):
        steps = int(np.sum(batch.step_mask))
        value, _ = program.evaluate(weights, program.place(batch), jax.random.key(number))
        total += steps * float(value)
        count += steps
    return total / max(count, 1)


def _train(
    config: TrainConfig, run_dir: Path, state: TrainState, program: Program, inputs: Inputs, writer: CheckpointWriter
) -> Path:
    step = int(state.step)
    saved = step
    reporter = Reporter(
        run_dir, start=step, num_steps=config.num_steps, batch_size=config.batch_size, log_every=config.log_every,
        gauges=getattr(inputs.loader, "gauges", dict),
    )  # fmt: skip
    with reporter, StopRequest() as stop:
        try:
            while step < config.num_steps and stop.number is None:
                update = program.update_mean if step < config.flow.mean_steps else program.update
                state, metrics = update(state, program.place(next(inputs.loader)))
                step += 1
                reporter.push(step, metrics)
                writer.check()
                last = step == config.num_steps
                if inputs.validation is not None and (last or step % config.validate_every == 0):
                    reporter.flush()
                    value = validation_loss(program, state.weights, inputs.validation())
                    reporter.write(step, {"validation_loss": value})
                if last or step % config.save_every == 0:
                    reporter.flush()
                    _save(writer, step, state, inputs)
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
    if stop.number is not None and step < config.num_steps:
        raise Interrupted(f"stopped at step {step}. {_kept(run_dir, step)} Continue with --resume.", stop.number)
    folder = run_dir / "checkpoints" / str(step)
    _log.info("done: %s\nNext, see how the policy does: pi0 report %s", folder, run_dir)
    return folder


def _save(writer: CheckpointWriter, step: int, state: TrainState, inputs: Inputs):
    weights, rest = split(state)
    writer.save(step, weights, inputs.assets, rest, inputs.loader.get_state())


def _kept(run_dir: Path, step: int | None) -> str:
    return "No checkpoint was saved." if step is None else f"Last checkpoint: {run_dir / 'checkpoints' / str(step)}."


def _describe(mesh, shapes: TrainState, placement: TrainState, boxed, config: TrainConfig):
    """Logs what a user wants to know before waiting."""
    count = sum(x.size for x in jax.tree.leaves(shapes.params))
    held = sharding.bytes_per_device(shapes, placement)
    kind = mesh.devices.flat[0].device_kind
    _log.info("devices: %d x %s, mesh data %d x fsdp %d", mesh.size, kind, mesh.shape["data"], mesh.shape["fsdp"])
    _log.info("model: %s parameters, %.3f GB of training state a device", f"{count:,}", held / 1e9)
    _log.info("output: %s (checkpoints, %s, TensorBoard events)", config.run_dir, "metrics.jsonl")
    _log.debug("optimizer of each parameter:\n%s", optimizer.describe(boxed))
