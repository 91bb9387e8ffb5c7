"""The network of π0 and π0.5 on rewritten weights (`rewrite.py`): what a policy runs.

`FastNetwork` stands where `VelocityNetwork` does in `pi0.sample_actions`, with the same numbers up to rounding. Layers
are scanned where they come as stacks, and straight-line where they come as lists. What depends on the flow time alone
can be computed once for a whole grid of Euler steps (`time_tables`) and is looked up then.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig, VisionConfig
from pi0_jax.inference.rewrite import Quantized, Weights
from pi0_jax.model.attention import Kernel, attend, rope_angles, turn
from pi0_jax.model.norm import EPSILON
from pi0_jax.model.siglip import sincos2d
from pi0_jax.model.velocity import embed_time


class FastPrefix(NamedTuple):
    """What `velocity` needs of an observation."""

    keys_values: Any
    """Rotated keys and values of every layer, `[l b s k h]` each; or a list over layers."""
    mask: Bool[Array, "b s"]
    length: Int[Array, "b"]
    state: tuple[Float[Array, "b 1 e"], ...]
    """π0's state token, which runs beside the actions: it costs them nothing, and spares a pass of its own."""


@dataclasses.dataclass(frozen=True)
class FastNetwork:
    """The methods of `VelocityNetwork` that sampling calls.

    Args:
        config: of the model, with those cameras alone that are there.
    """

    config: ModelConfig

    def apply(self, variables: dict[str, Weights], *args: Any, method: str) -> Any:
        """Calls a method on weights, as linen modules do."""
        return getattr(self, method)(variables["params"], *args)

    def clone(self, config: ModelConfig) -> FastNetwork:
        return FastNetwork(config)

    def prefill(self, weights: Weights, observation: Observation) -> FastPrefix:
        """All that depends on neither the noisy chunk nor the time."""
        c = self.config
        tokens, mask = self._embed(weights, observation)
        angles = rope_angles(jnp.cumsum(mask, axis=1) - 1, c.head_dim)
        rotation = jnp.sin(angles), jnp.cos(angles)

        b, s, _ = tokens.shape
        allowed = jnp.broadcast_to(mask[:, None], (b, s, s))

        def layer(x, w):
            return _layer(c, w, x, None, rotation, allowed)

        tokens, keys_values = _through(layer, tokens, weights["language"])
        kv = _dot(_normed(tokens)[0], weights["language_last"]["kv"]).reshape(b, s, 2, c.num_kv_heads, c.head_dim)
        last = turn(kv[:, :, 0], *rotation), kv[:, :, 1]
        if isinstance(weights["language"], list):
            keys_values = [*keys_values, last]
        else:
            keys_values = jax.tree.map(lambda first, y: jnp.concatenate([first, y[None]]), keys_values, last)
        state = ()
        if c.variant == "pi0":
            state = (_linear(observation.state, weights["state_in"])[:, None].astype(self._dtype),)
        return FastPrefix(keys_values, mask, jnp.sum(mask, axis=1), state)

    def velocity(
        self, weights: Weights, prefix: FastPrefix, x: Float[Array, "b ah ad"], time: Float[Array, "b *ah"]
    ) -> Float[Array, "b ah ad"]:
        """dx/dt, float32.

        With `tables` in the weights, all times are the same one, of the tables' grid.
        """
        c = self.config
        tables = weights.get("tables")
        if tables is None:
            of_time = self.embed_time(weights, time)
        else:
            steps = len(jax.tree.leaves(tables)[0])
            index = jnp.round((1 - time.reshape(-1)[0]) * steps).astype(jnp.int32)
            of_time = jax.tree.map(lambda table: table[index], tables)
        actions = _linear(x.astype(jnp.float32), weights["action_in"])
        if c.variant == "pi0":
            actions = _linear(nn.swish(actions + of_time["token"]), weights["time_mlp_out"])
        tokens = jnp.concatenate([*prefix.state, actions.astype(self._dtype)], axis=1)
        b, length, _ = tokens.shape
        angles = rope_angles(prefix.length[:, None] + jnp.arange(length), c.head_dim)
        rotation = jnp.sin(angles), jnp.cos(angles)
        # The state sees no actions.
        own = jnp.arange(length) < jnp.where(jnp.arange(length) < len(prefix.state), 1, length)[:, None]
        mask = jnp.concatenate(
            [
                jnp.broadcast_to(prefix.mask[:, None], (b, length, prefix.mask.shape[1])),
                jnp.broadcast_to(own, (b, length, length)),
            ],
            axis=-1,
        )

        def layer(x, inputs):
            w, modulation, cached = inputs
            return _layer(c, w, x, cached, rotation, mask, modulation)

        inputs: Any = (weights["action"], of_time.get("layers"), prefix.keys_values)
        if isinstance(weights["action"], list):
            inputs = list(zip(inputs[0], inputs[1] or [None] * c.depth, inputs[2], strict=True))
        tokens, _ = _through(layer, tokens, inputs)
        outputs, _ = _normed(tokens[:, len(prefix.state) :], of_time.get("final"))
        return _linear(outputs.astype(jnp.float32), weights["action_out"])

    def embed_time(self, weights: Weights, time: Float[Array, "*b"]) -> dict[str, Any]:
        """What the network needs of flow times: π0 a summand of its action tokens, `token`; π0.5 what its adaptive
        norms do, `layers` (scale, shift and gate of both norms of a layer) and `final`."""
        embedded = embed_time(time, self.config.action.width)
        if self.config.variant == "pi0":
            token = embedded @ weights["time_mlp_in"]["kernel"]
            return {"token": token[:, None] if time.ndim == 1 else token}
        condition = nn.swish(_linear(embedded, weights["time_mlp_in"]))
        condition = nn.swish(_linear(condition, weights["time_mlp_out"])).astype(self._dtype)
        condition = condition[:, None] if time.ndim == 1 else condition

        def of_layer(w):
            kernel, bias = w["modulation_kernel"], w["modulation_bias"]
            return jnp.stack([condition @ kernel[i] + bias[i] for i in range(2)])

        layers = weights["action"]
        found = list(map(of_layer, layers)) if isinstance(layers, list) else jax.lax.map(of_layer, layers)
        return {"layers": found, "final": _linear(condition, weights["final_modulation"])}

    def time_tables(self, weights: Weights, num_steps: int) -> dict[str, Any]:
        """`embed_time` of every step of Euler's equal grid, added up in float32 as the solver does; steps come first.

        They join the weights as `tables`.
        """
        times, time = [], jnp.float32(1.0)
        for _ in range(num_steps):
            times.append(time)
            time = time + jnp.float32(-1.0 / num_steps)
        return jax.lax.map(lambda t: self.embed_time(weights, t[None]), jnp.stack(times))

    def _embed(self, weights: Weights, observation: Observation) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Image tokens of all cameras as one batch, then prompt tokens; and which of them are valid."""
        c = self.config
        tokens, masks = [], []
        if c.cameras:
            images = jnp.concatenate([observation.images[name] for name in c.cameras])
            encoded = encode_images(c.vision, weights["vision"], images, self._dtype, c.attention)
            for name, image in zip(c.cameras, jnp.split(encoded, len(c.cameras)), strict=True):
                tokens.append(image)
                masks.append(jnp.broadcast_to(observation.image_masks[name][:, None], image.shape[:2]))
        prompt = weights["embedding"][observation.prompt]
        tokens.append((prompt * jnp.sqrt(c.language.width).astype(prompt.dtype)).astype(self._dtype))
        masks.append(observation.prompt_mask)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)

    @property
    def _dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)


def encode_images(
    config: VisionConfig, weights: Weights, images: Float[Array, "b y x 3"], dtype: jnp.dtype, kernel: Kernel = "xla"
) -> Float[Array, "b s d"]:
    """SigLIP and the projector: images in [-1, 1] to tokens of the language expert."""
    x = images.astype(jnp.float32)
    patch = config.patch_size
    if config.stem_width:
        x = _patches(x, config.stem_stride, weights["stem"])
        norm = weights["stem_norm"]
        x = nn.gelu(_centred(x) * norm["scale"] + norm["bias"])
        patch //= config.stem_stride
    x = _patches(x, patch, weights["patch_embedding"])
    b, rows, columns, d = x.shape
    position = weights["position"] if config.position == "learned" else sincos2d(rows, columns, d)
    x = (x.reshape(b, rows * columns, d) + position).astype(dtype)
    heads = (3, config.num_heads, d // config.num_heads)

    def block(x, w):
        qkv = (_dot(_centred(x), w["qkv"]) + w["qkv_bias"].astype(dtype)).reshape(*x.shape[:2], *heads)
        attended = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], scale=1, kernel=kernel)
        x += _dot(attended.reshape(x.shape), w["o"]) + w["o_bias"].astype(dtype)
        y = nn.gelu(_dot(_centred(x), w["up"]) + w["up_bias"].astype(dtype))
        return x + _dot(y, w["down"]) + w["down_bias"].astype(dtype), None

    x, _ = _through(block, x, weights["layers"])
    return _dot(_centred(x), weights["project"]) + weights["project_bias"].astype(dtype)


def _layer(c: ModelConfig, w: Weights, x, cached, rotation, mask, modulation=None):
    """One layer of one expert, over cached keys and values and its own; returns the tokens, and its own."""
    b, t, _ = x.shape
    n, k, h = c.num_heads, c.num_kv_heads, c.head_dim
    normed, gate = _normed(x, None if modulation is None else modulation[0])
    qkv = _dot(normed, w["qkv"]).reshape(b, t, n + 2 * k, h)
    rotated = turn(qkv[:, :, : n + k], *rotation)
    own = rotated[:, :, n:], qkv[:, :, n + k :]
    seen = own if cached is None else [jnp.concatenate(parts, axis=1) for parts in zip(cached, own, strict=True)]
    attended = attend(rotated[:, :, :n], seen[0], seen[1], mask, scale=1, kernel=c.attention)
    attended = _dot(attended.reshape(b, t, n * h), w["o"])
    x += attended if gate is None else attended * gate
    normed, gate = _normed(x, None if modulation is None else modulation[1])
    gates, up = jnp.split(_dot(normed, w["gate_up"]), 2, axis=-1)
    y = _dot(nn.gelu(gates) * up, w["down"])
    return x + (y if gate is None else y * gate), own


def _through(layer, x, layers):
    """Runs x through stacked layers by a scan, or through a list of them one after another."""
    if not isinstance(layers, list):
        return jax.lax.scan(layer, x, layers)
    outputs = []
    for w in layers:
        x, output = layer(x, w)
        outputs.append(output)
    return x, outputs


def _normed(x, modulation=None):
    """RMSNorm without its scale, which is in the matrix that follows; or adaptive, with the residual's gate."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + EPSILON)
    if modulation is None:
        return normed.astype(x.dtype), None
    scale, shift, gate = jnp.split(modulation, 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def _centred(x):
    """LayerNorm without scale and offset, which are in the matrix that follows."""
    x32 = x.astype(jnp.float32)
    centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + EPSILON)).astype(x.dtype)


def _patches(x, size: int, w: Weights):
    """A convolution over patches that do not overlap, as one matrix product."""
    b, y, z, channels = x.shape
    rows, columns = y // size, z // size
    x = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, channels)
    return _linear(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1), w)


def _linear(x, w: Weights):
    return x @ w["kernel"] + w["bias"]


def _dot(x, w):
    """Tokens times a matrix, which may be in eight bits. With fp8 the tokens are rounded, too."""
    if not isinstance(w, Quantized):
        return x @ w
    if w.values.dtype == jnp.int8:
        return ((x @ w.values.astype(x.dtype)) * w.scale).astype(x.dtype)
    # A scale for each token: what else is in the batch changes nothing.
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True).astype(jnp.float32), 1e-30) / 448.0
    rounded = (x / scale).astype(w.values.dtype).astype(x.dtype)
    return ((rounded @ w.values.astype(x.dtype)) * (scale * w.scale)).astype(x.dtype)
