"""What a configuration decides, decided once: what follows `resolve` takes its results and decides nothing again."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.linen import meta
from jax.sharding import Mesh, NamedSharding

from pi0_jax import pi0
from pi0_jax.batch import Batch, example_batch, example_codec, example_observation
from pi0_jax.config import ModelConfig, ObjectiveConfig, PolicyConfig, RealTimeConfig, TrainConfig
from pi0_jax.data.robots import Robot, get_robot
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Previous
from pi0_jax.objective import Objective, for_validation, make_objective
from pi0_jax.training import optimizer, sharding
from pi0_jax.training.partition import flat, frozen_names, partition, with_adapters
from pi0_jax.training.profiling import Span, parse_span

_log = logging.getLogger(__name__)


class Cameras(NamedTuple):
    """The model's cameras against those that the robots of a run have."""

    present: tuple[str, ...]
    """Cameras of the model that some robot has, in the model's order."""
    absent: tuple[str, ...]
    """Cameras of the model that no robot has. Training leaves them out: their tokens would be masked, and what is
    masked changes no other token; no parameter belongs to a camera."""
    unused: tuple[str, ...]
    """Cameras of the robots that the model has not."""


class Run(NamedTuple):
    """A configuration that has been found good, and what follows from it without weights or demonstrations."""

    config: TrainConfig
    """The experiment, with the adapters that its recipe asks for; checkpoints keep it."""
    run_dir: Path
    robot: Robot
    """The robot of the policy."""
    cameras: Cameras
    policy: PolicyConfig
    """The policy as training computes it: with the cameras that are present alone."""
    objective: Objective
    """What is learned, on the network with the cameras that are present."""
    validation: Objective
    """What is measured on held-out demonstrations, on the same network."""
    weights: Any
    """Shapes of all parameters, in boxes with their logical axis names."""
    frozen: frozenset[str]
    """Paths of the parameters that are not trained."""
    mesh: Mesh
    batch_placement: NamedSharding
    rows: np.ndarray
    """Numbers of the examples of each batch that this process reads."""
    schedule: optax.Schedule
    optimizer: optax.GradientTransformation
    profile: Span | None


def resolve(config: TrainConfig, devices: Sequence[Any] | None = None) -> Run:
    """Decides what follows from a configuration; reads no data and no weights.

    Args:
        config: one experiment.
        devices: to train on, which may be ones that only a compiler knows; None: all, of all processes.

    Raises:
        UserError: anything that is wrong with the configuration by itself.
    """
    config = with_adapters(config)
    _check_numbers(config)
    robots = _robots(config)
    cameras = _cameras(config.policy, robots)
    model = dataclasses.replace(config.policy.model, cameras=cameras.present)
    policy = dataclasses.replace(config.policy, model=model)
    mesh = sharding.make_mesh(config.mesh, devices)
    placement = sharding.batch_sharding(mesh, config.batch_size, config.grad_accum_steps)
    objective = make_objective(policy.objective, model)
    weights = jax.eval_shape(objective.network.init, jax.random.key(0))
    _check_sampling(policy, objective, weights)
    _check_draws(objective, batch_shapes(model, policy.objective, config.batch_size), config.grad_accum_steps, mesh)
    frozen = frozen_names(config.tune, model, flat(weights))
    _check_random(config, frozen)
    schedule = optimizer.make_schedule(config.optim, config.num_steps)
    return Run(
        config=config,
        run_dir=Path(config.run_dir).expanduser(),
        robot=get_robot(config.policy.robot),
        cameras=cameras,
        policy=policy,
        objective=objective,
        validation=make_objective(for_validation(policy.objective), model),
        weights=weights,
        frozen=frozen,
        mesh=mesh,
        batch_placement=placement,
        rows=sharding.local_rows(placement, config.batch_size),
        schedule=schedule,
        optimizer=optimizer.make_optimizer(config.optim, schedule, partition(weights, frozen)[0]),
        profile=parse_span(config.profile),
    )


def wide_enough(config: TrainConfig) -> TrainConfig:
    """The configuration with a model that has room for its robots' dimensions, where no trained weights have a say."""
    model, teacher = config.policy.model, getattr(config.policy.objective, "teacher", None)
    width = max(len(names) for robot in _robots(config) for names in (robot.model_state, robot.model_actions))
    if width <= model.action_dim or config.init_from is not None or teacher is not None:
        return config
    _log.info("model.action_dim becomes %d in place of %d: a robot has %d dimensions", width, model.action_dim, width)
    model = dataclasses.replace(model, action_dim=width)
    return dataclasses.replace(config, policy=dataclasses.replace(config.policy, model=model))


def batch_shapes(model: ModelConfig, objective: ObjectiveConfig, size: int) -> Batch:
    """Shapes of a training batch."""
    return jax.eval_shape(lambda: example_batch(model, size, objective.target_length))


def _check_numbers(config: TrainConfig) -> None:
    counts = "batch_size num_steps log_every validate_every save_every keep_checkpoints grad_accum_steps"
    for name in counts.split():
        if getattr(config, name) < 1:
            raise UserError(f"{name} is {getattr(config, name)}; it has to be at least 1.")
    if config.augment.square_symmetries and config.policy.model.variant != "pi0" and config.policy.state_in_prompt:
        raise UserError(
            "augment.square_symmetries turns the state, but this policy reads it from the prompt, where it would stay "
            "as it was. Turn the symmetries off, or policy.state_in_prompt, or train pi0."
        )
    if config.keep_best and config.save_every % config.validate_every:
        raise UserError(
            f"keep_best needs the validation loss at every save: make save_every {config.save_every} a multiple of "
            f"validate_every {config.validate_every}."
        )
    if config.init_parts and config.init_from is None:
        raise UserError(f"init_parts {list(config.init_parts)} name parameters of no checkpoint: give --init-from.")


def _robots(config: TrainConfig) -> list[Robot]:
    """The robots of the run's datasets."""
    names = [dataset.robot or config.policy.robot for dataset in config.data.datasets] or [config.policy.robot]
    return [get_robot(name) for name in dict.fromkeys(names)]


def _cameras(policy: PolicyConfig, robots: Sequence[Robot]) -> Cameras:
    model = policy.model
    exist = sorted({camera for robot in robots for camera in robot.cameras.values()})
    present = tuple(camera for camera in model.cameras if camera in exist)
    if model.cameras and not present:
        raise UserError(
            f"none of the model's cameras, {list(model.cameras)}, is one of the robot's, {exist}. Name at least one of "
            "those in `policy.model.cameras`."
        )
    absent, unused = (
        tuple(a for a in ours if a not in others) for ours, others in ((model.cameras, exist), (exist, model.cameras))
    )
    if policy.objective.blank_cameras:
        return Cameras(model.cameras, (), unused)
    return Cameras(present, absent, unused)


def _check_sampling(policy: PolicyConfig, objective: Objective, weights: Any) -> None:
    """Refuses a policy that could not act as it is configured to: what it learns has to suit how it samples."""
    policy.check()
    shape = (1, policy.model.action_horizon, policy.model.action_dim)

    def sample(params, key):
        options = pi0.sampling_options(policy)._replace(keys=key[None])
        if policy.objective.codec is not None:
            options = options._replace(codec=example_codec(1))
        if policy.real_time != RealTimeConfig():
            options = options._replace(previous=Previous(jnp.zeros(shape), jnp.ones(1, int), jnp.ones(1, int)))
        return pi0.sample_actions(objective, params, example_observation(policy.model, 1), jnp.zeros(shape), options)

    jax.eval_shape(sample, meta.unbox(weights), jax.random.key(0))


def _check_draws(objective: Objective, batch: Batch, grad_accum_steps: int, mesh: Mesh) -> None:
    """Refuses an objective whose draws do not divide into microbatches over the devices, as the batch does."""
    draws, _ = jax.eval_shape(objective.draw, batch, jax.random.key(0), 0)
    multiple = grad_accum_steps * sharding.batch_ways(mesh)
    for path, leaf in jax.tree.leaves_with_path(draws):
        if leaf.shape[0] % multiple:
            raise UserError(
                f"the objective's draws{jax.tree_util.keystr(path)} are of {leaf.shape[0]} examples of a batch, which "
                f"do not divide over {sharding.batch_ways(mesh)} devices in {grad_accum_steps} microbatches; take "
                f"another fraction of the batch, or --batch-size, so that they are a multiple of {multiple}."
            )


def _check_random(config: TrainConfig, frozen: frozenset[str]) -> None:
    """Refuses to freeze random weights."""
    random = [name for name in frozen if config.init_from is None or not name.startswith(config.init_parts or "")]
    if random:
        raise UserError(
            f"{len(random)} of {len(frozen)} frozen parameters would stay random, such as {min(random)}: take them "
            "from a checkpoint (--init-from, and --init-parts if that names parts)."
        )
