"""Weights rewritten for running: fewer, larger matrix products that give the same numbers.

    queries, keys and values of a layer   one matrix; queries carry 1 / sqrt(head dim)
    gate and up                           one matrix
    scales of plain norms                 inside the matrix that follows; LayerNorm's offsets inside its bias
    LoRA adapters                         added to their weights
    action_in and the time MLP (π0)       one matrix for the chunk, one for the time
    last language layer                   keys and values alone: nobody asks for more

Each rule makes one array from a few of the checkpoint's, in float32, and rounds it once. They are made one after
another, the largest first, so that loading needs little more than the rewritten weights themselves. `fast.py` runs
them. Axis letters: see `pi0_jax.batch`, and f for a feed-forward's width.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from pi0_jax import checkpoint, pi0
from pi0_jax.config import ExpertConfig, ModelConfig, VisionConfig
from pi0_jax.model import lora
from pi0_jax.model.heads import make_network

Weights = dict[str, Any]
Read = Callable[[dict[str, jax.ShapeDtypeStruct]], dict[str, Any]]
"""Arrays of a checkpoint by path, given their shapes and the dtypes to read them in."""
Bits = Literal["int8", "fp8"]

STACKED = ("vision/layers/", "language/", "action/")
"""Beginnings of paths whose arrays have a leading axis over layers."""
_JIT_ABOVE = 1 << 25
"""Bytes. Smaller arrays are rewritten by numpy, which compiles nothing."""


class Rule(NamedTuple):
    """How one array of the rewritten weights is made."""

    sources: tuple[str, ...]
    """Paths in the checkpoint."""
    make: Callable[[dict[str, Any], Any], Any] | None
    """From float32 arrays by path, and numpy or jax.numpy; None: the one source as it is."""
    exact: bool = False
    """Stays float32 whatever the activations are, because its product is float32 in the network, too."""
    layers: slice | None = None
    """Those of the sources' layers that `make` gets, the first axis, and does nothing across; None: all there is."""

    def __call__(self, sources: dict[str, Any], xp: Any) -> Any:
        """The array, from all layers of the sources."""
        if self.make is None:
            return sources[self.sources[0]]
        if self.layers is not None:
            sources = {path: x[self.layers] for path, x in sources.items()}
        return self.make({path: x.astype(xp.float32) for path, x in sources.items()}, xp)


class Quantized(NamedTuple):
    """A matrix in eight bits: `values` · `scale`."""

    values: Array
    """`[*l d f]`, int8 or float8_e4m3fn."""
    scale: Array
    """`[*l f]`, float32: one for each output."""


def can_rewrite(config: ModelConfig) -> bool:
    """Whether there are rules for this kind of model: those with an action expert that takes a chunk and a time."""
    return config.head == "expert" and config.prediction in ("velocity", "epsilon", "v")


def rewrite(config: ModelConfig, read: Read, *, unstacked: bool = False) -> Weights:
    """The rewritten weights of a model.

    Args:
        config: of the model, one that `can_rewrite`.
        read: where the weights come from.
        unstacked: lists of layers, for a straight-line program, instead of stacks of them, for a scan.
    """
    shapes, found = shapes_of(config), rules(config)

    def source_bytes(target: str) -> int:
        return sum(math.prod(shapes[path].shape) for path in found[target].sources)

    weights = {}
    for target in sorted(found, key=source_bytes, reverse=True):
        rule = found[target]
        dtype = jnp.dtype("float32" if rule.exact else config.dtype)
        # What the reader holds itself goes when the arrays are on the device.
        sources = jax.block_until_ready(
            read({path: jax.ShapeDtypeStruct(shapes[path].shape, dtype) for path in rule.sources})
        )
        large, listed = 4 * source_bytes(target) > _JIT_ABOVE, unstacked and target.startswith(STACKED)
        made = _made(rule, sources, dtype, large=large, unstacked=listed)
        weights[target] = jax.block_until_ready(made)
        del sources
    return _by_layer(unflatten_dict(weights, sep="/")) if unstacked else unflatten_dict(weights, sep="/")


def from_checkpoint(path: str | Path, config: ModelConfig) -> Read:
    """Reads from a checkpoint of ours: small arrays at once, large ones when they are asked for.

    Raises:
        CheckpointError: the weights are not those of such a model.
    """
    shapes = shapes_of(config)
    checkpoint.check_params(path, unflatten_dict(shapes, sep="/"))

    def restored(wanted: dict[str, Any]) -> dict[str, Any]:
        part = unflatten_dict(wanted, sep="/")
        return flatten_dict(checkpoint.restore_params(path, part, partial=True), sep="/")

    small = restored({path: x for path, x in shapes.items() if 4 * x.size < _JIT_ABOVE})

    def read(wanted):
        large = {path: x for path, x in wanted.items() if path not in small}
        rest = {path: small[path].astype(x.dtype) for path, x in wanted.items() if path in small}
        return rest | (restored(large) if large else {})

    return read


def read_all(config: ModelConfig, read: Read):
    """A model's parameters as they are, float32."""
    return unflatten_dict(read(shapes_of(config)), sep="/")


def shapes_of(config: ModelConfig) -> dict[str, Any]:
    """Shapes of a model's parameters by path."""
    init = functools.partial(pi0.init_params, make_network(config))
    return flatten_dict(nn.meta.unbox(jax.eval_shape(init, jax.random.key(0))), sep="/")


def from_tree(params) -> Read:
    """Reads from weights in memory."""
    flat: dict[str, Any] = flatten_dict(params, sep="/")
    return lambda wanted: {path: flat[path].astype(x.dtype) for path, x in wanted.items()}


def quantized(weights: Any, bits: Bits, name: str = "") -> Any:
    """Rewritten weights with the matrices of all layers in eight bits.

    Args:
        weights: of `rewrite`.
        bits: int8, or float8 (e4m3), whose products also round the tokens.
        name: of these weights within others.
    """
    if isinstance(weights, dict):
        return {key: quantized(value, bits, key) for key, value in weights.items()}
    if isinstance(weights, list):
        return [quantized(value, bits, name) for value in weights]
    return quantize(weights, bits) if name in ("qkv", "kv", "o", "gate_up", "up", "down", "project") else weights


@functools.partial(jax.jit, static_argnums=1)
def quantize(w: Array, bits: Bits) -> Quantized:
    """Rounds a matrix `[*l d f]` to eight bits, each output with the scale that its largest weight needs."""
    dtype, most = (jnp.int8, 127.0) if bits == "int8" else (jnp.float8_e4m3fn, 448.0)
    w = w.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(w), axis=-2), 1e-30) / most
    values = w / scale[..., None, :]
    return Quantized((jnp.round(values) if bits == "int8" else values).astype(dtype), scale)


def rules(config: ModelConfig) -> dict[str, Rule]:
    """All arrays of the rewritten weights, by path, and what they are made of."""
    found = _vision(config.vision) if config.cameras else {}
    found |= {"embedding": _copy("embedding")}
    found |= _expert("language", config.language, config, slice(None, -1))
    kv = "backbone/layers/language/attn/kv"
    found["language_last/kv"] = _rule(
        (kv,), lambda w, scale, xp: _columns(scale[-1:, :, None], w[0][-1:], xp)[0], "language", config.language,
        "attn_norm",
    )  # fmt: skip
    found |= _expert("action", config.action, config, slice(None))
    found |= _time_and_actions(config)
    return found


def _made(rule: Rule, sources: dict[str, Any], dtype: jnp.dtype, *, large: bool, unstacked: bool) -> Any:
    """The array, or a list over layers. Of large ones a layer at a time is made, so that little is held beside them."""
    if not large:
        kind = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype
        array = jnp.asarray(rule({path: np.asarray(x) for path, x in sources.items()}, np).astype(kind))
        return list(array) if unstacked else array
    if rule.layers is None:
        array = (
            sources[rule.sources[0]] if rule.make is None else jax.jit(lambda p: rule(p, jnp).astype(dtype))(sources)
        )
        return list(array) if unstacked else array

    def layer(sources, i):
        some = {path: jax.lax.dynamic_slice_in_dim(x, i, 1) for path, x in sources.items()}
        return rule._replace(layers=slice(None))(some, jnp)[0].astype(dtype)

    numbers = range(*rule.layers.indices(len(sources[rule.sources[0]])))
    if unstacked:
        one = jax.jit(layer)
        return [one(sources, i) for i in numbers]
    # Not a loop of XLA's: it would make all sources float32 before the first layer.
    put = jax.jit(
        lambda out, sources, i, at: jax.lax.dynamic_update_index_in_dim(out, layer(sources, i), at, 0), donate_argnums=0
    )
    out = jnp.zeros((len(numbers), *jax.eval_shape(layer, sources, 0).shape), dtype)
    for at, i in enumerate(numbers):
        out = put(out, sources, i, at)
    return out


def _by_layer(weights: Weights) -> Weights:
    """Dicts of lists over layers as lists of dicts."""

    def turned(layers: dict[str, list]) -> list[dict[str, Any]]:
        return [dict(zip(layers, values, strict=True)) for values in zip(*layers.values(), strict=True)]

    found = weights | {name: turned(weights[name]) for name in ("language", "action")}
    if "vision" in weights:
        found["vision"] = weights["vision"] | {"layers": turned(weights["vision"]["layers"])}
    return found


def _copy(path: str, shape: Callable[[Any], Any] | None = None, *, exact: bool = False) -> Rule:
    return Rule((path,), shape and (lambda p, _: shape(p[path])), exact)


def _vision(config: VisionConfig) -> dict[str, Rule]:
    def patches(x):
        return x.reshape(-1, x.shape[-1])

    encoder, layers, found = "image_encoder", "image_encoder/layers", {}
    for name in ("stem", "patch_embedding") if config.stem_width else ("patch_embedding",):
        found[f"vision/{name}/kernel"] = _copy(f"{encoder}/{name}/kernel", patches, exact=True)
        found[f"vision/{name}/bias"] = _copy(f"{encoder}/{name}/bias", exact=True)
    if config.stem_width:
        for name in ("scale", "bias"):
            found[f"vision/stem_norm/{name}"] = _copy(f"{encoder}/stem_norm/{name}", exact=True)
    if config.position == "learned":
        found["vision/position"] = _copy(f"{encoder}/position_embedding", exact=True)

    def after_norm(target: str, norm: str, kernels: tuple[str, ...], scale: float = 1.0) -> None:
        """A norm's scale and offset inside the matrices that follow; the first of them times a number."""
        names = [f"{norm}/scale", f"{norm}/bias"] + [f"{k}/{part}" for k in kernels for part in ("kernel", "bias")]

        def parts(p, xp):
            stacked = p[names[0]].ndim == 2
            matrix = (p[names[0]].shape[0], p[names[0]].shape[1], -1) if stacked else (p[names[0]].shape[0], -1)
            vector = (p[names[0]].shape[0], -1) if stacked else (-1,)
            factors = [scale] + [1.0] * (len(kernels) - 1)
            w = [p[f"{k}/kernel"].reshape(matrix) * f for k, f in zip(kernels, factors, strict=True)]
            b = [p[f"{k}/bias"].reshape(vector) * f for k, f in zip(kernels, factors, strict=True)]
            return xp.concatenate(w, -1), xp.concatenate(b, -1)

        def kernel(p, xp):
            return p[names[0]][..., None] * parts(p, xp)[0]

        def bias(p, xp):
            w, b = parts(p, xp)
            return b + xp.einsum("...d,...df->...f", p[names[1]], w)

        own = slice(None) if norm.startswith(layers) else None
        found[target] = Rule(tuple(names), kernel, layers=own)
        found[f"{target}_bias"] = Rule(tuple(names), bias, exact=True, layers=own)

    heads = tuple(f"{layers}/{name}" for name in ("query", "key", "value"))
    after_norm("vision/layers/qkv", f"{layers}/attn_norm", heads, (config.width // config.num_heads) ** -0.5)
    after_norm("vision/layers/up", f"{layers}/mlp_norm", (f"{layers}/mlp_in",))
    after_norm("vision/project", f"{encoder}/norm", ("image_projector",))
    for target, name in (("o", "out"), ("down", "mlp_out")):
        found[f"vision/layers/{target}"] = _copy(
            f"{layers}/{name}/kernel", lambda x: x.reshape(len(x), -1, x.shape[-1])
        )
        found[f"vision/layers/{target}_bias"] = _copy(f"{layers}/{name}/bias", exact=True)
    return found


def _rule(
    paths: tuple[str, ...],
    make: Callable[[list[Any], Any, Any], Any],
    name: str,
    expert: ExpertConfig,
    norm: str | None,
    layers: slice | None = None,
) -> Rule:
    """A rule for weights of an expert: adapters are added first, and `make` gets the weights and 1 + the norm's scale
    (1 without a norm)."""
    adapters = {path: (f"{path}_lora_a", f"{path}_lora_b") for path in paths if _rank(path, expert)}
    scale = () if norm is None else (f"backbone/layers/{name}/{norm}/scale",)

    def whole(p, xp):
        merged = []
        for path in paths:
            w = p[path]
            if path in adapters:
                a, b = (p[x] for x in adapters[path])
                kind = path.removeprefix(f"backbone/layers/{name}/")
                add = functools.partial(lora.merge, kind, scale=expert.lora_scale, xp=xp)
                w = xp.stack([add(*x) for x in zip(w, a, b, strict=True)])
            merged.append(w)
        return make(merged, 1.0 + p[scale[0]] if scale else xp.ones((1, 1), xp.float32), xp)

    return Rule((*paths, *(x for pair in adapters.values() for x in pair), *scale), whole, layers=layers)


def _rank(path: str, expert: ExpertConfig) -> int:
    return expert.lora_attn_rank if "/attn/" in path else expert.lora_mlp_rank


def _columns(factor, w, xp):
    """`[l c d ...]` to `[l d c·...]`, row d times the factor."""
    w = xp.moveaxis(w, 1, 2)
    return factor * w.reshape(*w.shape[:2], -1)


def _expert(name: str, expert: ExpertConfig, config: ModelConfig, layers: slice) -> dict[str, Rule]:
    root = f"backbone/layers/{name}"
    adaptive = name == "action" and config.variant == "pi05"
    attn, mlp = (None, None) if adaptive else ("attn_norm", "mlp_norm")

    def qkv(w, scale, xp):
        q, kv = w
        scale = scale[..., None]
        q = scale * q.reshape(*q.shape[:2], -1) * config.head_dim**-0.5
        return xp.concatenate([q, _columns(scale, kv, xp)], -1)

    def gate_up(w, scale, xp):
        return _columns(scale[..., None], w[0], xp)

    def flat(w, _, xp):
        return w[0].reshape(len(w[0]), -1, w[0].shape[-1])

    found = {
        f"{name}/qkv": _rule((f"{root}/attn/q", f"{root}/attn/kv"), qkv, name, expert, attn, layers),
        f"{name}/o": _rule((f"{root}/attn/o",), flat, name, expert, None, layers),
        f"{name}/gate_up": _rule((f"{root}/mlp/gate_up",), gate_up, name, expert, mlp, layers),
        f"{name}/down": _rule((f"{root}/mlp/down",), flat, name, expert, None, layers),
    }
    if adaptive:
        for part in ("kernel", "bias"):
            norms = tuple(f"{root}/{norm}/modulation/{part}" for norm in ("attn_norm", "mlp_norm"))
            found[f"{name}/modulation_{part}"] = Rule(
                norms, lambda p, xp, norms=norms: xp.stack([p[norm] for norm in norms], 1)
            )
    return found


def _time_and_actions(config: ModelConfig) -> dict[str, Rule]:
    float32 = functools.partial(_copy, exact=True)
    found = {f"{part}/bias": float32(f"{part}/bias") for part in ("action_out", "time_mlp_out")}
    found["time_mlp_out/kernel"] = float32("time_mlp_out/kernel")
    if config.variant == "pi05":
        for path in ("action_in/kernel", "action_in/bias", "time_mlp_in/kernel", "time_mlp_in/bias"):
            found[path] = float32(path)
        for part in ("kernel", "bias"):
            found[f"final_modulation/{part}"] = _copy(f"backbone/action_norm/modulation/{part}")
        return found | {"action_out/kernel": float32("action_out/kernel")}
    width = config.action.width
    mixed = ("action_in/kernel", "action_in/bias", "time_mlp_in/kernel", "time_mlp_in/bias")
    norm = "backbone/action_norm/scale"
    return found | {
        "state_in/kernel": float32("state_in/kernel"),
        "state_in/bias": float32("state_in/bias"),
        "action_in/kernel": Rule(mixed[::2], lambda p, xp: p[mixed[0]] @ p[mixed[2]][:width], exact=True),
        "action_in/bias": Rule(mixed[1:], lambda p, xp: p[mixed[1]] @ p[mixed[2]][:width] + p[mixed[3]], exact=True),
        "time_mlp_in/kernel": Rule((mixed[2],), lambda p, xp: p[mixed[2]][width:], exact=True),
        "action_out/kernel": Rule(
            ("action_out/kernel", norm), lambda p, xp: (1.0 + p[norm])[:, None] * p["action_out/kernel"], exact=True
        ),
    }
