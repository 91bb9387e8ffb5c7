"""π0 on one page: where the network and the flow meet.

Everything left of this file knows nothing about training; everything right of it nothing about how velocities are made.
The baselines that flow matching is compared with, diffusion and discretised actions, are in `baselines.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from pi0_jax import baselines
from pi0_jax.batch import Batch, Observation
from pi0_jax.config import FlowConfig, ModelConfig, PolicyConfig, RealTimeConfig
from pi0_jax.flow import diffusion
from pi0_jax.flow.coupling import couple
from pi0_jax.flow.grid import warped_grid
from pi0_jax.flow.guidance import (
    Previous,
    classifier_free,
    continue_prefix,
    identity_real_time_chunking,
    is_prefix,
    real_time_chunking,
)
from pi0_jax.flow.loss import counted_entries, flow_loss
from pi0_jax.flow.path import Velocity, interpolate
from pi0_jax.flow.shortcut import sample_spans, taught_span, two_steps
from pi0_jax.flow.solvers import TABLEAUS, Solver, check_solver, integrate
from pi0_jax.flow.straightness import straightness
from pi0_jax.flow.time import sample_time
from pi0_jax.model.heads import Network

Condition = Literal["prompt", "images", "both"]


def init_params(network: Network, key: PRNGKeyArray):
    """Random parameters as linen's boxed tree, which carries the logical axis names (`flax.linen.meta.unbox`)."""
    return network.init(key)


def example_inputs(config: ModelConfig, batch_size: int) -> tuple[Observation, Array, Array]:
    """Zeros in the shapes that the network takes: observation, noisy chunk, time."""
    size = config.vision.image_size
    observation = Observation(
        images={name: jnp.zeros((batch_size, size, size, 3)) for name in config.cameras},
        image_masks={name: jnp.ones(batch_size, bool) for name in config.cameras},
        state=jnp.zeros((batch_size, config.action_dim)),
        prompt=jnp.zeros((batch_size, config.prompt_length), jnp.int32),
        prompt_mask=jnp.ones((batch_size, config.prompt_length), bool),
    )
    return observation, jnp.zeros((batch_size, config.action_horizon, config.action_dim)), jnp.zeros(batch_size)


class Examples(NamedTuple):
    """Examples, and what was drawn at random for them. The first axis of every array counts examples.

    All that depends on the whole batch has been decided, so the loss of a part of them is its part of the loss.
    """

    batch: Batch
    drop: Float[Array, "b"]
    """In [0, 1): decides what of the observation is dropped."""
    noise: Float[Array, "b s ah ad"]
    time: Float[Array, "b s"]
    span: Float[Array, "b s"]
    """Of the average velocity; 0 where the velocity itself is learned."""
    delay: Int[Array, "b s"]
    """Actions that are given clean (`ModelConfig.max_delay`)."""


def loss(
    network: Network, params, batch: Batch, key: PRNGKeyArray, flow: FlowConfig, teacher=None
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Conditional flow-matching loss: how far the network's velocity is from noise - actions at random points.

    Args:
        network, params: the network and its (unboxed) parameters.
        batch: normalised examples; images uint8 or in [-1, 1].
        key: for noise, times, and what else is drawn.
        flow: time distribution, draws an observation, coupling, what is dropped, what counts.
        teacher: parameters of a network of the same configuration whose flow makes the actions from the noise (reflow);
            None: the actions are the batch's.

    Returns:
        The scalar loss of what the network predicts, and metrics: `loss` again.
    """
    examples, total = draw(network.config, batch, key, flow, reflow=teacher is not None)
    value = error(network, params, examples, total, flow, teacher)
    return value, {"loss": value}


def draw(
    config: ModelConfig, batch: Batch, key: PRNGKeyArray, flow: FlowConfig, *, reflow: bool = False
) -> tuple[Examples, Int[Array, ""]]:
    """The random half of `loss`: what it draws for a whole batch, and how many entries of it count."""
    # The first two keys came first: runs of older versions draw the same noise.
    noise_key, time_key = jax.random.split(key)
    drop_key, couple_key, span_key, delay_key = (jax.random.fold_in(key, i) for i in (2, 3, 4, 5))
    b, horizon, dim = batch.actions.shape
    drop = jax.random.uniform(drop_key, (b,))
    noise = jax.random.normal(noise_key, (b, flow.samples_per_observation, horizon, dim))
    time = sample_time(time_key, noise.shape[:2], flow.time, flow.beta_alpha)
    span, delay = jnp.zeros_like(time), jax.random.randint(delay_key, time.shape, 0, config.max_delay + 1)
    if reflow:
        # One pair an observation, at several times: making it costs a whole sampling.
        noise = jnp.broadcast_to(noise[:, :1], noise.shape)
    elif flow.coupling != "independent":
        observation = drop_conditions(scale_images(batch.observation), drop, flow)
        noise = coupled_noise(noise, batch.actions, observation, couple_key, flow)
    if flow.mean_draw:
        noise, time = noise.at[:, 0].set(0.0), time.at[:, 0].set(1.0)
    if config.prediction == "average_velocity":
        # The first examples learn to make one step of two; the others the velocity itself, at span 0.
        taught = taught_examples(b, flow)
        times, spans = sample_spans(span_key, (taught, noise.shape[1]))
        time, span = time.at[:taught].set(times), span.at[:taught].set(spans)
    examples = Examples(batch, drop, noise, time, span, delay)
    if config.prediction in baselines.BINS:
        return examples, jnp.sum(baselines.counted_bins(config, batch, flow))
    return examples, jnp.sum(counted_entries(noise.shape, *_masks(config, examples, flow)))


def error(
    network: Network, params, examples: Examples, total: Int[Array, ""], flow: FlowConfig, teacher=None, parts: int = 1
) -> Float[Array, ""]:
    """The other half of `loss`: a part's share of it. The shares of all parts add up to the loss of the batch.

    Args:
        examples, total: of `draw`; every `parts`-th example of them.
        parts: how many parts there are.
    """
    config, batch = network.config, examples.batch
    observation = drop_conditions(scale_images(batch.observation), examples.drop, flow)
    if config.prediction in baselines.BINS:
        return baselines.bins_loss(network, params, observation, batch, flow, total)
    noise, time = examples.noise, examples.time
    actions: Any = batch.actions
    if teacher is not None:
        actions: Any = sample_actions(network, teacher, batch.observation, noise[:, 0], num_steps=flow.reflow_steps)
    actions = jnp.broadcast_to(jax.lax.stop_gradient(actions)[:, None], noise.shape)
    predict: Any = functools.partial(network.joint, params)
    if config.prediction in ("epsilon", "v"):
        x, target = diffusion.diffuse(actions, noise, time, config.prediction)
        predicted = predict(observation, x, time)
    elif config.prediction == "average_velocity":
        x, target = interpolate(actions, noise, time)
        taught = taught_examples(len(noise) * parts, flow) // parts
        first, *start = jax.tree.map(lambda leaf: leaf[:taught], (observation, x, time, examples.span))
        target = target.at[:taught].set(two_steps(functools.partial(predict, first), *start))
        predicted = predict(observation, x, time, examples.span)
    else:
        if config.max_delay:
            time = jnp.where(is_prefix(examples.delay, noise.shape[2]), 0.0, time[..., None])
        x, target = interpolate(actions, noise, time)
        predicted = predict(observation, x, time)
    return flow_loss(predicted, target, *_masks(config, examples, flow), total=total)


def taught_examples(batch_size: int, flow: FlowConfig) -> int:
    """How many examples of a batch, the first ones, teach a shortcut model to make one step of two."""
    return max(1, round(flow.shortcut_share * batch_size))


def _masks(config: ModelConfig, examples: Examples, flow: FlowConfig):
    """Which steps and which dimensions count, as `flow_loss` takes them."""
    batch = examples.batch
    steps = batch.step_mask[:, None] if flow.mask_padded_steps else None
    if config.max_delay and config.prediction == "velocity":
        given = is_prefix(examples.delay, batch.actions.shape[1])
        steps = ~given if steps is None else steps & ~given
    return steps, batch.dim_mask[:, None] if flow.mask_padded_dims else None


def sample_actions(
    network: Network,
    params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    *,
    num_steps: int = 10,
    solver: str = "euler",
    grid_power: float = 1.0,
    guidance_scale: float | Float[Array, ""] = 1.0,
    guidance_without: Condition = "prompt",
    clip: float = 3.0,
    keys: PRNGKeyArray | None = None,
    path: bool = False,
    previous: Previous | None = None,
    real_time: RealTimeConfig | None = None,
    unroll: bool = False,
):
    """Turns noise into action chunks.

    Noise is an argument and not drawn here, because parity tests and servers both want to choose it.

    Args:
        network, params: the network and its (unboxed) parameters.
        observation: images uint8 or in [-1, 1].
        noise: standard normal; discretised actions do not look at it.
        num_steps, solver: how to get from t = 1 to t = 0.
        grid_power: of the times of the steps (`flow.grid.warped_grid`).
        guidance_scale: of classifier-free guidance. The number 1 means none, at no cost; a traced one always costs
            twice the network's work.
        guidance_without: what the unguided half is not told.
        clip: largest absolute value that a diffusion's guess at the actions keeps on the way; flows have no use for it.
        keys: one a chunk, for the noise that `ddpm` adds on the way.
        path: also return the points on the way, `[num_steps + 1, b, ah, ad]`.
        previous: what is left of the chunks that are being executed, for the new ones to go on from.
        real_time: how they do; its `max_guidance` may be traced. None: guidance, as `RealTimeConfig` has it.
        unroll: a flow's steps as a straight-line program instead of a loop.

    Returns:
        Normalised, padded actions `[b ah ad]`, float32 (and the path).

    Raises:
        ValueError: a solver, grid, guidance or previous chunk that does not suit the network; ddpm without keys.
    """
    prediction = network.config.prediction
    guided = not (isinstance(guidance_scale, float | int) and guidance_scale == 1)
    check_sampling(prediction, solver, num_steps, grid_power, guided)
    real_time = real_time or RealTimeConfig()
    if previous is not None:
        check_real_time(network.config, real_time)
    if solver == "ddpm" and keys is None and prediction in ("epsilon", "v"):
        raise ValueError("ddpm adds noise on the way: give `keys`, one a chunk; ddim needs none.")
    observation = scale_images(observation)
    if prediction in baselines.BINS:
        actions = baselines.decode_bins(network, params, observation)
        return (actions, actions[None]) if path else actions
    if guided:
        told, untold = observation, without(observation, guidance_without)
        observation = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), told, untold)
    prefix = network.prefill(params, observation)
    span = (taught_span(num_steps),) if prediction == "average_velocity" else ()

    def velocity(x, time) -> Any:
        return network.velocity(params, prefix, x, *map(jnp.float32, (time, *span)))

    steered = classifier_free(velocity, guidance_scale) if guided else velocity
    if prediction in ("epsilon", "v"):
        return diffusion.denoise(
            steered, noise, num_steps, prediction, keys=keys if solver == "ddpm" else None, clip=clip, path=path
        )
    if previous is not None:
        steered, noise = continued(steered, noise, previous, real_time)
    steps = num_steps if grid_power == 1 else warped_grid(num_steps, grid_power)
    return integrate(steered, noise, steps, cast(Solver, solver), path=path, unroll=unroll)


def continued(
    velocity: Velocity, noise: Float[Array, "b ah ad"], previous: Previous, real_time: RealTimeConfig
) -> tuple[Velocity, Float[Array, "b ah ad"]]:
    """A velocity, and noise, whose samples go on from the previous chunks."""
    if real_time.method == "trained":
        return continue_prefix(velocity, previous, noise)
    pull = real_time_chunking if real_time.method == "guidance" else identity_real_time_chunking
    return pull(velocity, previous, real_time.schedule, real_time.max_guidance), noise


def flow_straightness(
    network: Network, params, batch: Batch, key: PRNGKeyArray, num_steps: int = 20
) -> Float[Array, ""]:
    """How straight the flow's paths are on a batch, by `flow.straightness`, over Euler steps from fresh noise."""
    noise = jax.random.normal(key, batch.actions.shape)
    _, points = sample_actions(network, params, batch.observation, noise, num_steps=num_steps, path=True)
    return straightness(points)


def sampling_options(config: PolicyConfig) -> dict[str, Any]:
    """The keyword arguments of `sample_actions` that a policy's configuration sets."""
    names = ("num_steps", "solver", "grid_power", "guidance_scale", "guidance_without")
    # Where actions lie: between the percentiles that became -1 and 1, or within three standard deviations.
    clip = 1.0 if config.normalization == "quantile" else 3.0
    return {name: getattr(config, name) for name in names} | {"clip": clip}


def check_policy(config: PolicyConfig) -> None:
    """Raises ValueError for settings that do not go together."""
    guided = config.guidance_scale != 1
    check_max_delay(config.model)
    if config.real_time != RealTimeConfig():
        check_real_time(config.model, config.real_time)
    check_sampling(config.model.prediction, config.solver, config.num_steps, config.grid_power, guided)
    if config.model.prediction in baselines.BINS and config.normalization != "quantile":
        raise ValueError(
            f"prediction {config.model.prediction!r} has its bins between the 1st and the 99th percentile, which takes "
            f"quantile normalisation; it is {config.normalization!r} (--policy.normalization quantile)."
        )


def check_max_delay(model: ModelConfig) -> None:
    """Raises ValueError for training-time real-time chunking that cannot be."""
    if not 0 <= model.max_delay < model.action_horizon:
        raise ValueError(
            f"max_delay is {model.max_delay}; of a chunk of {model.action_horizon} actions at most "
            f"{model.action_horizon - 1} can be given, and 0 means none."
        )
    if model.max_delay and (model.prediction, model.head) != ("velocity", "expert"):
        raise ValueError(
            f"max_delay is {model.max_delay}, which takes a velocity network with an action expert, where each action "
            f"has its own time; this one has the head {model.head!r} and predicts {model.prediction}."
        )


def check_real_time(model: ModelConfig, real_time: RealTimeConfig) -> None:
    """Raises ValueError for a network that cannot go on from a previous chunk in this way."""
    if model.prediction != "velocity":
        raise ValueError(f"real-time chunking steers a velocity; this network predicts {model.prediction}.")
    if real_time.method not in ("guidance", "identity", "trained"):
        raise ValueError(f"unknown real_time.method {real_time.method!r}; choose guidance, identity or trained.")
    if real_time.method == "trained" and not model.max_delay:
        raise ValueError(
            "real_time.method is 'trained', but this network was not trained to go on from clean actions. Train or "
            "fine-tune it with --policy.model.max-delay, or choose guidance."
        )


def check_sampling(prediction: str, solver: str, num_steps: int, grid_power: float = 1.0, guided: bool = False) -> None:
    """Raises ValueError for what does not exist or does not suit the prediction, or fewer than one step."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; a solver needs at least 1 step.")
    warped_grid(num_steps, grid_power)
    if grid_power != 1 and prediction != "velocity":
        raise ValueError(f"grid_power is {grid_power}; a network that predicts {prediction} is sampled in equal steps.")
    if prediction in baselines.BINS:
        if guided:
            raise ValueError(f"guidance steers a flow or a diffusion; this network predicts {prediction}.")
        return
    suited = ("ddim", "ddpm") if prediction in ("epsilon", "v") else tuple(TABLEAUS)
    suited = ("euler",) if prediction == "average_velocity" else suited
    if solver not in suited:
        if solver not in (*TABLEAUS, "ddim", "ddpm"):
            check_solver(solver, num_steps)
        raise ValueError(f"a network that predicts {prediction} is sampled by {' or '.join(suited)}, not {solver}.")


def without(observation: Observation, what: Condition, where: Bool[Array, "b"] | bool = True) -> Observation:
    """The observation with the prompt, the images, or both masked, in the examples that `where` names."""
    keep = jnp.logical_not(jnp.asarray(where))
    if what in ("images", "both"):
        masks = {name: mask & keep for name, mask in observation.image_masks.items()}
        observation = observation._replace(image_masks=masks)
    if what in ("prompt", "both"):
        observation = observation._replace(prompt_mask=observation.prompt_mask & keep[..., None])
    return observation


def drop_conditions(observation: Observation, draw: Float[Array, "b"], flow: FlowConfig) -> Observation:
    """Masks prompt, images or both of some examples, each with its own probability (`FlowConfig.drop_…`).

    Args:
        observation: to be masked.
        draw: of each example, uniform in [0, 1).
        flow: the probabilities.
    """
    if not (flow.drop_prompt or flow.drop_images or flow.drop_both):
        return observation
    shares = jnp.cumsum(jnp.array([flow.drop_prompt, flow.drop_images, flow.drop_both]))
    kinds: tuple[Condition, ...] = ("prompt", "images", "both")
    low = 0.0
    for what, high in zip(kinds, shares, strict=True):
        observation = without(observation, what, (draw >= low) & (draw < high))
        low = high
    return observation


def coupled_noise(
    noise: Float[Array, "b s ah ad"],
    actions: Float[Array, "b ah ad"],
    observation: Observation,
    key: PRNGKeyArray,
    flow: FlowConfig,
) -> Float[Array, "b s ah ad"]:
    """The noise of each draw in the order that `flow.coupling` gives it, charging for a change of observation."""
    condition = condition_features(observation)

    def one_draw(noise, key):
        return couple(noise, actions, condition, key, flow.coupling, condition_weight=flow.condition_weight)

    return jax.vmap(one_draw, in_axes=(1, 0), out_axes=1)(noise, jax.random.split(key, noise.shape[1]))


def condition_features(observation: Observation) -> Float[Array, "b c"]:
    """An observation as numbers whose squared distances tell observations apart, for couplings.

    State, which tokens the prompt has, and each image averaged over an 8 x 8 grid; another prompt, or a change of one
    in the state or throughout an image, counts about one or more.
    """
    words = jax.nn.one_hot(observation.prompt % 512, 512) * observation.prompt_mask[..., None]
    parts = [observation.state, jnp.max(words, axis=1)]
    for name, image in sorted(observation.images.items()):
        b, h, w, _ = image.shape
        small = jax.image.resize(image, (b, min(h, 8), min(w, 8), 3), "linear")
        parts.append(jnp.where(observation.image_masks[name][:, None], small.reshape(b, -1) / 8, 0.0))
    return jnp.concatenate(parts, axis=-1)


def scale_images(observation: Observation) -> Observation:
    """uint8 images to float32 in [-1, 1]; float images pass unchanged."""
    images = {
        name: image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 if image.dtype == jnp.uint8 else image
        for name, image in observation.images.items()
    }
    return observation._replace(images=images)
