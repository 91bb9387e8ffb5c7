"""Changes to an opened checkpoint: dtype, merged adapters, a wider or otherwise larger model, a fresh action expert.

Each takes an `OpenCheckpoint` and returns one whose tensors compute when they are read.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import flax.linen as nn
import jax
import ml_dtypes
import numpy as np

from pi0_jax.config import Gaussian, ModelConfig
from pi0_jax.convert.formats import OpenCheckpoint, Overrides
from pi0_jax.convert.lazy import LazyArray, computed, entry_by_entry, in_memory
from pi0_jax.convert.parameters import FLOW, has_velocity_expert, initial_parameters, parameters, replaced
from pi0_jax.errors import UserError
from pi0_jax.model import lora
from pi0_jax.model.head.joint import CODE_HEAD, CODE_TABLE
from pi0_jax.sampler import Euler

Dtype = Literal["float32", "bfloat16"]
DTYPES: dict[Dtype, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def cast(opened: OpenCheckpoint, dtype: Dtype) -> tuple[OpenCheckpoint, bool]:
    """All tensors in one dtype, rounded to nearest, and whether that loses precision."""
    target = DTYPES[dtype]
    loses = any(ml_dtypes.finfo(t.dtype).nmant > ml_dtypes.finfo(target).nmant for t in opened.tensors.values())

    def convert(tensor: LazyArray) -> LazyArray:
        return tensor._replace(dtype=target, read=lambda i: tensor.read(i).astype(target))

    return opened._replace(tensors={name: convert(tensor) for name, tensor in opened.tensors.items()}), loses


def merge_lora(opened: OpenCheckpoint) -> OpenCheckpoint:
    """The model without adapters that computes what the model with them does (`model.lora`)."""
    tensors = {path: tensor for path, tensor in opened.tensors.items() if "_lora_" not in path}
    plain = {}
    for expert in ("language", "action"):
        scale = getattr(opened.policy.model, expert).lora_scale
        for name in lora.EINSUMS:
            path = f"backbone/layers/{expert}/{name}"
            if f"{path}_lora_a" in opened.tensors:
                w, a, b = (opened.tensors[path + end] for end in ("", "_lora_a", "_lora_b"))
                tensors[path] = _merged(name, w, a, b, scale)
        for field, value in (("lora_attn_rank", 0), ("lora_mlp_rank", 0), ("lora_scale", 1.0)):
            plain[f"model.{expert}.{field}"] = value
    return opened._replace(policy=replaced(opened.policy, plain), tensors=tensors)


def without_table(opened: OpenCheckpoint) -> OpenCheckpoint:
    """The policy without a table of codes of their own and their head, which only its training needs: it acts by the
    flow, as before, and by text."""
    objective = opened.policy.objective
    if objective.codec is None or not objective.codec.own_table:
        return opened
    tensors = {path: x for path, x in opened.tensors.items() if not path.startswith((CODE_TABLE, CODE_HEAD))}
    objective = replaced(objective, {"codec": None}) if objective.text_tokens else getattr(objective, "flow", FLOW)
    policy = dataclasses.replace(opened.policy, objective=objective)
    return opened._replace(policy=policy, tensors=tensors, codec=None)


def grow(opened: OpenCheckpoint, overrides: Overrides) -> OpenCheckpoint:
    """A model with more action dimensions, or another horizon, cameras or prompt length.

    New rows and columns of the action dimension are zero. So the old dimensions of the velocity do not depend on what
    is in the new ones, and old inputs (new cameras masked, a longer prompt padded) give the old outputs; gradients
    reach the new rows and columns all the same.

    Raises:
        UserError: fewer action dimensions, which would throw trained rows away; or a head with other parameters of
            these sizes than π0's action expert has.
    """
    policy = opened.policy
    wanted = {
        "model.action_dim": overrides.action_dim,
        "model.action_horizon": overrides.horizon,
        "model.cameras": overrides.cameras,
        "model.prompt_length": overrides.prompt_length,
    }
    grown = replaced(policy, {name: value for name, value in wanted.items() if value is not None})
    if grown.model.action_dim < policy.model.action_dim:
        raise UserError(
            f"--action-dim {grown.model.action_dim} is less than the checkpoint's {policy.model.action_dim}; trained "
            "rows are not thrown away. A robot with fewer dimensions needs no change: its vectors are zero-padded."
        )
    if overrides.horizon is not None:
        grown = dataclasses.replace(grown, execute_steps=min(policy.execute_steps, overrides.horizon))
    before, after = (parameters(p.model, p.objective) for p in (policy, grown))
    for path, parameter in before.items():
        changed = [axis for axis, size in parameter.sizes.items() if after[path].sizes[axis] != size]
        if any(axis != "action" for axis in changed) or (changed and not has_velocity_expert(policy)):
            raise UserError(
                f"--action-dim and --horizon change models with π0's action expert; {opened.path} is of another kind: "
                f"{policy.model.head}, {policy.objective}."
            )
    tensors = {path: _padded(tensor, after[path].shape) for path, tensor in opened.tensors.items()}
    return opened._replace(policy=grown, tensors=tensors)


def add_action_expert(opened: OpenCheckpoint, variant: Literal["pi0", "pi05"], config: ModelConfig) -> OpenCheckpoint:
    """A backbone with a fresh action expert and projections, from the network's own initialisers, in float32.

    Of `config`, width and feed-forward of the expert, action dimension, horizon and prompt length are used; all else is
    the backbone's.
    """
    chosen = {name: getattr(config, name) for name in ("action", "action_dim", "action_horizon", "prompt_length")}
    model = dataclasses.replace(opened.policy.model, variant=variant, **chosen)
    missing = tuple(path for path in parameters(model) if path not in opened.tensors)
    fresh = {path: in_memory(np.asarray(x)) for path, x in _fresh(model, missing, jax.random.key(0)).items()}
    changes = {"model": model, "normalization": "zscore" if variant == "pi0" else "quantile"}
    changes |= {"objective": Gaussian(), "sampler": Euler()}
    tensors = {path: opened.tensors.get(path) or fresh[path] for path in parameters(model)}
    return opened._replace(policy=replaced(opened.policy, changes), tensors=tensors)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fresh(model: ModelConfig, paths: tuple[str, ...], key: jax.Array) -> dict[str, jax.Array]:
    boxes = initial_parameters(model, key)
    return nn.meta.unbox({path: boxes[path] for path in paths})


def _merged(name: str, w: LazyArray, a: LazyArray, b: LazyArray, scale: float) -> LazyArray:
    dtype = np.result_type(w.dtype, a.dtype, b.dtype)
    return entry_by_entry(w.shape, dtype, lambda i: lora.merge(name, w.read(i), a.read(i), b.read(i), scale))


def _padded(tensor: LazyArray, shape: tuple[int, ...]) -> LazyArray:
    """The tensor with zeros at the end of each axis that is longer in `shape`; not for tensors stacked by layers."""
    if shape == tensor.shape:
        return tensor
    widths = [(0, new - old) for new, old in zip(shape, tensor.shape, strict=True)]
    return computed(shape, tensor.dtype, lambda: np.pad(tensor.read(None), widths))
