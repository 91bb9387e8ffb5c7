"""Parameters rewritten for inference: fewer, larger matrix products that give the same numbers.

    queries, keys and values of a layer   one matrix; the experts' queries carry 1 / sqrt(head dim)
    gate and up                           one matrix
    LoRA pairs                            added to their weights
    action_in and the time MLP (π0)       one matrix for the chunk, one for the time
    last language layer                   keys and values alone, where nothing else of it is needed
    stacks of layers                      lists of layers

The result keeps the paths of the parameters, and the same functions run it (`layers.py`). Each rule makes one array
from a few, in float32, and rounds it once. Scales of norms stay: inside a matrix of bfloat16 they would round
weights that are exact there, and actions would be up to 1.6 times as far off. Arrays are made one after another, the
largest first, and what the next one is made of is read meanwhile: so loading needs little more memory than the folded
parameters themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax.config import ExpertConfig, VisionConfig
from pi0_jax.model import lora
from pi0_jax.model.declare import Leaf, Spec, Stack
from pi0_jax.model.prefix import PrefixNetwork

Arrays = dict[str, Any]
"""Arrays by path."""
Read = Callable[[dict[str, jax.ShapeDtypeStruct]], Arrays]
"""Reads parameters by path, given their shapes and dtypes; those that are stored in fewer bits come as they are."""

_JIT_ABOVE = 1 << 25
"""Bytes. Smaller arrays are made by numpy, which compiles nothing."""


class Rule(NamedTuple):
    """How one folded array is made."""

    sources: tuple[str, ...]
    """Paths of parameters."""
    make: Callable[[Arrays, Any], Any]
    """(float32 arrays by path, of one layer where they are of layers; numpy or jax.numpy) -> array."""
    exact: bool = True
    """Stays float32 whatever the activations are, because its product is float32 in the network, too."""
    layers: range | None = None
    """Layers that it is made of and for; None: the parameters are not of layers."""


def fold(network: PrefixNetwork, read: Read) -> Spec:
    """The folded parameters of a network.

    Args:
        network: whose parameters they are.
        read: where they come from (`from_tree`).
    """
    shapes, found = shapes_of(network), rules(network)

    def source_bytes(target: str) -> int:
        return sum(4 * math.prod(shapes[path].shape) for path in found[target].sources)

    def sources_of(target: str) -> Arrays:
        wanted = {path: jax.ShapeDtypeStruct(shapes[path].shape, dtypes[target]) for path in found[target].sources}
        # What the reader holds itself goes when the arrays are on the device.
        return jax.block_until_ready(read(wanted))

    folded: Arrays = {}
    targets = sorted(found, key=source_bytes, reverse=True)
    dtypes = {target: jnp.dtype("float32" if rule.exact else network.config.dtype) for target, rule in found.items()}
    with ThreadPoolExecutor(1) as reader:
        upcoming = reader.submit(sources_of, targets[0])
        for target, following in zip(targets, (*targets[1:], None), strict=True):
            sources = upcoming.result()
            if following is not None:
                upcoming = reader.submit(sources_of, following)
            made = _made(found[target], sources, dtypes[target], large=source_bytes(target) > _JIT_ABOVE)
            folded |= {_layer_path(target, i): x for i, x in jax.block_until_ready(made)}
            del sources, made
    return lists_of_layers(folded)


def from_tree(params: Spec) -> Read:
    """Reads from parameters in memory."""
    flat: Arrays = flatten_dict(params, sep="/")
    return lambda wanted: {path: flat[path].astype(x.dtype) for path, x in wanted.items()}


def shapes_of(network: PrefixNetwork) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a network's parameters by path."""

    def leaves(spec: Spec, path: str = "", stacked: tuple[int, ...] = ()) -> Iterator[tuple[str, Any]]:
        for name, part in spec.items():
            if isinstance(part, Leaf):
                yield path + name, jax.ShapeDtypeStruct((*stacked, *part.shape), jnp.float32)
            elif isinstance(part, Stack):
                yield from leaves(part.spec, f"{path}{name}/", (*stacked, part.depth))
            else:
                yield from leaves(part, f"{path}{name}/", stacked)

    return dict(leaves(network.spec))


def folded_shapes(network: PrefixNetwork) -> Spec:
    """Shapes and dtypes of the folded parameters, without any arrays."""
    shapes, folded = shapes_of(network), {}
    for target, rule in rules(network).items():
        dtype = jnp.dtype("float32" if rule.exact else network.config.dtype)
        sources = {path: shapes[path] for path in rule.sources}
        if rule.layers is not None:
            sources = {path: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for path, x in sources.items()}
        made = jax.eval_shape(lambda p, rule=rule: rule.make(p, jnp), sources).update(dtype=dtype)
        folded |= {_layer_path(target, i): made for i in ((None,) if rule.layers is None else rule.layers)}
    return lists_of_layers(folded)


def lists_of_layers(flat: Arrays) -> Spec:
    """The tree of arrays by path, in which layers ("layers/3/...") are lists."""

    def listed(tree: Any) -> Any:
        if not isinstance(tree, dict):
            return tree
        tree = {name: listed(part) for name, part in tree.items()}
        return [tree[str(i)] for i in range(len(tree))] if "0" in tree else tree

    return listed(unflatten_dict(flat, sep="/"))


def _layer_path(target: str, layer: int | None) -> str:
    return target if layer is None else target.replace("layers/", f"layers/{layer}/", 1)


def _made(rule: Rule, sources: Arrays, dtype: jnp.dtype, *, large: bool) -> list[tuple[int | None, Any]]:
    """The array of each layer, or the one array."""

    def make(sources: Arrays, xp: Any, dtype: Any) -> Any:
        return rule.make({path: x.astype(np.float32) for path, x in sources.items()}, xp).astype(dtype)

    if large:
        whole = jax.jit(lambda p: make(p, jnp, dtype))
        at = jax.jit(lambda p, i: whole({path: jax.lax.dynamic_index_in_dim(x, i, 0, False) for path, x in p.items()}))
        return [(i, at(sources, i)) for i in rule.layers] if rule.layers is not None else [(None, whole(sources))]
    kind = ml_dtypes.bfloat16 if dtype == jnp.bfloat16 else dtype
    sources = {path: np.asarray(x) for path, x in sources.items()}
    if rule.layers is None:
        return [(None, jnp.asarray(make(sources, np, kind)))]
    parts = ({path: x[i] for path, x in sources.items()} for i in rule.layers)
    return [(i, jnp.asarray(make(p, np, kind))) for i, p in zip(rule.layers, parts, strict=True)]


def rules(network: PrefixNetwork) -> dict[str, Rule]:
    """All folded arrays by path, and what they are made of."""
    c, names = network.config, network.spec
    found = {
        path: _copy(path) for path in shapes_of(network) if not path.startswith(("image_encoder/", "backbone/layers/"))
    }
    found["embedding"] = _copy("embedding", exact=False)
    if c.cameras:
        found |= _vision(c.vision)
    # Its outputs, unless it writes: the actions see the language expert's keys and values.
    unneeded = "action" in network.experts and not network.writes
    for name in network.experts:
        adaptive = name == "action" and c.variant == "pi05"
        found |= _expert(network, name, adaptive, last_keys_only=unneeded and name == "language")
    for name in network.experts:
        if found.pop(f"backbone/{name}_norm/scale", None) and not (unneeded and name == "language"):
            found |= _factor(f"backbone/{name}_norm")
    if "action" in network.experts and c.variant == "pi05":
        for path in ("backbone/action_norm/modulation/kernel", "backbone/action_norm/modulation/bias"):
            found[path] = _copy(path, exact=False)
    if c.variant == "pi0" and "time_mlp_in" in names:
        found |= _time_and_actions(c.action.width)
        del found["time_mlp_in/bias"]
    return found


def _copy(path: str, shape: tuple[int, ...] | None = None, *, exact: bool = True, layers: range | None = None) -> Rule:
    return Rule((path,), lambda p, xp: p[path] if shape is None else p[path].reshape(shape), exact, layers)


def _vision(config: VisionConfig) -> dict[str, Rule]:
    encoder, root, found = "image_encoder", "image_encoder/layers", {}
    for name in ("stem", "patch_embedding") if config.stem_width else ("patch_embedding",):
        width = config.stem_width if name == "stem" else config.width
        found[f"{encoder}/{name}/kernel"] = _copy(f"{encoder}/{name}/kernel", (-1, width))
        found[f"{encoder}/{name}/bias"] = _copy(f"{encoder}/{name}/bias")
    for norm in (("stem_norm",) if config.stem_width else ()) + ("norm",):
        found |= {path: _copy(path) for path in (f"{encoder}/{norm}/scale", f"{encoder}/{norm}/bias")}
    if config.position == "learned":
        found[f"{encoder}/position_embedding"] = _copy(f"{encoder}/position_embedding")
    found["image_projector/kernel"] = _copy("image_projector/kernel", exact=False)
    found["image_projector/bias"] = _copy("image_projector/bias", exact=False)
    every = range(config.depth)
    for leaf in ("kernel", "bias"):
        paths = tuple(f"{root}/{name}/{leaf}" for name in ("query", "key", "value"))
        rows = (config.width,) if leaf == "kernel" else ()

        def side_by_side(p, xp, paths=paths, rows=rows):
            return xp.concatenate([p[path].reshape(*rows, -1) for path in paths], -1)

        found[f"{root}/qkv/{leaf}"] = Rule(paths, side_by_side, False, every)
        for name in ("out", "mlp_in", "mlp_out"):
            columns = config.mlp_dim if name == "mlp_in" else config.width
            path, shape = f"{root}/{name}/{leaf}", (-1, columns) if leaf == "kernel" else (columns,)
            found[path] = _copy(path, shape, exact=False, layers=every)
    for norm in ("attn_norm", "mlp_norm"):
        for leaf in ("scale", "bias"):
            path = f"{root}/{norm}/{leaf}"
            found[path] = _copy(path, layers=every)
    return found


def _expert(network: PrefixNetwork, name: str, adaptive: bool, last_keys_only: bool) -> dict[str, Rule]:
    config, root, found = network.config, f"backbone/layers/{name}", {}
    expert: ExpertConfig = getattr(config, name)
    every = range(config.depth - last_keys_only)

    def matrix(target: str, weights: tuple[str, ...], make, layers: range = every) -> None:
        """Weights, pairs added; one matrix of these."""
        pairs = {w: tuple(f"{root}/{w}_lora_{x}" for x in "ab") for w in weights if _rank(w, expert)}

        def made(p, xp):
            whole = [p[f"{root}/{w}"] for w in weights]
            for i, w in enumerate(weights):
                if w in pairs:
                    a, b = (p[path] for path in pairs[w])
                    whole[i] = lora.merge(w, whole[i], a, b, expert.lora_scale, xp)
            return make(*whole, xp)

        paths = *(f"{root}/{w}" for w in weights), *(path for pair in pairs.values() for path in pair)
        found[f"{root}/{target}"] = Rule(paths, made, False, layers)

    def columns(w, xp):
        return xp.moveaxis(w, 0, 1).reshape(w.shape[1], -1)

    def qkv(q, kv, xp):
        return xp.concatenate([q.reshape(len(q), -1) * config.head_dim**-0.5, columns(kv, xp)], -1)

    def flat(w, _):
        return w.reshape(-1, w.shape[-1])

    matrix("attn/qkv", ("attn/q", "attn/kv"), qkv)
    matrix("attn/o", ("attn/o",), flat)
    matrix("mlp/gate_up", ("mlp/gate_up",), columns)
    matrix("mlp/down", ("mlp/down",), flat)
    if last_keys_only:
        matrix("attn/kv", ("attn/kv",), columns, range(config.depth - 1, config.depth))
    for norm in ("attn_norm", "mlp_norm"):
        layers = range(config.depth) if norm == "attn_norm" else every
        if adaptive:
            paths = (f"{root}/{norm}/modulation/{leaf}" for leaf in ("kernel", "bias"))
            found |= {path: _copy(path, exact=False, layers=layers) for path in paths}
        else:
            found |= _factor(f"{root}/{norm}", layers)
    return found


def _factor(norm: str, layers: range | None = None) -> dict[str, Rule]:
    """What a norm multiplies by, in place of its scale."""
    scale = f"{norm}/scale"
    return {f"{norm}/factor": Rule((scale,), lambda p, xp: 1 + p[scale], layers=layers)}


def _rank(weight: str, expert: ExpertConfig) -> int:
    return expert.lora_attn_rank if weight.startswith("attn/") else expert.lora_mlp_rank


def _time_and_actions(width: int) -> dict[str, Rule]:
    """The first matrix of π0's time MLP, divided between the chunk and the time."""
    kernel, bias, mixing = "action_in/kernel", "action_in/bias", "time_mlp_in/kernel"
    offset = "time_mlp_in/bias"
    return {
        kernel: Rule((kernel, mixing), lambda p, xp: p[kernel] @ p[mixing][:width]),
        bias: Rule((bias, mixing, offset), lambda p, xp: p[bias] @ p[mixing][:width] + p[offset]),
        mixing: Rule((mixing,), lambda p, xp: p[mixing][width:]),
    }
