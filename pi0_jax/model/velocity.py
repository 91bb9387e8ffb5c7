"""The velocity network of π0 and π0.5: observation, noisy chunk and flow time in, velocity out.

Tokens come in blocks, each seeing itself and what is before it:

    [ images, prompt ]  language expert      the prefix, both ways among itself
    [ state ]           action expert        π0 only; π0.5 has the state in the prompt
    [ actions ]         action expert        all that depends on the noisy chunk and the time

The first two do not depend on (x, t): `prefill` runs them once and keeps their keys and values, and `velocity` runs the
actions against those, once a solver step. `__call__` runs everything in one pass, for training; both agree.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.batch import Observation
from pi0_jax.model.gemma import KeysValues
from pi0_jax.model.norm import named
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.siglip import dense


class Prefix(NamedTuple):
    """What `velocity` needs of an observation; computed once a chunk."""

    keys_values: KeysValues
    """Of every layer, `[l b s k h]` each."""
    mask: Bool[Array, "b s"]
    """False at absent cameras and padding."""
    length: Int[Array, "b"]
    """Number of valid tokens, the position at which the actions start."""


class ActionTokenNetwork(PrefixNetwork):
    """A head whose actions are tokens of the action expert, which see the whole observation."""

    def setup_head(self):
        if self.config.variant not in ("pi0", "pi05"):
            raise ValueError(
                f"a model of variant {self.config.variant!r} has no velocity and cannot run or train yet; "
                "`pi0 convert` carries its weights between formats. The variants that run are pi0 and pi05."
            )
        if self.config.variant == "pi0":
            self.state_in = dense(self.config.action.width, ("action", "embed"), jnp.dtype("float32"), "state_in")

    def prefill(self, observation: Observation) -> Prefix:
        """Runs everything that does not depend on the actions."""
        prefix, prefix_mask = self.embed_prefix(observation)
        state = self.embed_state(observation)
        blocks = _blocks(prefix, state, 0, 0)
        mask = jnp.concatenate([prefix_mask, *(jnp.ones(s.shape[:2], bool) for s in state)], axis=1)
        _, keys_values = self.backbone(
            (prefix, state[0] if state else None),
            _positions(prefix_mask, len(state), 0, 0),
            may_attend(blocks, blocks) & mask[:, None],
            needed=(False, False),
        )
        return Prefix(keys_values, mask, jnp.sum(mask, axis=1))

    def embed_state(self, observation: Observation) -> tuple[Float[Array, "b 1 d"], ...]:
        """π0's state token; nothing for π0.5."""
        if self.config.variant == "pi05":
            return ()
        return (self.state_in(observation.state)[:, None].astype(self.dtype),)

    def run_jointly(
        self,
        observation: Observation,
        actions: Float[Array, "b t d"],
        condition: Float[Array, "b g d"] | None,
        draws: int = 1,
        *,
        causal: bool = False,
    ) -> Float[Array, "b t e"]:
        """Outputs of the action tokens in one pass over everything.

        Args:
            observation: images in [-1, 1].
            actions: tokens of all draws, one after another; draws do not see one another.
            condition: of the adaptive norms, one for each draw or each token.
            draws: how many there are.
            causal: within a draw, a token sees only those before it and itself.
        """
        prefix, prefix_mask = self.embed_prefix(observation)
        state = self.embed_state(observation)
        length = actions.shape[1] // draws
        blocks = _blocks(prefix, state, draws, length)
        mask = jnp.concatenate([prefix_mask, jnp.ones((len(prefix), len(blocks) - prefix.shape[1]), bool)], axis=1)
        allowed = may_attend(blocks, blocks)
        if causal:
            order = np.arange(len(blocks))
            allowed &= (order[None, :] <= order[:, None]) | (blocks[None, :] < 2)
        outputs, _ = self.backbone(
            (prefix, jnp.concatenate([*state, actions], axis=1)),
            _positions(prefix_mask, len(state), draws, length),
            allowed & mask[:, None],
            condition,
            needed=(False, True),
        )
        return outputs[1][:, len(state) :]

    def run_against(
        self, prefix: Prefix, actions: Float[Array, "b t d"], condition: Float[Array, "b g d"] | None
    ) -> tuple[Float[Array, "b t d"], KeysValues]:
        """Outputs of the action tokens against a prefix from `prefill`, and their own keys and values."""
        b, length = actions.shape[:2]
        mask = jnp.concatenate([prefix.mask, jnp.ones((b, length), bool)], axis=1)
        outputs, keys_values = self.backbone(
            (None, actions),
            prefix.length[:, None] + jnp.arange(length),
            jnp.broadcast_to(mask[:, None], (b, length, mask.shape[1])),
            condition,
            prefix.keys_values,
        )
        return outputs[1], keys_values


class VelocityNetwork(ActionTokenNetwork):
    """v(x, t | observation) of π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054).

    With `ModelConfig.prediction` "average_velocity" it also takes the span of time that the velocity is an average
    over; for "epsilon" and "v" the result is what the diffusion baselines predict.
    """

    def setup_head(self):
        super().setup_head()
        c, float32 = self.config, jnp.dtype("float32")
        width = c.action.width
        self.action_in = dense(width, ("action", "embed"), float32, "action_in")
        self.action_out = dense(c.action_dim, ("embed", "action"), float32, "action_out")
        self.time_mlp_in = dense(width, ("embed", "embed_out"), float32, "time_mlp_in")
        self.time_mlp_out = dense(width, ("embed", "embed_out"), float32, "time_mlp_out")
        if c.prediction == "average_velocity":
            self.span_in = zero_dense(width, "span_in")

    def __call__(
        self,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"] | Float[Array, "b *s ah"],
        span: Float[Array, "b *s"] | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity in one pass over prefix and actions.

        Args:
            observation: images in [-1, 1].
            x: noisy chunks; with the extra axis, s independent draws that share the observation's tokens.
            time: flow time, one number a chunk or one an action.
            span: of the average, of the shape of time; "average_velocity" only.

        Returns:
            dx/dt, float32, of the shape of x.
        """
        actions, condition = self.embed_actions(x, time, span)
        outputs = self.run_jointly(observation, actions, condition, x.shape[1] if x.ndim == 4 else 1)
        return self._project(outputs, x)

    def velocity(
        self,
        prefix: Prefix,
        x: Float[Array, "b ah ad"],
        time: Float[Array, "b"] | Float[Array, "b ah"],
        span: Float[Array, "b"] | None = None,
    ) -> Float[Array, "b ah ad"]:
        """The velocity of one solver step, against a prefix from `prefill`."""
        outputs, _ = self.run_against(prefix, *self.embed_actions(x, time, span))
        return self._project(outputs, x)

    def embed_actions(
        self,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s"] | Float[Array, "b *s ah"],
        span: Float[Array, "b *s"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b g d"] | None]:
        """Action tokens (draws one after another), and the condition of the adaptive norms (π0.5)."""
        c = self.config
        b, width = x.shape[0], c.action.width
        actions = self.action_in(x.astype(jnp.float32))
        embedded = self.embed_time(time)
        if c.prediction == "average_velocity":
            embedded += self.span_in(self.embed_time(jnp.zeros_like(time) if span is None else span))
        if c.variant == "pi05":
            condition = nn.swish(self.time_mlp_out(nn.swish(self.time_mlp_in(embedded))))
            return actions.reshape(b, -1, width).astype(self.dtype), condition.reshape(b, -1, width).astype(self.dtype)
        if time.ndim == x.ndim - 2:
            embedded = jnp.broadcast_to(embedded[..., None, :], actions.shape)
        actions = self.time_mlp_out(nn.swish(self.time_mlp_in(jnp.concatenate([actions, embedded], axis=-1))))
        return actions.reshape(b, -1, width).astype(self.dtype), None

    def embed_time(self, time: Float[Array, "*b"]) -> Float[Array, "*b d"]:
        return embed_time(time, self.config.action.width)

    def _project(self, outputs: Float[Array, "b t d"], x: Any) -> Float[Array, "b *s ah ad"]:
        return self.action_out(outputs.astype(jnp.float32)).reshape(x.shape)


def zero_dense(features: int, name: str) -> nn.Dense:
    """A linear layer from embeddings that starts at zero: weights trained without it keep giving what they gave."""
    return nn.Dense(
        features,
        kernel_init=named(nn.initializers.zeros_init(), ("embed", "embed_out")),
        bias_init=named(nn.initializers.zeros_init(), ("embed_out",)),
        name=name,
    )


def _blocks(prefix, state, draws: int, length: int) -> np.ndarray:
    """Block of each token: 0 prefix, 1 state, 2 and up the draws of the action chunk."""
    return np.repeat(np.arange(2 + draws), [prefix.shape[1], len(state)] + [length] * draws)


def _positions(prefix_mask: Bool[Array, "b s"], num_state: int, draws: int, length: int) -> Int[Array, "b t"]:
    """Positions count valid tokens; every draw starts at the same one."""
    position = jnp.cumsum(prefix_mask, axis=1)
    own = np.concatenate([np.arange(num_state), *[num_state + np.arange(length)] * draws])
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
