"""Parameters of a network as it declares them, and the model whose parameters a checkpoint's tensors are.

An axis goes by the logical name that the network gives it (`model/`); one without a name is `axis0`, `axis1`, … after
its place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from pi0_jax.config import (
    Autoregressive,
    Expert,
    Gaussian,
    Joint,
    ModelConfig,
    ObjectiveConfig,
    PolicyConfig,
    Reflow,
    Straight,
)
from pi0_jax.convert.lazy import LazyArray
from pi0_jax.convert.rules import Parameter, Rule
from pi0_jax.errors import UserError
from pi0_jax.objective import make_objective

Config = TypeVar("Config")
FLOW = Gaussian()
"""π0's objective, on whose network checkpoints of other formats are."""

HEAD_FLAGS = {
    "num_heads": "--num-heads (query heads of the experts; 8 in the released models)",
    "num_kv_heads": "--num-kv-heads (key/value heads of the experts; 1 in the released models)",
    "vision.num_heads": "--vision-heads (attention heads of the image encoder; 16 in the released models)",
}
"""Fields that tensors with flattened heads leave open, and the flags that set them."""

_PROBE = {
    "vision.width": 130,
    "vision.depth": 7,
    "vision.mlp_dim": 101,
    "vision.num_heads": 5,
    "vision.patch_size": 9,
    "vision.image_size": 45,
    "language.width": 31,
    "language.mlp_dim": 37,
    "language.lora_attn_rank": 12,
    "language.lora_mlp_rank": 13,
    "action.width": 44,
    "action.mlp_dim": 41,
    "action.lora_attn_rank": 14,
    "action.lora_mlp_rank": 15,
    "depth": 11,
    "num_heads": 34,
    "num_kv_heads": 17,
    "head_dim": 20,
    "vocab_size": 53,
    "action_dim": 29,
}
"""A model whose fields all differ: the length of an axis of its parameters tells which field the axis is."""
_PATCHES = 25
"""Patches of an image in that model; no field, but `image_size` follows from it."""


def initial_parameters(model: ModelConfig, key: jax.Array, objective: ObjectiveConfig = FLOW) -> dict[str, Any]:
    """The network's freshly initialised parameters by path, in boxes with logical axis names."""
    return dict(flatten_dict(make_objective(objective, model).network.init(key), sep="/"))


@functools.lru_cache
def parameters(model: ModelConfig, objective: ObjectiveConfig = FLOW) -> Mapping[str, Parameter]:
    """Path of each parameter of the network that an objective trains, joined by "/", to its shape and axes."""
    runs = dataclasses.replace(model, action_horizon=model.action_horizon or 1)  # 0: not known
    if model.variant == "pi0_fast":
        objective = Autoregressive()
    boxes = jax.eval_shape(lambda key: initial_parameters(runs, key, objective), jax.random.key(0))
    found = {}
    for path, box in boxes.items():
        names = getattr(box, "names", ())
        shape = nn.meta.unbox(box).shape
        names = (*names, *(None,) * (len(shape) - len(names)))
        found[path] = Parameter(shape, tuple(name or f"axis{i}" for i, name in enumerate(names)))
    return MappingProxyType(found)


def has_velocity_expert(policy: PolicyConfig) -> bool:
    """Whether the policy has π0's action expert, and it predicts velocities.

    (Predictions of noise and v have the same parameters, and would be mistaken for velocities.)
    """
    objective = policy.objective
    match objective.flow if isinstance(objective, Joint) else objective:
        case Gaussian(path=Straight(), predicts="velocity") | Reflow():
            return isinstance(policy.model.head, Expert) and policy.model.variant != "pi0_fast"
    return False


def exists_elsewhere(policy: PolicyConfig) -> bool:
    """Whether other formats have such policies: π0, π0.5, π0-FAST, or a backbone alone. Others exist only here."""
    return policy.model.variant == "pi0_fast" or has_velocity_expert(policy)


def replaced(config: Config, changes: Mapping[str, Any]) -> Config:
    """A configuration with other values in fields that may lie deeper: `{"vision.width": 64}`."""
    nested: defaultdict[str, dict[str, Any]] = defaultdict(dict)
    plain = {}
    for name, value in changes.items():
        field, _, inner = name.partition(".")
        if inner:
            nested[field][inner] = value
        else:
            plain[field] = value
    plain |= {field: replaced(getattr(config, field), inner) for field, inner in nested.items()}
    return dataclasses.replace(config, **plain)  # pyright: ignore[reportArgumentType, reportCallIssue]


def infer_model(
    rules: Sequence[Rule], tensors: Mapping[str, LazyArray], guess: ModelConfig, heads: Mapping[str, int]
) -> ModelConfig:
    """The model that foreign tensors make. Where they disagree, most decide; `rules.bind` names those that do not fit.

    Args:
        guess: the variant, which adapters there are, and all that tensors cannot show (cameras, horizon, …).
        heads: fields of `HEAD_FLAGS` that are known from elsewhere.

    Raises:
        UserError: numbers of heads stay open; the message names the flags.
    """
    probe = replaced(guess, _probe_of(guess))
    declared = parameters(probe)
    fields = {size: field for field, size in _PROBE.items()} | {_PATCHES: "patches", 1: "1"}
    votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
    products: list[tuple[list[str | None], int]] = []
    rule_of = {name: rule for rule in rules for name in rule.names}
    for name, tensor in tensors.items():
        layer = re.search(r"(?<=\.)\d+(?=\.)", name)
        rule = rule_of.get(re.sub(r"(?<=\.)\d+(?=\.)", "{}", name, count=1)) or rule_of.get(name)
        if rule is None or rule.ours not in declared:
            continue
        field_of = {axis: fields.get(n) for axis, n in zip(*reversed(declared[rule.ours]), strict=True)}
        groups = rule.groups(declared[rule.ours])
        if len(groups) != len(tensor.shape):
            continue
        if rule.by_layer and layer:
            votes[str(field_of["layers"])][1 + int(layer[0])] += 1
        for group, size in zip(groups, tensor.shape, strict=True):
            members = [field_of[axis] for axis in group if field_of[axis] != "1"]
            if len(members) > 1:
                products.append((members, size))
            elif members and members[0] is not None:
                votes[members[0]][size] += 1
    by_layer = {"depth", "vision.depth"} if any(rule.by_layer for rule in rules) else set()
    sizes = {f: max(count) if f in by_layer else count.most_common(1)[0][0] for f, count in votes.items()}
    sizes = _solved(products, dict(heads) | sizes)
    patches = sizes.pop("patches", None)
    if patches is not None and "vision.patch_size" in sizes:
        sizes["vision.image_size"] = math.isqrt(patches) * sizes["vision.patch_size"]
    return replaced(guess, sizes)


def _probe_of(guess: ModelConfig) -> dict[str, int]:
    """`_PROBE` without the ranks of adapters that are not there."""
    found = dict(_PROBE)
    for expert in ("language", "action"):
        for rank in ("lora_attn_rank", "lora_mlp_rank"):
            if not getattr(getattr(guess, expert), rank):
                found[f"{expert}.{rank}"] = 0
    return found


def _solved(products: list[tuple[list[str | None], int]], sizes: dict[str, int]) -> dict[str, int]:
    """The sizes, and those that follow from products of which all other factors are known; raises as `infer_model`."""
    while True:
        votes: defaultdict[str, Counter[int]] = defaultdict(Counter)
        unsolved: set[str] = set()
        for members, product in products:
            unknown = [field for field in members if field not in sizes]
            known = math.prod(sizes[field] for field in members if field in sizes)
            if len(unknown) == 1 and unknown[0] is not None and product % known == 0:
                votes[unknown[0]][product // known] += 1
            elif len(unknown) > 1:
                unsolved |= {field for field in unknown if field is not None}
        if not votes:
            break
        sizes = sizes | {field: count.most_common(1)[0][0] for field, count in votes.items()}
    if flags := [flag for field, flag in HEAD_FLAGS.items() if field in unsolved]:
        raise UserError("the tensors give only products of these sizes; name them:\n  " + "\n  ".join(flags))
    return sizes
