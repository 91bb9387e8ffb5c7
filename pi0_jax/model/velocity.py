"""The velocity network of π0 and π0.5: observation, noisy chunk and flow time in, velocity out.

Tokens come in blocks, each seeing itself and what is before it:

    [ images, prompt ]  language expert      the prefix, both ways among itself
    [ state ]           action expert        π0 only; π0.5 has the state in the prompt
    [ actions ]         action expert        all that depends on the noisy chunk and the time

The first two do not depend on (x, t): `prefill` runs them once and keeps their keys and values, and `velocity` runs the
actions against those, once a solver step. `__call__` runs everything in one pass, for training; both agree.
"""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.model.gemma import Backbone, KeysValues
from pi0_jax.model.norm import named
from pi0_jax.model.siglip import ImageEncoder, dense


class Prefix(NamedTuple):
    """What `velocity` needs of an observation; computed once a chunk."""

    keys_values: KeysValues
    """Of every layer, `[l b s k h]` each."""
    mask: Bool[Array, "b s"]
    """False at absent cameras and padding."""
    length: Int[Array, "b"]
    """Number of valid tokens, the position at which the actions start."""


class VelocityNetwork(nn.Module):
    """v(x, t | observation) of π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054)."""

    config: ModelConfig

    def setup(self):
        c = self.config
        if c.variant not in ("pi0", "pi05"):
            raise ValueError(
                f"a model of variant {c.variant!r} has no velocity and cannot run or train yet; `pi0 convert` carries "
                "its weights between formats. The variants that run are pi0 and pi05."
            )
        width = c.action.width
        self.image_encoder = ImageEncoder(c.vision, self.dtype, c.remat)
        self.image_projector = dense(c.language.width, ("embed", "embed_out"), self.dtype, "image_projector")
        self.embedding = self.param(
            "embedding",
            named(nn.initializers.normal(c.language.width**-0.5), ("vocab", "embed")),
            (c.vocab_size, c.language.width),
            jnp.float32,
        )
        self.backbone = Backbone(c)
        float32 = jnp.dtype("float32")
        self.action_in = dense(width, ("action", "embed"), float32, "action_in")
        self.action_out = dense(c.action_dim, ("embed", "action"), float32, "action_out")
        if c.variant == "pi0":
            self.state_in = dense(width, ("action", "embed"), float32, "state_in")
        self.time_mlp_in = dense(width, ("embed", "embed_out"), float32, "time_mlp_in")
        self.time_mlp_out = dense(width, ("embed", "embed_out"), float32, "time_mlp_out")

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)

    def __call__(
        self,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"] | Float[Array, "b *s ah"],
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity in one pass over prefix and actions.

        Args:
            observation: images in [-1, 1].
            x: noisy chunks; with the extra axis, s independent draws that share the observation's tokens.
            time: flow time, one number a chunk or one an action.

        Returns:
            dx/dt, float32, of the shape of x.
        """
        prefix, prefix_mask = self.embed_prefix(observation)
        state = self.embed_state(observation)
        actions, condition = self.embed_actions(x, time)
        draws = x.shape[1] if x.ndim == 4 else 1
        blocks = self._blocks(prefix, state, draws)
        mask = jnp.concatenate([prefix_mask, jnp.ones((x.shape[0], len(blocks) - prefix.shape[1]), bool)], axis=1)
        outputs, _ = self.backbone(
            (prefix, jnp.concatenate([*state, actions], axis=1)),
            self._positions(prefix_mask, len(state), draws),
            may_attend(blocks, blocks) & mask[:, None],
            condition,
        )
        return self._project(outputs[1][:, len(state) :], x.shape)

    def prefill(self, observation: Observation) -> Prefix:
        """Runs everything that depends on neither x nor t."""
        prefix, prefix_mask = self.embed_prefix(observation)
        state = self.embed_state(observation)
        blocks = self._blocks(prefix, state, 0)
        mask = jnp.concatenate([prefix_mask, *(jnp.ones(s.shape[:2], bool) for s in state)], axis=1)
        _, keys_values = self.backbone(
            (prefix, state[0] if state else None),
            self._positions(prefix_mask, len(state), 0),
            may_attend(blocks, blocks) & mask[:, None],
        )
        return Prefix(keys_values, mask, jnp.sum(mask, axis=1))

    def velocity(
        self, prefix: Prefix, x: Float[Array, "b ah ad"], time: Float[Array, "b"] | Float[Array, "b ah"]
    ) -> Float[Array, "b ah ad"]:
        """The velocity of one solver step, against a prefix from `prefill`."""
        actions, condition = self.embed_actions(x, time)
        horizon = x.shape[1]
        own = jnp.ones((x.shape[0], horizon), bool)
        outputs, _ = self.backbone(
            (None, actions),
            prefix.length[:, None] + jnp.arange(horizon),
            jnp.broadcast_to(
                jnp.concatenate([prefix.mask, own], axis=1)[:, None],
                (x.shape[0], horizon, prefix.mask.shape[1] + horizon),
            ),
            condition,
            prefix.keys_values,
        )
        return self._project(outputs[1], x.shape)

    def embed_prefix(self, observation: Observation) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Image tokens in the order of `config.cameras`, then prompt tokens; and which of them are valid.

        All cameras go through the encoder as one batch.

        Raises:
            ValueError: the observation lacks a camera of the config.
        """
        c = self.config
        missing = [name for name in c.cameras if name not in observation.images]
        if missing:
            raise ValueError(
                f"the observation lacks cameras {missing}; it has {sorted(observation.images)}. "
                "Rename them in the robot, mask them with `image_masks`, or leave them out of `ModelConfig.cameras`."
            )
        tokens, masks = [], []
        if c.cameras:
            encoded = self.image_encoder(jnp.concatenate([observation.images[name] for name in c.cameras]))
            for name, image in zip(c.cameras, jnp.split(self.image_projector(encoded), len(c.cameras)), strict=True):
                tokens.append(image)
                masks.append(jnp.broadcast_to(observation.image_masks[name][:, None], image.shape[:2]))
        prompt = self.embedding[observation.prompt]
        tokens.append((prompt * jnp.sqrt(c.language.width).astype(prompt.dtype)).astype(self.dtype))
        masks.append(observation.prompt_mask)
        return jnp.concatenate(tokens, axis=1), jnp.concatenate(masks, axis=1)

    def embed_state(self, observation: Observation) -> tuple[Float[Array, "b 1 d"], ...]:
        """π0's state token; nothing for π0.5."""
        if self.config.variant == "pi05":
            return ()
        return (self.state_in(observation.state)[:, None].astype(self.dtype),)

    def embed_actions(
        self, x: Float[Array, "b *s ah ad"], time: Float[Array, "b *s"] | Float[Array, "b *s ah"]
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g d"] | None]:
        """Action tokens (draws one after another), and the condition of the adaptive norms (π0.5)."""
        c = self.config
        b, width = x.shape[0], c.action.width
        actions = self.action_in(x.astype(jnp.float32))
        embedded = embed_time(time, width)
        if c.variant == "pi05":
            condition = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded))))
            return actions.reshape(b, -1, width).astype(self.dtype), condition.reshape(b, -1, width).astype(self.dtype)
        if time.ndim == x.ndim - 2:
            embedded = jnp.broadcast_to(embedded[..., None, :], actions.shape)
        actions = self.time_mlp_out(nn.swish(self.time_mlp_in(jnp.concatenate([actions, embedded], axis=-1))))
        return actions.reshape(b, -1, width).astype(self.dtype), None

    def _project(self, outputs: Float[Array, "b t d"], shape: tuple[int, ...]) -> Float[Array, "b *s ah ad"]:
        return self.action_out(outputs.astype(jnp.float32)).reshape(shape)

    def _blocks(self, prefix, state, draws: int) -> np.ndarray:
        """Block of each token: 0 prefix, 1 state, 2 and up the draws of the action chunk."""
        horizon = self.config.action_horizon
        return np.repeat(np.arange(2 + draws), [prefix.shape[1], len(state)] + [horizon] * draws)

    def _positions(self, prefix_mask: Bool[Array, "b s"], num_state: int, draws: int) -> Int[Array, "b t"]:
        """Positions count valid tokens; every draw starts at the same one."""
        position = jnp.cumsum(prefix_mask, axis=1)
        own = np.concatenate([np.arange(num_state), *[num_state + np.arange(self.config.action_horizon)] * draws])
        return jnp.concatenate([position - 1, position[:, -1:] + own.astype(np.int32)], axis=1)


def may_attend(query: np.ndarray, key: np.ndarray) -> Bool[Array, "t s"]:
    """Which block may see which: itself and those before; but draws (2 and up) not one another.

    prefix  1 0 0 0
    state   1 1 0 0
    draw 1  1 1 1 0
    draw 2  1 1 0 1
    """
    q, k = query[:, None], key[None, :]
    return jnp.asarray((k <= q) & ((k < 2) | (k == q)))


def embed_time(
    time: Float[Array, "*b"], width: int, shortest: float = 4e-3, longest: float = 4.0
) -> Float[Array, "*b d"]:
    """Sine, then cosine of the flow time at periods in geometric progression; float32 (openpi's `posemb_sincos`).

    Args:
        time: flow time in [0, 1].
        width: of the result, even.
        shortest, longest: periods, in units of flow time.
    """
    period = shortest * (longest / shortest) ** jnp.linspace(0.0, 1.0, width // 2, dtype=jnp.float32)
    # In openpi's order: another rounding of the frequency by one part in 1e7 moves the velocity by 1e-5.
    angle = time.astype(jnp.float32)[..., None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
