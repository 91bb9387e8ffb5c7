"""The velocity network of π0 and π0.5: observation, noisy chunk and flow time in, velocity out.

    [ images, prompt ]  language expert      the prefix, both ways among itself
    [ state ]           action expert        π0 only; π0.5 has the state in the prompt
    [ actions ]         action expert        all that depends on the noisy chunk and the time

Each block sees itself and what is before it. `prefill` runs the prefix once and keeps its keys and values, and
`velocity` runs state and actions against those, once per solver step. `joint` runs everything in one pass, for
training; both agree.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import gemma, layers
from pi0_jax.model.declare import Spec, linear
from pi0_jax.model.gemma import Modulations, Prefix, Segment
from pi0_jax.model.layers import Record
from pi0_jax.model.prefix import PrefixNetwork
from pi0_jax.model.remat import Remat
from pi0_jax.model.target import aligned


class ActionTokenNetwork(PrefixNetwork):
    """A head whose actions are tokens of the action expert, which see the whole observation."""

    def __post_init__(self):
        if self.config.variant not in ("pi0", "pi05"):
            raise UserError(
                f"a model of variant {self.config.variant!r} has no action expert: it writes action tokens "
                "(--policy.objective autoregressive --policy.sampler greedy)."
            )

    @property
    def head_spec(self) -> Spec:
        c = self.config
        return {"state_in": linear(c.action_dim, c.action.width, ("action", "embed"))} if c.variant == "pi0" else {}

    def prefill(self, params: Spec, observation: Observation, record: Record | None = None) -> Prefix:
        """Runs everything that depends on neither the noisy chunk nor the time."""
        segment = self._prefix_segment(params, observation, record=record)
        _, keys_values = gemma.forward(self.config, params["backbone"], [segment], record=record)
        return gemma.prefix_of(segment, keys_values)._replace(state=self.embed_state(params, observation))

    def run_jointly(
        self,
        params: Spec,
        observation: Observation,
        actions: Float[Array, "b t e"],
        condition: Float[Array, "b g e"] | None,
        draws: int = 1,
        *,
        causal: bool = False,
        record: Record | None = None,
    ) -> Float[Array, "b t e"]:
        """Outputs of the action tokens in one pass over everything.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            actions: tokens of all draws, one after another; draws do not see one another.
            condition: of the adaptive norms, one per draw or per token.
            draws: number of draws.
            causal: within a draw, a token sees only those before it and itself.
            record: takes the residual streams.
        """
        prefix = self._prefix_segment(params, observation, self.config.remat, record)
        suffix = self._suffix(self.embed_state(params, observation), actions, condition, draws, causal=causal)
        outputs, _ = gemma.forward(
            self.config, params["backbone"], [prefix, suffix], remat=self.config.remat, record=record
        )
        assert outputs[1] is not None
        return outputs[1][:, -actions.shape[1] :]

    def run_against(
        self,
        params: Spec,
        prefix: Prefix,
        actions: Float[Array, "b t e"],
        condition: Float[Array, "b g e"] | Modulations | None,
        record: Record | None = None,
    ) -> tuple[Float[Array, "b t e"], gemma.KeysValuesOfLayers]:
        """Outputs of the action tokens against a prefix, and keys and values of these and of the prefix's state."""
        suffix, layout = self._suffix(prefix.state, actions, condition), prefix.layout
        length = suffix.tokens.shape[1]
        if layout is not None:
            suffix = suffix.padded(layout.mask.shape[1])
        outputs, keys_values = gemma.forward(
            self.config, params["backbone"], [suffix], prefix, record=record, layout=layout
        )
        assert outputs[0] is not None
        return outputs[0][:, length - actions.shape[1] : length], keys_values

    def _prefix_segment(
        self, params: Spec, observation: Observation, remat: Remat = "none", record: Record | None = None
    ) -> Segment:
        tokens, valid = self.embed_prefix(params, observation, remat, record)
        return Segment("language", tokens, np.zeros(tokens.shape[1], int), valid=valid, needed=False)

    def _suffix(self, state, actions, condition, draws: int = 1, *, causal: bool = False) -> Segment:
        """State, which sees no actions, and all draws."""
        length, states = actions.shape[1] // draws, 0 if state is None else state.shape[1]
        mask_ar = np.concatenate([np.ones(states, int), np.tile(np.arange(length) == 0, draws) | causal])
        group = np.repeat(np.arange(draws + 1), [states] + [length] * draws)
        tokens = actions if state is None else jnp.concatenate([state, actions], axis=1)
        return Segment("action", tokens, mask_ar, group, condition=condition)


class TimeFeatures(NamedTuple):
    """What a velocity needs of the flow time; the first axes are those of the time."""

    token: Float[Array, "*time e"] | None = None
    """π0: the embedded time; with folded parameters, its summand of the action tokens."""
    modulations: Modulations | None = None
    """π0.5: what it does in the adaptive norms."""


@dataclasses.dataclass(frozen=True)
class ExpertNetwork(ActionTokenNetwork):
    """v(x, t | observation) of π0 (arXiv 2410.24164) and π0.5 (arXiv 2504.16054).

    What the result means, a velocity or the noise, is the objective's business. With `span`, it takes another time,
    such as the span that a shortcut model's velocity is an average over.
    """

    span: bool = False

    @property
    def head_spec(self) -> Spec:
        c, width = self.config, self.config.action.width
        spec = super().head_spec | {
            "action_in": linear(c.action_dim, width, ("action", "embed")),
            "action_out": linear(width, c.action_dim, ("embed", "action")),
            "time_mlp_in": linear(width if c.variant == "pi05" else 2 * width, width, ("embed", "embed_out")),
            "time_mlp_out": linear(width, width, ("embed", "embed_out")),
        }
        return spec | ({"span_in": zero_linear(width, width)} if self.span else {})

    def prefill(self, params: Spec, observation: Observation, record: Record | None = None) -> Prefix:
        """As of `ActionTokenNetwork`, and where state and actions stand."""
        return self.placed(super().prefill(params, observation, record))

    def placed(self, prefix: Prefix) -> Prefix:
        """The prefix with the place of the state and the actions after it, the same in each step of a solver."""
        chunk = jnp.zeros((len(prefix.mask), self.config.action_horizon, self.config.action.width), self.dtype)
        suffix = self._suffix(prefix.state, chunk, None)
        suffix = suffix.padded(aligned(suffix.tokens.shape[1], 64))
        return prefix._replace(layout=gemma.layout_of(self.config, [suffix], prefix))

    def joint(
        self,
        params: Spec,
        observation: Observation,
        x: Float[Array, "b *s ah ad"],
        time: Float[Array, "b *s_or_ah"],
        span: Float[Array, "b *s_or_ah"] | None = None,
        record: Record | None = None,
    ) -> Float[Array, "b *s ah ad"]:
        """The velocity in one pass over prefix and actions.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            x: noisy chunks; with the extra axis, s independent draws that share the observation's tokens.
            time: flow time, one per chunk `[b *s]` or per action `[b *s ah]`.
            span: second time, of the shape of the first; zero by default.
            record: takes the residual streams.

        Returns:
            dx/dt, float32, of the shape of x.
        """
        actions, condition = self._embed_draws(params, x, time, span)
        draws = x.shape[1] if x.ndim == 4 else 1
        outputs = self.run_jointly(params, observation, actions, condition, draws, record=record)
        return self._project(params, outputs).reshape(x.shape)

    def time_features(
        self, params: Spec, time: Float[Array, "*time"], span: Float[Array, "*time"] | None = None
    ) -> TimeFeatures:
        """What depends on the time alone, for times of one example each or of the steps of a solver."""
        embedded = self._embed_times(params, time, span)
        if self.config.variant == "pi05":
            condition = self._condition(params, embedded)
            return TimeFeatures(modulations=gemma.modulations(params["backbone"], condition))
        folded = "bias" not in params["time_mlp_in"]
        return TimeFeatures(embedded @ params["time_mlp_in"]["kernel"] if folded else embedded)

    def velocity(
        self,
        params: Spec,
        prefix: Prefix,
        x: Float[Array, "b ah ad"],
        time: Float[Array, "*time"],
        span: Float[Array, "*time"] | None = None,
        features: TimeFeatures | None = None,
        record: Record | None = None,
    ) -> Float[Array, "b ah ad"]:
        """The velocity of one solver step, against a prefix from `prefill`.

        Args:
            params: of this network.
            prefix: of the observation.
            x: noisy chunk.
            time: flow time: one, one per chunk, or one per action.
            span: second time, of the shape of the first.
            features: `time_features` of these times, where they are known.
            record: takes the residual streams.
        """
        features = self.time_features(params, time, span) if features is None else features
        actions, modulations = self.embed_actions(params, x, features)
        if modulations is not None and modulations.final.ndim > 2:  # a condition per action: they are not padded
            prefix = prefix._replace(layout=None)
        outputs, _ = self.run_against(params, prefix, actions, modulations, record)
        return self._project(params, outputs)

    def embed_time(self, time: Float[Array, "*time"]) -> Float[Array, "*time e"]:
        """Sines and cosines of flow times, of the action expert's width."""
        return embed_time(time, self.config.action.width)

    def embed_actions(
        self, params: Spec, x: Float[Array, "b ah ad"], features: TimeFeatures
    ) -> tuple[Float[Array, "b ah e"], Modulations | None]:
        """Action tokens, and what the time does in the adaptive norms, as `run_against` takes them."""
        token = None if features.token is None else layers.per_token(features.token)
        return self._embed_actions(params, x, token), features.modulations

    def _embed_draws(
        self, params: Spec, x: Float[Array, "b *s ah ad"], time: Float[Array, "b *s_or_ah"], span=None
    ) -> tuple[Float[Array, "b t e"], Float[Array, "b g e"] | None]:
        """Action tokens of all draws, and the condition of the adaptive norms; arguments of `joint`."""
        embedded, condition = self._embed_times(params, time, span), None
        if self.config.variant == "pi05":
            condition = self._condition(params, embedded).reshape(len(x), -1, embedded.shape[-1])
        elif time.ndim == x.ndim - 2:
            embedded = embedded[..., None, :]
        return self._embed_actions(params, x, embedded), condition

    def _embed_times(self, params: Spec, time, span) -> Float[Array, "*time e"]:
        embedded = self.embed_time(time)
        if self.span:
            spans = self.embed_time(jnp.zeros_like(time) if span is None else span)
            embedded += layers.linear(spans, params["span_in"])
        return embedded

    def _condition(self, params: Spec, embedded: Float[Array, "*time e"]) -> Float[Array, "*time e"]:
        """π0.5's condition of the adaptive norms."""
        hidden = jax.nn.swish(layers.linear(embedded, params["time_mlp_in"]))
        return jax.nn.swish(layers.linear(hidden, params["time_mlp_out"])).astype(self.dtype)

    def _embed_actions(
        self, params: Spec, x: Float[Array, "b *s ah ad"], token: Float[Array, "..."] | None
    ) -> Float[Array, "b t e"]:
        """Action tokens, draws one after another; π0 mixes the time into them."""
        actions = layers.linear(x.astype(jnp.float32), params["action_in"])
        if self.config.variant == "pi0":
            assert token is not None
            if "bias" in params["time_mlp_in"]:
                mixed = jnp.concatenate([actions, jnp.broadcast_to(token, actions.shape)], axis=-1)
                actions = layers.linear(mixed, params["time_mlp_in"])
            else:  # folded: the first half of that matrix is in action_in, the second in the token
                actions += token
            actions = layers.linear(jax.nn.swish(actions), params["time_mlp_out"])
        return actions.reshape(len(x), -1, actions.shape[-1]).astype(self.dtype)

    def _project(self, params: Spec, outputs: Float[Array, "b t e"]) -> Float[Array, "b t ad"]:
        return layers.linear(outputs.astype(jnp.float32), params["action_out"])


def network(config: ModelConfig, span: bool = False) -> ExpertNetwork:
    """The network of the head `Expert`.

    Raises:
        UserError: a variant that does not run.
    """
    return ExpertNetwork(config, span)


def zero_linear(inputs: int, outputs: int) -> Spec:
    """A linear layer that starts at zero: weights trained without it keep giving what they gave."""
    return linear(inputs, outputs, ("embed", "embed_out"), nn.initializers.zeros_init())


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
    frequency = layers.per_channel(1.0 / period * 2 * jnp.pi, time.ndim + 1)
    angle = time.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
