"""Whether two checkpoints act alike: one observation, one noise, the same steps through both; and where they diverge.

Everything runs in float32 with exact matrix products, so that what differs is the weights or the implementation.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict
from jaxtyping import Array, Float

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig, ObjectiveConfig
from pi0_jax.convert.formats import OpenCheckpoint, formats
from pi0_jax.convert.verify import Inputs, Runner, Stages
from pi0_jax.errors import UserError
from pi0_jax.model.gemma import Prefix
from pi0_jax.model.head.expert import ExpertNetwork
from pi0_jax.objective import SampleOptions, make_objective
from pi0_jax.sampler import Euler, Greedy

OURS = "ours"
"""Framework in which both sides run in our network."""
STEPS = 10
_SEED = 0


class Trace(NamedTuple):
    """What a model computed from its inputs."""

    actions: np.ndarray
    """After `STEPS` Euler steps, normalised."""
    stages: dict[str, np.ndarray]
    """What was computed on the way, of the first step, in the order of computation; valid tokens only, `[token d]`."""


def check_comparable(source: OpenCheckpoint, result: OpenCheckpoint, to: str, framework: str) -> None:
    """Raises UserError where the two cannot be run on the same inputs, or not by that framework."""
    before, after = source.policy.model, result.policy.model
    if "pi0_fast" in (before.variant, after.variant):
        raise UserError(
            f"--verify-with compares the actions of action experts, and {source.path} has none; leave it out. The "
            "tensors are compared bit for bit all the same."
        )
    if before.action_horizon != after.action_horizon or len(after.cameras) < len(before.cameras):
        raise UserError("--verify-with cannot compare actions across another --horizon, or with fewer cameras.")
    if after.prompt_length < before.prompt_length:
        raise UserError("--verify-with cannot compare actions with a shorter --prompt-length.")
    if framework != OURS:
        if framework not in (source.format, to):
            raise UserError(
                f"--verify-with {framework} needs a {framework} folder on one side; this goes from {source.format} to "
                f"{to}."
            )
        _runner(framework).check_installed()


def agreement(source: OpenCheckpoint, result: OpenCheckpoint, framework: str, tolerance: float) -> dict[str, Any]:
    """Runs source and result, one after the other, and compares what they do.

    Args:
        source, result: of a conversion.
        framework: a format whose own folders run in its framework; everything else runs here, with that framework's
            flow times. "ours": both run here.
        tolerance: largest difference of normalised actions that counts as agreement.

    Returns:
        A JSON object: the largest difference, whether it is tolerated, and if not, where the two diverge first.
    """
    before, after = source.policy.model, result.policy.model
    inputs = example(before)
    a = run(source, inputs, framework)
    b = run(result, widened(inputs, before, after), framework)
    difference = float(np.max(np.abs(a.actions - b.actions[..., : before.action_dim])))
    agree = bool(difference <= tolerance)  # not so where it is nan
    return {
        "framework": framework,
        "largest_difference": difference,
        "tolerance": tolerance,
        "agree": agree,
        "diverges_at": None if agree else first_difference(a.stages, b.stages, tolerance),
        "steps": STEPS,
        "seed": _SEED,
    }


def first_difference(a: dict[str, np.ndarray], b: dict[str, np.ndarray], tolerance: float) -> str:
    """The first stage whose relative difference in the L2 norm is above the tolerance, and how large it is."""
    for name, x in a.items():
        if name not in b:
            continue
        y = b[name][..., : x.shape[-1]]
        if x.shape != y.shape:
            return f"{name}: shapes {x.shape} and {y.shape}"
        relative = float(np.linalg.norm(x - y) / max(float(np.linalg.norm(x)), 1e-30))
        if not relative <= tolerance:
            return f"{name}: relative difference {relative:.3g}"
    return "the solver's steps, after the first"


def example(model: ModelConfig) -> Inputs:
    """Two random observations, and noise. The second lacks a camera, where there are several, and has half a prompt."""
    rng, size = np.random.default_rng(_SEED), model.vision.image_size
    found: Inputs = {}
    for i in range(len(model.cameras)):
        found[f"images/{i}"] = rng.uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
        found[f"image_masks/{i}"] = np.array([True, i == 0 or i + 1 < len(model.cameras)])
    found["tokens"] = rng.integers(0, model.vocab_size, (2, model.prompt_length)).astype(np.int32)
    found["token_mask"] = np.arange(model.prompt_length) < np.array([[model.prompt_length], [model.prompt_length // 2]])
    found["state"] = rng.normal(size=(2, model.action_dim)).astype(np.float32)
    found["noise"] = rng.normal(size=(2, model.action_horizon, model.action_dim)).astype(np.float32)
    return found


def widened(inputs: Inputs, before: ModelConfig, after: ModelConfig) -> Inputs:
    """The same inputs for a model that was grown: new cameras are absent, new tokens padding, new dimensions zero."""
    found = dict(inputs)
    for i in range(len(before.cameras), len(after.cameras)):
        found[f"images/{i}"] = np.zeros_like(inputs["images/0"])
        found[f"image_masks/{i}"] = np.zeros(len(inputs["state"]), bool)
    lengths = dict.fromkeys(("tokens", "token_mask"), after.prompt_length)
    lengths |= dict.fromkeys(("state", "noise"), after.action_dim)
    for name, length in lengths.items():
        array = inputs[name]
        found[name] = np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, length - array.shape[-1])])
    return found


def run_ours(opened: OpenCheckpoint, inputs: Inputs, times: tuple[float, ...] | None = None) -> Trace:
    """Runs a checkpoint of any format in our network.

    `times` are those of the equal steps, embedded in double precision, as the PyTorch implementations do; None: as ours
    does.
    """
    model = dataclasses.replace(opened.policy.model, dtype="float32", remat="none")
    params = unflatten_dict(
        {path: jnp.asarray(tensor.read(None), jnp.float32) for path, tensor in opened.tensors.items()}, sep="/"
    )
    observation = Observation(
        {name: jnp.asarray(inputs[f"images/{i}"]) for i, name in enumerate(model.cameras)},
        {name: jnp.asarray(inputs[f"image_masks/{i}"]) for i, name in enumerate(model.cameras)},
        jnp.asarray(inputs["state"]),
        jnp.asarray(inputs["tokens"]),
        jnp.asarray(inputs["token_mask"]),
    )
    noise = jnp.asarray(inputs["noise"])
    objective, arguments = opened.policy.objective, (params, observation, noise)
    network = _network(objective, model, times is not None)
    with jax.default_matmul_precision("highest"):
        found = jax.device_get(_stages(network, *arguments))
        if times is None:
            actions = _sample(objective, model, *arguments)
        else:
            actions = _euler(network, *arguments, jnp.asarray(times, jnp.float32))
    return Trace(np.asarray(actions), valid_stages(found, _present(inputs, model)))


def valid_stages(found: Stages, cameras: np.ndarray) -> dict[str, np.ndarray]:
    """Names what was computed and leaves out what is padding, which implementations fill in different ways.

    `found` has any of image_layers `[L c*b s d]`, tokens and mask `[b s d]` and `[b s]`, values `[l b s d]` with
    values_mask `[b s]`, pooled and velocity; `cameras` says which images are there, `[c*b]`.
    """
    stages = {f"image encoder, layer {i}": x[cameras] for i, x in enumerate(found.get("image_layers", ()))}
    stages["image and prompt tokens"] = found["tokens"][found["mask"]]
    for i, x in enumerate(found.get("values", ())):
        stages[f"backbone, values of layer {i}"] = x[found["values_mask"]]
    names = {"pooled": "pooled observation", "velocity": "first velocity"}
    return stages | {names[key]: found[key] for key in names if key in found}


class DoubleTime(ExpertNetwork):
    """Our network with the flow time embedded in double precision, as in the PyTorch implementations.

    openpi's JAX, and so ours, does it in single precision, where the shortest period turns a rounding of the frequency
    into 1e-4 of the embedding: with steep weights that is most of what the actions differ by.
    """

    def embed_time(self, time: Float[Array, "*time"]) -> Float[Array, "*time e"]:
        width = self.config.action.width
        period = 4e-3 * 1000.0 ** np.linspace(0.0, 1.0, width // 2)

        def embed(time) -> np.ndarray:
            angle = np.asarray(time, np.float64)[..., None] * (2 * np.pi / period)
            return np.concatenate([np.sin(angle), np.cos(angle)], axis=-1).astype(np.float32)

        return jax.pure_callback(embed, jax.ShapeDtypeStruct((*time.shape, width), jnp.float32), time)


def _runner(framework: str) -> Runner:
    runner = formats()[framework].runner
    assert runner is not None, framework
    return runner


def run(opened: OpenCheckpoint, inputs: Inputs, framework: str) -> Trace:
    """Runs a checkpoint in a framework, if it is of its format; else in our network, at the framework's flow times."""
    if framework == opened.format:
        model = opened.policy.model
        actions, found = _runner(framework).run(opened.path, model, inputs, STEPS)
        return Trace(actions, valid_stages(found, _present(inputs, model)))
    return run_ours(opened, inputs, None if framework == OURS else _runner(framework).times(STEPS))


def _present(inputs: Inputs, model: ModelConfig) -> np.ndarray:
    """Which images are there, `[c*b]`."""
    return np.array([inputs[f"image_masks/{i}"] for i in range(len(model.cameras))]).reshape(-1)


def _network(config: ObjectiveConfig, model: ModelConfig, double: bool) -> Any:
    """The objective's network; with `double`, the flow time is embedded in double precision."""
    network = make_objective(config, model).network
    return DoubleTime(network.config, network.span) if double and isinstance(network, ExpertNetwork) else network


@functools.partial(jax.jit, static_argnums=(0, 1))
def _sample(config: ObjectiveConfig, model: ModelConfig, params: Any, observation, noise) -> jax.Array:
    objective = make_objective(config, model)
    sampler = Greedy() if objective.flow is None else Euler(STEPS)
    return objective.sample(params, observation, noise, SampleOptions(sampler))


@functools.partial(jax.jit, static_argnums=0)
def _euler(network: Any, params: Any, observation, noise, times: jax.Array) -> jax.Array:
    """Samples by equal steps whose velocities are evaluated at these times."""
    prefix = network.prefill(params, observation)

    def step(x: jax.Array, time: jax.Array) -> tuple[jax.Array, None]:
        velocity = network.velocity(params, prefix, x, jnp.broadcast_to(time, len(x)))
        return x + jnp.float32(-1 / STEPS) * velocity, None

    return jax.lax.scan(step, noise, times)[0]


@functools.partial(jax.jit, static_argnums=0)
def _stages(network: Any, params: Any, observation, noise) -> Stages:
    """What `valid_stages` takes, of one evaluation at time 1."""
    streams: dict[str, Any] = {}
    tokens, mask = network.embed_prefix(params, observation, record=streams.__setitem__)
    found = {"tokens": tokens, "mask": mask}
    if network.config.cameras:
        found["image_layers"] = streams["image_encoder/layers"]
    prefix: Any = network.prefill(params, observation)
    time = jnp.ones(len(noise))
    if isinstance(network, ExpertNetwork):
        values, mask = _first_step(network, params, prefix, noise, time)
        found |= {"values": values, "values_mask": mask}
    elif not isinstance(prefix, Prefix):
        found["pooled"] = prefix
    if hasattr(network, "velocity"):
        found["velocity"] = network.velocity(params, prefix, noise, time)
    return found


def _first_step(network: ExpertNetwork, params: Any, prefix: Prefix, noise, time):
    """The attention's values of all layers at the prefix, the state and the actions, and which of them are valid.

    Values are not rotated, so they are the same in every implementation.
    """
    actions = network.embed_actions(params, noise, network.time_features(params, time))
    prefix = prefix._replace(layout=None)  # without padding
    keys_values: Any = prefix.keys_values, network.run_against(params, prefix, *actions)[1]
    (_, cached), (_, own) = keys_values  # stacked by layers, as these weights are
    values = jnp.concatenate([cached, own], axis=2)
    mask = jnp.concatenate([prefix.mask, jnp.ones(own.shape[1:3], bool)], axis=1)
    return values.reshape(*values.shape[:3], -1), mask
