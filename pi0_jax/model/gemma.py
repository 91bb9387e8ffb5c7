"""Gemma with several experts side by side: own weights each, one shared attention, scanned over depth.

What nobody asks for is not computed: an expert whose outputs are not needed gives only keys and values in the last
layer, which then runs by itself, after a scan over the others.

Axis letters: see `pi0_jax.batch`. The experts are an ordered tuple, language first; either may have no tokens in a
pass (None), which is how prefill and the velocity steps run the same layers as the joint pass.
"""

from __future__ import annotations

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from pi0_jax.config import ExpertConfig, ModelConfig
from pi0_jax.model import lora
from pi0_jax.model.attention import attend, rope_angles, rotate
from pi0_jax.model.norm import RMSNorm, named
from pi0_jax.model.remat import saveable

Tokens = tuple[Any, Any]
"""Tokens of the language expert `[b t d]` and of the action expert `[b u e]`; None where a pass has none."""

KeysValues = tuple[Float[Array, "*l b s k h"], Float[Array, "*l b s k h"]]
"""Rotated keys, and values; with a leading axis over layers where they come from the whole backbone."""


def fan_in(in_axis, out_axis, batch_axis=()):
    """Truncated normal of variance 1 / fan-in."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis
    )


class Attention(nn.Module):
    """One expert's projections into and out of the shared attention."""

    width: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora_rank: int = 0
    lora_scale: float = 1.0

    def setup(self):
        n, k, h, d, r = self.num_heads, self.num_kv_heads, self.head_dim, self.width, self.lora_rank
        self.q = self.param("q", named(fan_in(0, (1, 2)), ("embed", "heads", "head_dim")), (d, n, h), jnp.float32)
        self.kv = self.param(
            "kv",
            named(fan_in(1, (2, 3), 0), ("stack", "embed", "kv_heads", "head_dim")),
            (2, d, k, h),
            jnp.float32,
        )
        self.o = self.param("o", named(fan_in((0, 1), 2), ("heads", "head_dim", "embed")), (n, h, d), jnp.float32)
        self.q_lora = self.kv_lora = self.o_lora = None
        if r:
            rank, stack = "lora_rank", "stack"
            self.q_lora = lora.declare(
                self.param, "q", ((d, n, r), (n, r, h)), (("embed", "heads", rank), ("heads", rank, "head_dim"))
            )
            self.kv_lora = lora.declare(
                self.param,
                "kv",
                ((2, d, k, r), (2, k, r, h)),
                ((stack, "embed", "kv_heads", rank), (stack, "kv_heads", rank, "head_dim")),
            )
            self.o_lora = lora.declare(
                self.param, "o", ((n, h, r), (n, r, d)), (("heads", "head_dim", rank), ("heads", rank, "embed"))
            )

    def query(self, x: Float[Array, "b t d"]) -> Float[Array, "b t n h"]:
        """Queries before rotation."""
        return lora.apply("attn/q", x, self.q, self.q_lora, self.lora_scale)

    def key_value(self, x: Float[Array, "b t d"]):
        """Key and value [b t k h], before rotation."""
        kv = lora.apply("attn/kv", x, self.kv, self.kv_lora, self.lora_scale)
        return kv[:, :, 0], kv[:, :, 1]

    def output(self, attended: Float[Array, "b t n h"]) -> Float[Array, "b t d"]:
        return lora.apply("attn/o", attended, self.o, self.o_lora, self.lora_scale)


class GatedMLP(nn.Module):
    """GeGLU feed-forward (arXiv 2002.05202), tanh-approximate GELU."""

    width: int
    mlp_dim: int
    lora_rank: int = 0

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> Float[Array, "b t d"]:
        w_in = self.param(
            "gate_up", named(fan_in(1, 2, 0), ("stack", "embed", "mlp")), (2, self.width, self.mlp_dim), jnp.float32
        )
        w_out = self.param("down", named(fan_in(0, 1), ("mlp", "embed")), (self.mlp_dim, self.width), jnp.float32)
        gate_up_lora = down_lora = None
        if r := self.lora_rank:
            d, f, rank = self.width, self.mlp_dim, "lora_rank"
            gate_up_lora = lora.declare(
                self.param, "gate_up", ((2, d, r), (2, r, f)), (("stack", "embed", rank), ("stack", rank, "mlp"))
            )
            down_lora = lora.declare(self.param, "down", ((f, r), (r, d)), (("mlp", rank), (rank, "embed")))
        gate_up = lora.apply("mlp/gate_up", x, w_in, gate_up_lora)
        return lora.apply("mlp/down", nn.gelu(gate_up[:, :, 0]) * gate_up[:, :, 1], w_out, down_lora)


class Expert(nn.Module):
    """One expert's half of a layer: what comes before the shared attention, and what comes after."""

    config: ExpertConfig
    model: ModelConfig
    adaptive: bool

    def setup(self):
        c, m = self.config, self.model
        self.attn_norm = RMSNorm(self.adaptive)
        self.attn = Attention(c.width, m.num_heads, m.num_kv_heads, m.head_dim, c.lora_attn_rank, c.lora_scale)
        self.mlp_norm = RMSNorm(self.adaptive)
        self.mlp = GatedMLP(c.width, c.mlp_dim, c.lora_mlp_rank)

    def before(self, x, condition, needed: bool) -> tuple[Any, Any, Any, Any]:
        """Query (None unless needed), key, value, and the gate that `after` wants back."""
        normed, gate = self.attn_norm(x, condition)
        return self.attn.query(normed) if needed else None, *self.attn.key_value(normed), gate

    def after(self, x, attended, gate, condition):
        """Adds attention's result and the feed-forward's to the residual stream."""
        x = x + _gated(self.attn.output(attended), gate)
        normed, gate = self.mlp_norm(x, condition)
        return x + _gated(self.mlp(normed), gate)


def _gated(y, gate):
    return y if gate is None else y * gate


class Layer(nn.Module):
    """One layer of all experts."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        cached: KeysValues | None,
        angles: Float[Array, "b t 1 h/2"],
        mask: Bool[Array, "b t s"],
        condition: Float[Array, "b g e"] | None,
        needed: tuple[bool, bool] = (True, True),
    ) -> tuple[Tokens, KeysValues]:
        """Lets tokens attend to cached ones, to their own expert's and to those of the expert before it, as the mask
        allows. No expert sees the one after it, whatever the mask says there.

        Queries are the experts' tokens in order; keys are the cached ones, then the same tokens. Returns the new
        tokens, None for an expert that has none or whose are not needed, and the keys and values of this pass without
        the cached ones.
        """
        c = self.config
        experts = (
            Expert(c.language, c, adaptive=False, name="language"),
            Expert(c.action, c, adaptive=c.variant == "pi05", name="action"),
        )
        seen: list[Any] = [] if cached is None else [cached]
        outputs: list[Any] = []
        start = 0
        for expert, x, d, asks in zip(experts, tokens, (None, condition), needed, strict=True):
            if x is None:
                outputs.append(None)
                continue
            own = slice(start, start := start + x.shape[1])
            q, k, v, gate = expert.before(x, d, asks)
            seen.append((rotate(k, angles[:, own]), v))
            if not asks:
                outputs.append(None)
                continue
            keys, values = (
                jnp.concatenate([y.astype(x.dtype) for y in parts], axis=1) for parts in zip(*seen, strict=True)
            )
            allowed = mask[:, own, : keys.shape[1]]
            attended = attend(rotate(q, angles[:, own]), keys, values, allowed, kernel=c.attention)
            outputs.append(expert.after(x, checkpoint_name(attended, "attn/attended"), gate, d))
        language, action = outputs
        new: Any = tuple(jnp.concatenate(parts, axis=1) for parts in zip(*seen[cached is not None :], strict=True))
        return (language, action), new


class Backbone(nn.Module):
    """All layers, scanned, and the final norms."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        tokens: Tokens,
        positions: Int[Array, "b t"],
        mask: Bool[Array, "b t s"],
        condition: Float[Array, "b g e"] | None = None,
        cached: KeysValues | None = None,
        needed: tuple[bool, bool] = (True, True),
    ) -> tuple[Tokens, KeysValues]:
        """Runs the experts over their tokens.

        Args:
            tokens: of the language and the action expert; None for an expert without any.
            positions: of all tokens in order, for the rotary embedding.
            mask: True where a query (token in order) may see a key (cached ones first); the language expert's tokens
                never see the action expert's.
            condition: of the adaptive norms; g conditions, each for an equal share of the action expert's tokens.
            cached: keys and values of an earlier pass, `[l b s k h]` each.
            needed: whose outputs the caller wants; of the others the last layer computes keys and values only.

        Returns:
            The experts' normalised outputs (None without tokens or need), and this pass's own keys and values over all
            layers.
        """
        c = self.config
        keys_values: Any
        angles = rope_angles(positions, c.head_dim)
        if self.is_initializing():
            stack = nn.scan(
                Layer,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=c.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            tokens, keys_values = cast(Any, stack)(c, name="layers")(tokens, cached, angles, mask, condition)
        else:
            layer = Layer(c, parent=None)

            def run(tokens, of_layer, needed=(True, True)) -> Any:
                params, cached = of_layer
                return layer.apply({"params": params}, tokens, cached, angles, mask, condition, needed)

            policy = saveable(c.remat)

            def kept(function):
                return function if policy is None else jax.checkpoint(function, prevent_cse=False, policy=policy)

            layers: Any = (self.variables["params"]["layers"], cached)
            if all(n or x is None for n, x in zip(needed, tokens, strict=True)):
                tokens, keys_values = jax.lax.scan(kept(run), tokens, layers)
            else:
                first = jax.tree.map(lambda x: _as_used(x[:-1], self.dtype), layers)
                tokens, keys_values = jax.lax.scan(kept(run), tokens, first)
                last = kept(lambda *args: run(*args, needed))  # pyright: ignore[reportCallIssue]
                tokens, own = last(tokens, jax.tree.map(lambda x: x[-1], layers))
                keys_values = jax.tree.map(lambda a, b: jnp.concatenate([a, b[None]]), keys_values, own)
        norms = (RMSNorm(name="language_norm"), RMSNorm(c.variant == "pi05", name="action_norm"))
        language, action = (
            None if x is None else norm(x, d)[0] for norm, x, d in zip(norms, tokens, (None, condition), strict=True)
        )
        return (language, action), keys_values

    @property
    def dtype(self) -> jnp.dtype:
        return jnp.dtype(self.config.dtype)


def _as_used(x, dtype):
    """Matrices in the dtype that the layers multiply in: a part of the stack is a copy, and this halves it."""
    return x.astype(dtype) if x.ndim > 2 else x
