"""Trainable and frozen parameters: recipes and patterns, and the partition of a tree into the two.

Each of the two is a nested dict without the other's paths, so that gradient, optimizer, average and checkpoint see the
trainable leaves and need not know of the frozen ones. `optax.multi_transform` with `set_to_zero` would save the
optimizer's state alone: frozen leaves would still have a gradient, count in its norm, and be averaged.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax.config import ModelConfig, TrainConfig, TuneConfig
from pi0_jax.config.replace import replace
from pi0_jax.errors import UserError

_LANGUAGE = ("embedding", "backbone/layers/language/*", "backbone/language_norm/*")
_ACTION = ("backbone/layers/action/*", "backbone/action_norm/*")
RECIPES: dict[str, tuple[str, ...]] = {
    "full": (),
    "expert": ("image_encoder/*", "image_projector/*", *_LANGUAGE),
    "vision_frozen": ("image_encoder/*",),
}
"""Patterns that each recipe freezes, adapters excepted; `lora` freezes the experts that have adapters."""


def with_adapters(config: TrainConfig) -> TrainConfig:
    """The run with the adapters that its recipe asks for in the model, where there were none."""
    model = config.policy.model
    if config.tune.recipe != "lora" or any(has_adapters(model, name) for name in ("language", "action")):
        return config
    ranks = zip(("language", "action"), config.tune.lora_ranks, strict=True)
    kinds = ("lora_attn_rank", "lora_mlp_rank")
    return replace(config, {f"policy.model.{name}.{kind}": rank for name, rank in ranks for kind in kinds})


def has_adapters(model: ModelConfig, expert: str) -> bool:
    """Whether an expert, `language` or `action`, has adapters."""
    return bool(getattr(model, expert).lora_attn_rank or getattr(model, expert).lora_mlp_rank)


def frozen_names(tune: TuneConfig, model: ModelConfig, names: Iterable[str]) -> frozenset[str]:
    """Those of all parameters' paths that are frozen, in a model that has its adapters.

    Raises:
        UserError: a pattern matches no parameter, the recipe lora finds no adapters, or nothing is left to train.
    """
    names = list(names)
    for field in ("frozen", "trained"):
        for pattern in getattr(tune, field):
            if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f"tune.{field} {pattern!r} matches no parameter. Paths begin with {', '.join(modules(names))}; * "
                    "stands for anything."
                )
    recipe = RECIPES.get(tune.recipe) or _frozen_by_lora(tune, model)
    frozen = {
        name
        for name in names
        if ((_matches(name, recipe) and not is_adapter(name)) or _matches(name, tune.frozen))
        and not _matches(name, tune.trained)
    }
    if len(frozen) == len(names):
        raise UserError(
            f"tune freezes all {len(names)} parameters; name some to train (--tune.trained 'action_out/*')."
        )
    return frozenset(frozen)


def _frozen_by_lora(tune: TuneConfig, model: ModelConfig) -> tuple[str, ...]:
    if tune.recipe == "full":
        return ()
    adapted = [has_adapters(model, name) for name in ("language", "action")]
    if not any(adapted):
        raise UserError(f"tune.recipe lora needs adapters, and tune.lora_ranks are {tune.lora_ranks}; openpi's: 16 32.")
    return _LANGUAGE * adapted[0] + _ACTION * adapted[1]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def is_adapter(name: str) -> bool:
    """Whether a path is that of half an adapter."""
    return name.endswith(("_lora_a", "_lora_b"))


def flat(tree: Mapping[str, Any] | None) -> dict[str, Any]:
    """The leaves of nested dicts by path, such as "backbone/layers/action/attn/q"; of None, none."""
    return dict(flatten_dict(tree or {}, sep="/"))


def partition(tree: Mapping[str, Any], frozen: Iterable[str]) -> tuple[Any, Any]:
    """The leaves of nested dicts, as trees of those that are trained and those whose paths are `frozen`; None for the
    second where nothing is frozen. Leaves may be linen's boxes."""
    frozen = set(frozen)
    if not frozen:
        return tree, None
    trainable, others = (
        unflatten_dict({name: leaf for name, leaf in flat(tree).items() if (name in frozen) is wanted}, sep="/")
        for wanted in (False, True)
    )
    return trainable, others


def combine(trainable: Mapping[str, Any], frozen: Mapping[str, Any] | None) -> Any:
    """The inverse of `partition`."""
    if frozen is None:
        return trainable
    return unflatten_dict(flat(trainable) | flat(frozen), sep="/")


def modules(names: Iterable[str]) -> list[str]:
    """The modules of a model that its parameters are counted by, in order."""
    return list(dict.fromkeys(_module(name) for name in sorted(names)))


def _module(name: str) -> str:
    adapters = " (adapters)" * is_adapter(name)
    pieces = name.split("/")
    if pieces[0] != "backbone":
        return pieces[0] + adapters
    return "/".join(["backbone/layers", pieces[2]] if pieces[1] == "layers" else pieces[:2]) + adapters


def table(trainable, frozen) -> str:
    """A table of modules, of the two trees of `partition`: parameters, how many are trained, and stored dtypes."""
    leaves = {name: (leaf, True) for name, leaf in flat(trainable).items()}
    leaves |= {name: (leaf, False) for name, leaf in flat(frozen).items()}
    rows = [("module", "parameters", "trained", "dtype")]
    for module in [*modules(leaves), ""]:
        own = [leaf for name, leaf in leaves.items() if module in ("", _module(name))]
        count, trained = (sum(x.size for x, learns in own if learns or every) for every in (True, False))
        dtypes = sorted({str(jnp.dtype(x.dtype)) for x, _ in own})
        rows.append((module or "all", f"{count:,}", f"{trained:,}" if trained else "-", ", ".join(dtypes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(f"  {a:{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
