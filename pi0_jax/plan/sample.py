"""Cost of a chunk of actions on a device that need not be there, by the program that a loaded policy runs."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pi0_jax.batch import Observation, example_codec, example_observation
from pi0_jax.config import ModelConfig, PolicyConfig
from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError
from pi0_jax.inference.sampler import Inputs, check_policy, sampling_function
from pi0_jax.model.fold import folded_shapes, shapes_of
from pi0_jax.model.quantize import Bits, quantize
from pi0_jax.model.target import tracing_for
from pi0_jax.objective import make_objective
from pi0_jax.plan.compile import Compiled, compile_program, placed_bytes
from pi0_jax.plan.devices import Device, estimates, find_devices, usable_memory
from pi0_jax.plan.kernels import Cost, total

CODES = 50
"""Codes that a planned chunk of action tokens is counted with: 30 to 60 are usual for a second (arXiv 2501.09747)."""
SUBTASK = 12
"""Tokens that a planned subtask is counted with: a short sentence."""


class SamplePlan(NamedTuple):
    """One chunk for each of some robots, on one device."""

    topology: str
    device: Device
    cameras: tuple[str, ...]
    batch_size: int
    prompt_length: int
    weights: float
    """Bytes."""
    compiled: Compiled
    written: str | None = None
    """What is written one token after another, such as "50 codes"; None: nothing is."""

    @property
    def cost(self) -> Cost:
        return total(self.compiled.kernels, self.device)

    @property
    def fits(self) -> bool:
        return self.compiled.peak <= usable_memory(self.device)


def make_sample_plan(
    config: PolicyConfig,
    topology: str,
    *,
    cameras: int | None = None,
    batch_size: int = 1,
    prompt_length: int | None = None,
    folded: bool = True,
    bits: Bits | None = None,
) -> SamplePlan:
    """Plans the program of `inference.Policy` for a policy; its weights are not needed.

    Args:
        config: the policy.
        topology: as of `devices.find_devices`; its first device is taken.
        cameras: how many of the model's cameras there are; None: those of the robot.
        batch_size: chunks that are computed together.
        prompt_length: tokens; None: as many as the model takes.
        folded, bits: as of `inference.Policy.load`.

    Raises:
        UserError: unknown topology, no compiler for it, more cameras than the model has, or a sampler whose number of
            steps is decided while it runs.
    """
    known = config.model.cameras
    if cameras is not None and not 1 <= cameras <= len(known):
        raise UserError(f"--cameras {cameras}: the model has {len(known)}, {', '.join(known)}; take 1 to {len(known)}.")
    if batch_size < 1:
        raise UserError(f"--chunks {batch_size}: at least 1 is planned.")
    name, devices, device = find_devices(topology)
    if device is None or estimates(devices, device):
        raise UserError(
            f"a chunk on {name} is planned from the program that XLA compiles for it, which takes its compiler for "
            "NVIDIA GPUs: pip install -e '.[cuda12]'. It needs no GPU and no driver."
        )
    there = get_robot(config.robot).cameras.values() if cameras is None else known[:cameras]
    blank = config.objective.blank_cameras and cameras is None
    present = tuple(name for name in known if blank or name in there)
    model = dataclasses.replace(config.model, cameras=present, attention="xla")
    check_policy(config)
    objective = make_objective(config.objective, model)
    params = folded_shapes(objective.network) if folded else unflatten_dict(shapes_of(objective.network), sep="/")
    if bits is not None:
        params = jax.eval_shape(lambda p: quantize(p, bits), params)
    inputs = Inputs(observation_shapes(model, batch_size, prompt_length), jax.eval_shape(_keys(batch_size)))
    write = config.subtask_every > 0
    codes = config.objective.decodes and config.objective.codec is not None
    rounds = SUBTASK if write else CODES if codes else None
    if rounds is not None:
        inputs = inputs._replace(codec=jax.eval_shape(example_codec))
    mesh = Mesh(devices[:1], ("x",))
    params, inputs = place((params, inputs), mesh)
    with tracing_for("tpu" if device.clock else "gpu"):
        lowered = jax.jit(sampling_function(objective, config, model, config.sampler, write=write)).lower(
            params, inputs
        )
    try:
        compiled = compile_program(lowered, devices[0], device, unknown_rounds=rounds)
    except ValueError as error:
        raise UserError(f"{type(config.sampler).__name__} cannot be planned: {error}.") from error
    length = inputs.observation.prompt.shape[1]
    written = rounds and f"{rounds} {'tokens of a subtask' if write else 'codes'}"
    return SamplePlan(name, device, model.cameras, batch_size, length, placed_bytes(params), compiled, written)


def observation_shapes(model: ModelConfig, batch_size: int, prompt_length: int | None = None) -> Observation:
    """Shapes of observations as a policy prepares them: images uint8, prompts of the given length."""
    shapes = jax.eval_shape(lambda: example_observation(model, batch_size))
    images = {name: x.update(dtype=jnp.uint8) for name, x in shapes.images.items()}
    prompts = {name: getattr(shapes, name) for name in ("prompt", "prompt_mask")}
    if prompt_length is not None:
        prompts = {name: x.update(shape=(batch_size, prompt_length)) for name, x in prompts.items()}
    return shapes._replace(images=images, **prompts)


def place(shapes: Any, mesh: Mesh) -> Any:
    """The shapes, each whole on every device of the mesh."""
    everywhere = NamedSharding(mesh, PartitionSpec())
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes)


def _keys(count: int):
    return lambda: jax.random.split(jax.random.key(0), count)
