"""Gemma with several experts side by side: own weights each, one shared attention.

Tokens come in an ordered list of segments, each of one expert. Within the layers a segment attends to what is cached of
an earlier pass, to the segments before it and to itself, as `mask.py` has it; none sees the segments after it. Prefill,
solver step and joint training pass are the same function of other segments. Unused outputs are not computed: a segment
whose outputs are not needed gives only keys and values in the last layer.

Axis letters: see `pi0_jax.batch`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.linen.spmd import with_logical_constraint
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, Shaped

from pi0_jax.config import ExpertConfig, ModelConfig
from pi0_jax.model import kernels, layers, lora, mask, target
from pi0_jax.model.attention import attend
from pi0_jax.model.declare import Leaf, Spec, Stack, linear
from pi0_jax.model.layers import KeysValues, Record
from pi0_jax.model.remat import Remat, rematerialised

Expert = Literal["language", "action"]


class Modulations(NamedTuple):
    """Scale, shift and gate of all adaptive norms at some flow times, side by side in the last axis."""

    layers: Float[Array, "*time l 2 m"]
    """Of each layer's norms before attention and before the feed-forward."""
    final: Float[Array, "*time m"]


class Segment(NamedTuple):
    """Tokens that go through one expert together."""

    expert: Expert
    tokens: Float[Array, "b t d"]
    mask_ar: Int[np.ndarray, "t"]
    """1 where a token begins a block (`mask.py`)."""
    group: Int[np.ndarray, "t"] | None = None
    """Group of each token (`mask.py`); None: 0, seen by all that come later."""
    valid: Bool[Array, "b t"] | None = None
    """False at padding; None: all are valid."""
    condition: Float[Array, "b g e"] | Modulations | None = None
    """Of the adaptive norms: g conditions, each for an equal share of the tokens, or what these make of them."""
    reads_with_gradient: bool = True
    """False: no gradient flows into the keys and values of earlier segments that this one reads (knowledge insulation,
    arXiv 2505.23705)."""
    needed: bool | Int[Array, "b"] = True
    """Whether outputs are asked for; an array: of the token at that place in each row alone."""

    def padded(self, length: int) -> Segment:
        """The segment with tokens at its end that nothing sees."""
        (b, own, _), added = self.tokens.shape, length - self.tokens.shape[1]
        if not added:
            return self
        group = None if self.group is None else np.pad(self.group, (0, added), mode="edge")
        valid = jnp.ones((b, own), bool) if self.valid is None else self.valid
        tokens, valid = (jnp.pad(x, [(0, 0), (0, added)] + [(0, 0)] * (x.ndim - 2)) for x in (self.tokens, valid))
        return self._replace(tokens=tokens, mask_ar=np.pad(self.mask_ar, (0, added)), group=group, valid=valid)


KeysValuesOfLayers = list[KeysValues] | tuple[Float[Array, "l b _ k h"], Float[Array, "l b _ k h"]]
"""Of each layer in a list, or stacked along a leading axis."""


class Layout(NamedTuple):
    """Where tokens stand and what they see."""

    rotation: layers.Rotation
    mask: Bool[Array, "b t s"]
    """True where a token (in order) may see a key (cached ones first)."""


class Prefix(NamedTuple):
    """What later passes need of the tokens before them; computed once per chunk."""

    keys_values: KeysValuesOfLayers
    mask: Bool[Array, "b s"]
    """False at absent cameras and padding."""
    length: Int[Array, "b"]
    """Number of valid tokens, the position at which the next ones start."""
    write_at: Int[Array, ""] | None = None
    """Where keys and values of the next tokens are written, in place of those that are there; None: after all."""
    state: Float[Array, "b 1 e"] | None = None
    """π0's state token, which runs along with the actions: that costs them next to nothing, and spares a pass."""
    layout: Layout | None = None
    """Of the state and the actions, which is the same in each step of a solver."""


def prefix_of(segment: Segment, keys_values: KeysValuesOfLayers) -> Prefix:
    """A segment whose tokens are valid or not, by its keys and values, at a length that accelerators read without
    copies."""
    valid = segment.valid
    assert valid is not None
    length = jnp.sum(valid, axis=1, dtype=jnp.int32)
    if added := target.aligned(valid.shape[1], 128) - valid.shape[1]:
        padding = [(0, added), (0, 0), (0, 0)]
        keys_values = jax.tree.map(lambda x: jnp.pad(x, [(0, 0)] * (x.ndim - 3) + padding), keys_values)
        valid = jnp.pad(valid, [(0, 0), padding[0]])
    return Prefix(keys_values, valid, length)


def fan_in(in_axis, out_axis, batch_axis=()):
    """Truncated normal of variance 1 / fan-in."""
    return nn.initializers.variance_scaling(
        1.0, "fan_in", "truncated_normal", in_axis=in_axis, out_axis=out_axis, batch_axis=batch_axis
    )


def spec(config: ModelConfig, experts: Sequence[Expert] = ("language", "action")) -> Spec:
    """Parameters of the layers and the final norms of some experts."""
    adaptive = {"language": False, "action": config.variant == "pi05"}
    sizes = {name: getattr(config, name) for name in experts}
    return {
        "layers": Stack(config.depth, {name: _expert_spec(sizes[name], config, adaptive[name]) for name in experts}),
        **{f"{name}_norm": _norm_spec(sizes[name].width, adaptive[name]) for name in experts},
    }


def _expert_spec(c: ExpertConfig, m: ModelConfig, adaptive: bool) -> Spec:
    d, f, n, k, h = c.width, c.mlp_dim, m.num_heads, m.num_kv_heads, m.head_dim
    rank, stack = "lora_rank", "stack"
    attn: Spec = {
        "q": Leaf((d, n, h), ("embed", "heads", "head_dim"), fan_in(0, (1, 2))),
        "kv": Leaf((2, d, k, h), (stack, "embed", "kv_heads", "head_dim"), fan_in(1, (2, 3), 0)),
        "o": Leaf((n, h, d), ("heads", "head_dim", "embed"), fan_in((0, 1), 2)),
    }
    if r := c.lora_attn_rank:
        q = ("embed", "heads", rank), ("heads", rank, "head_dim")
        kv = (stack, "embed", "kv_heads", rank), (stack, "kv_heads", rank, "head_dim")
        o = ("heads", "head_dim", rank), ("heads", rank, "embed")
        attn |= lora.spec("q", ((d, n, r), (n, r, h)), q)
        attn |= lora.spec("kv", ((2, d, k, r), (2, k, r, h)), kv)
        attn |= lora.spec("o", ((n, h, r), (n, r, d)), o)
    mlp: Spec = {
        "gate_up": Leaf((2, d, f), (stack, "embed", "mlp"), fan_in(1, 2, 0)),
        "down": Leaf((f, d), ("mlp", "embed"), fan_in(0, 1)),
    }
    if r := c.lora_mlp_rank:
        mlp |= lora.spec("gate_up", ((2, d, r), (2, r, f)), ((stack, "embed", rank), (stack, rank, "mlp")))
        mlp |= lora.spec("down", ((f, r), (r, d)), (("mlp", rank), (rank, "embed")))
    return {"attn_norm": _norm_spec(d, adaptive), "attn": attn, "mlp_norm": _norm_spec(d, adaptive), "mlp": mlp}


def _norm_spec(width: int, adaptive: bool) -> Spec:
    zeros = nn.initializers.zeros_init()
    if adaptive:
        return {"modulation": linear(width, 3 * width, ("embed", "modulation"), zeros)}
    return {"scale": Leaf((width,), ("embed",), zeros)}


def modulations(w: Spec, condition: Float[Array, "*time e"]) -> Modulations:
    """What conditions, such as those of all steps of a solver, do in the action expert's norms.

    Args:
        w: weights of the backbone.
        condition: in the dtype of the activations.
    """

    def of(norm: Spec) -> Float[Array, "*time m"]:
        return layers.linear(condition, norm["modulation"], condition.dtype)

    def of_layer(layer: Spec) -> Float[Array, "*time 2 m"]:
        return jnp.stack([of(layer["action"][norm]) for norm in ("attn_norm", "mlp_norm")], axis=-2)

    stack = w["layers"]
    if isinstance(stack, list):
        found = jnp.stack([of_layer(layer) for layer in stack], axis=-3)
    else:
        found = jnp.moveaxis(jax.lax.map(of_layer, stack), 0, -3)
    return Modulations(found, of(w["action_norm"]))


def unrolled(w: Spec, dtype: jnp.dtype) -> Spec:
    """The backbone with its layers in a list, their matrices in a dtype, and gate and up apart; for training.

    Then no layer's weights are copied out of a stack, and no gradients into one.
    """
    stack = [
        {name: expert | {"mlp": _gate_and_up_apart(expert["mlp"])} for name, expert in layer.items()}
        for layer in layers.unstacked(w["layers"], dtype)
    ]
    return w | {"layers": stack}


def _gate_and_up_apart(mlp: Spec) -> Spec:
    return {name: layers.apart(x) if name.startswith("gate_up") else x for name, x in mlp.items()}


def forward(
    config: ModelConfig,
    w: Spec,
    segments: Sequence[Segment],
    prefix: Prefix | None = None,
    remat: Remat = "none",
    record: Record | None = None,
    layout: Layout | None = None,
) -> tuple[list[Float[Array, "b _ _"] | None], KeysValuesOfLayers]:
    """Runs segments through all layers and the final norms.

    Args:
        config: of the model.
        w: weights of the backbone: layers stacked, for a scan, or in a list.
        segments: in order.
        prefix: keys and values of an earlier pass, which come before all segments.
        remat: what the backward pass computes again.
        record: takes the residual streams.
        layout: of the segments (`layout_of`), where it is known, or is another one.

    Returns:
        Outputs of each segment, None where they are not needed; and keys and values of all segments, as
        `Prefix.keys_values`, without those of the prefix unless they are written into these.
    """
    placed = _place(segments, layout or layout_of(config, segments, prefix))
    stack, depth = w["layers"], config.depth
    inputs: Any = (stack, prefix and prefix.keys_values, jnp.arange(depth))
    if isinstance(stack, list):
        inputs = list(zip(stack, inputs[1] or [None] * depth, range(depth), strict=True))

    write_at = prefix and prefix.write_at

    def layer(tokens, inputs):
        tokens, own = _layer(config, placed, tokens, *inputs, write_at=write_at)
        return tokens, (own, tokens if record else None)

    def last_layer(tokens, inputs):
        return _layer(config, placed, tokens, *inputs, write_at=write_at, last=True)

    tokens: Any = tuple(segment.tokens for segment in segments)
    layer = rematerialised(layer, remat, scanned=not isinstance(stack, list))
    if all(segment.needed is True for segment in segments):
        tokens, (keys_values, streams) = _unzipped(*layers.through(layer, tokens, inputs))
    else:
        first, last = _split_last(inputs, jnp.dtype(config.dtype))
        tokens, (keys_values, streams) = _unzipped(*layers.through(layer, tokens, first))
        tokens, own = rematerialised(last_layer, remat)(tokens, last)
        keys_values = _append(keys_values, own)
    if record:
        for segment, stream in zip(segments, layers.stacked(streams), strict=True):
            record(f"backbone/layers/{segment.expert}", stream)
    return [_final_norm(w, segment, x) for segment, x in zip(segments, tokens, strict=True)], keys_values


class _Placed(NamedTuple):
    """A segment, what it may see, and where it stands."""

    segment: Segment
    allowed: Bool[Array, "b t s"]
    """Of the cached keys, then those of all segments up to this one."""
    rotation: layers.Rotation


def _place(segments: Sequence[Segment], layout: Layout) -> list[_Placed]:
    lengths = [segment.tokens.shape[1] for segment in segments]
    cached = layout.mask.shape[2] - sum(lengths)
    sin, cos = layout.rotation
    rows = [slice(end - n, end) for n, end in zip(lengths, np.cumsum(lengths), strict=True)]
    return [
        _Placed(segment, layout.mask[:, row, : cached + row.stop], (sin[:, row], cos[:, row]))
        for segment, row in zip(segments, rows, strict=True)
    ]


def layout_of(config: ModelConfig, segments: Sequence[Segment], prefix: Prefix | None = None) -> Layout:
    """Where the tokens of segments stand, and what they see."""
    b, lengths = len(segments[0].tokens), [segment.tokens.shape[1] for segment in segments]
    mask_ar = np.concatenate([segment.mask_ar for segment in segments])
    groups = (np.zeros(n, int) if s.group is None else s.group for s, n in zip(segments, lengths, strict=True))
    valid = (jnp.ones((b, n), bool) if s.valid is None else s.valid for s, n in zip(segments, lengths, strict=True))
    group, valid = np.concatenate(list(groups)), jnp.concatenate(list(valid), axis=1)
    cached, start = (None, 0) if prefix is None else (prefix.mask, prefix.length)
    rotation = layers.rotation(mask.positions(group, valid, start), config.head_dim)
    seen = mask.attention_mask(mask_ar, group, valid, cached)
    if prefix is not None and prefix.write_at is not None:
        before, own = jnp.split(seen, [prefix.mask.shape[1]], axis=2)
        seen = jax.lax.dynamic_update_slice_in_dim(before, own, prefix.write_at, axis=2)
    return Layout(rotation, seen)


def _layer(
    c: ModelConfig,
    placed: Sequence[_Placed],
    tokens: Sequence[Float[Array, "b _ _"]],
    w: Spec,
    cached: KeysValues | None,
    index: Int[Array, ""] | int,
    *,
    write_at: Int[Array, ""] | None,
    last: bool = False,
) -> tuple[tuple[Float[Array, "b _ _"] | None, ...], KeysValues]:
    """One layer of all segments; of the last one, only what is needed.

    Returns:
        The new tokens, None for a segment whose are not needed; and keys and values of all segments.
    """
    if cached is not None and (layer := _by_kernels(c, placed, tokens, w, cached, index)):
        return layer
    seen: list[KeysValues] = [] if cached is None else [cached]
    outputs = []
    for (segment, allowed, rotation), x in zip(placed, tokens, strict=True):
        expert, lora_scale = w[segment.expert], getattr(c, segment.expert).lora_scale
        attn, norms = expert["attn"], ("attn_norm", "mlp_norm")
        if isinstance(segment.condition, Modulations):
            of_layer = jnp.take(segment.condition.layers, index, axis=-3)
            modulation = [of_layer[..., 0, :], of_layer[..., 1, :]]
        else:
            modulation = [_modulation(expert.get(norm), segment.condition, x.dtype) for norm in norms]
        normed, gate = layers.rms_norm(x, expert.get("attn_norm"), modulation[0])
        needed = segment.needed if last else True
        if needed is False:
            seen.append(layers.keys_values(normed, attn, rotation, c.num_kv_heads, lora_scale))
            outputs.append(None)
            continue
        heads = (c.num_heads, c.num_kv_heads)
        alone = len(tokens) == 1 and cached is None and needed is True
        if "qkv" in attn and alone and kernels.attend_here(x.dtype, c.attention):
            qkv = layers.rotated_qkv(normed, attn, rotation, heads)
            own = qkv[:, :, c.num_heads : -c.num_kv_heads], qkv[:, :, -c.num_kv_heads :]
            attended = kernels.attention(qkv, None, allowed.astype(jnp.int8), c.num_heads)
        else:
            query, own = layers.queries_keys_values(normed, attn, rotation, heads, lora_scale)
            earlier = seen if segment.reads_with_gradient else jax.lax.stop_gradient(seen)
            if needed is not True:
                x, query, allowed = (_at(y, needed) for y in (x, query, allowed))
            if write_at is not None:
                earlier, own = [], _written(earlier[0], own, write_at)
            keys, values = (_joined(y, x.dtype) for y in zip(*earlier, own, strict=True))
            attended = attend(query, keys, values, allowed, 1.0 if "qkv" in attn else None, c.attention)
            attended = checkpoint_name(attended, "attn/attended")
        seen.append(own)
        x += _gated(layers.dot("attn/o", attended, attn, lora_scale), gate)
        normed, gate = layers.rms_norm(x, expert.get("mlp_norm"), modulation[1])
        x += _gated(layers.gated_mlp(normed, expert["mlp"]), gate)
        outputs.append(with_logical_constraint(x, ("batch", None, None)))
    keys, values = (_joined(y) for y in zip(*seen[cached is not None :], strict=True))
    return tuple(outputs), (keys, values)


def _by_kernels(c: ModelConfig, placed: Sequence[_Placed], tokens, w: Spec, cached: KeysValues, index: Any):
    """`_layer` of the action expert alone by kernels of our own (`kernels.py`), where these can serve."""
    (segment, allowed, (sin, cos)), x = placed[0], tokens[0]
    expert, condition = w[segment.expert], segment.condition
    if len(tokens) > 1 or "qkv" not in expert["attn"] or not kernels.take(c, x, cached):
        return None
    if isinstance(condition, Modulations) and condition.layers.ndim == 3:
        norms = [kernels.Norm(condition.layers.reshape(-1, condition.layers.shape[-1]), 2 * index + i) for i in (0, 1)]
    elif condition is None:
        norms = [kernels.Norm(expert[norm]["factor"][None], 0) for norm in ("attn_norm", "mlp_norm")]
    else:
        return None
    mask, rotation = allowed.astype(jnp.int8), (sin[:, :, 0], cos[:, :, 0])
    qkv = kernels.norm_qkv(x, norms[0], expert["attn"]["qkv"], rotation, c.num_kv_heads)
    qkv = qkv.reshape(*qkv.shape[:2], -1, c.head_dim)
    attended = kernels.attention(qkv, cached, mask, c.num_heads).reshape(*x.shape[:2], -1)
    x = kernels.add_product(x, attended, expert["attn"]["o"], norms[0])
    hidden = kernels.norm_geglu(x, norms[1], expert["mlp"]["gate_up"])
    x = kernels.add_product(x, hidden, expert["mlp"]["down"], norms[1])
    own = qkv[:, :, c.num_heads :]
    return (x,), (own[:, :, : c.num_kv_heads], own[:, :, c.num_kv_heads :])


def _modulation(norm: Spec | None, condition: Any, dtype: jnp.dtype) -> Float[Array, "b g m"] | None:
    return layers.linear(condition, norm["modulation"], dtype) if norm and "modulation" in norm else None


def _gated(y: Float[Array, "b t d"], gate: Float[Array, "#b _ d"] | None) -> Float[Array, "b t d"]:
    return y if gate is None else y * gate


def _at(x: Shaped[Array, "b t ..."], place: Int[Array, "b"]) -> Shaped[Array, "b 1 ..."]:
    return jnp.take_along_axis(x, place.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)


def _written(cached: KeysValues, own: KeysValues, place: Int[Array, ""]) -> KeysValues:
    """Cached keys and values with those of tokens in their place."""

    def write(old: Float[Array, "b s k h"], x: Float[Array, "b t k h"]) -> Float[Array, "b s k h"]:
        return jax.lax.dynamic_update_slice_in_dim(old, x.astype(old.dtype), place, axis=1)

    return write(cached[0], own[0]), write(cached[1], own[1])


def _joined(parts: Sequence[Float[Array, "b _ k h"]], dtype: jnp.dtype | None = None) -> Float[Array, "b s k h"]:
    return jnp.concatenate([x.astype(dtype or x.dtype) for x in parts], axis=1)


def _final_norm(w: Spec, segment: Segment, x: Float[Array, "b t d"] | None) -> Float[Array, "b t d"] | None:
    if x is None:
        return None
    norm, condition = w.get(f"{segment.expert}_norm"), segment.condition
    found = condition.final if isinstance(condition, Modulations) else _modulation(norm, condition, x.dtype)
    return layers.rms_norm(x, norm, found)[0]


def _unzipped(tokens: Any, outputs: Any) -> tuple[Any, tuple[Any, Any]]:
    if isinstance(outputs, list):
        outputs = [own for own, _ in outputs], [streams for _, streams in outputs]
    return tokens, outputs


def _split_last(inputs: Any, dtype: jnp.dtype) -> tuple[Any, Any]:
    """Inputs of all layers but the last, and of the last."""
    if isinstance(inputs, list):
        return inputs[:-1], inputs[-1]
    first, last = (jax.tree.map(lambda x: x[which], inputs) for which in (slice(-1), -1))
    return layers.cast_matrices(first, dtype), last


def _append(keys_values: Any, last: KeysValues) -> Any:
    if isinstance(keys_values, list):
        return [*keys_values, last]
    return jax.tree.map(lambda first, y: jnp.concatenate([first, y[None]]), keys_values, last)
