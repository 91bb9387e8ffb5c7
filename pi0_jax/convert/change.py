"""Changes to an opened checkpoint: dtype, merged adapters, a wider or otherwise larger model, a fresh action expert.

Each takes `Weights` and returns `Weights` whose tensors compute when they are read.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import ml_dtypes
import numpy as np

from pi0_jax.config import ModelConfig
from pi0_jax.convert.formats import Choices, Weights
from pi0_jax.convert.lazy import Index, Tensor, Tensors, entry_by_entry, in_memory
from pi0_jax.convert.leaves import is_velocity_expert, leaves, shape_of, sizes
from pi0_jax.model import lora

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def cast(weights: Weights, dtype: Literal["float32", "bfloat16"]) -> tuple[Weights, bool]:
    """All tensors in one dtype, rounded to nearest, and whether that loses precision."""
    target = DTYPES[dtype]
    mantissa = {name: ml_dtypes.finfo(t.dtype).nmant for name, t in weights.tensors.items()}
    loses = any(bits > ml_dtypes.finfo(target).nmant for bits in mantissa.values())

    def convert(tensor: Tensor) -> Tensor:
        return tensor._replace(dtype=target, read=lambda i: tensor.read(i).astype(target))

    return weights._replace(tensors={name: convert(tensor) for name, tensor in weights.tensors.items()}), loses


def merge_lora(weights: Weights) -> Weights:
    """The model without adapters that computes what the model with them does (`model.lora`)."""
    model = weights.policy.model
    tensors = {path: tensor for path, tensor in weights.tensors.items() if "_lora_" not in path}
    for expert in ("language", "action"):
        for name in lora.EINSUMS:
            path = f"backbone/layers/{expert}/{name}"
            if f"{path}_lora_a" in weights.tensors:
                w, a, b = (weights.tensors[path + end] for end in ("", "_lora_a", "_lora_b"))
                tensors[path] = _merged(name, w, a, b, getattr(model, expert).lora_scale)
    plain = {
        expert: dataclasses.replace(getattr(model, expert), lora_attn_rank=0, lora_mlp_rank=0, lora_scale=1.0)
        for expert in ("language", "action")
    }
    return _with_model(weights, dataclasses.replace(model, **plain), tensors)


def grow(weights: Weights, choices: Choices) -> Weights:
    """A model with more action dimensions, or another horizon, cameras or prompt length.

    New rows and columns of the action dimension are zero. So the old dimensions of the velocity do not depend on what
    is in the new ones, and inputs of before (with anything in the new dimensions, new cameras masked, a longer prompt
    padded) give the outputs of before; gradients reach the new rows and columns all the same. Horizon, cameras and
    prompt length have no parameters.

    Raises:
        ValueError: fewer action dimensions, which would throw trained rows away; or another action dimension or
            horizon for a head that has parameters of those sizes.
    """
    model = weights.policy.model
    wanted = {
        "action_dim": choices.action_dim,
        "action_horizon": choices.horizon,
        "cameras": choices.cameras,
        "prompt_length": choices.prompt_length,
    }
    model = dataclasses.replace(model, **{name: value for name, value in wanted.items() if value is not None})
    if model.action_dim < weights.policy.model.action_dim:
        raise ValueError(
            f"--action-dim {model.action_dim} is less than the checkpoint's {weights.policy.model.action_dim}; trained "
            "rows are not thrown away. A robot with fewer dimensions needs no change: its vectors are zero-padded."
        )
    if not is_velocity_expert(model):
        old = weights.policy.model
        if (model.action_dim, model.action_horizon) != (old.action_dim, old.action_horizon):
            raise ValueError(
                f"--action-dim and --horizon change models with π0's action expert; {weights.path} has the head "
                f"{model.head!r} and predicts {model.prediction}."
            )
        return _with_model(weights, model, weights.tensors)
    axes, letters = leaves(model), sizes(model)
    tensors = {path: _padded(tensor, shape_of(axes[path], letters)) for path, tensor in weights.tensors.items()}
    policy = weights.policy
    if choices.horizon is not None:
        policy = dataclasses.replace(policy, execute_steps=min(policy.execute_steps, choices.horizon))
    return _with_model(weights._replace(policy=policy), model, tensors)


def add_action_expert(weights: Weights, variant: Literal["pi0", "pi05"], config: ModelConfig, seed: int = 0) -> Weights:
    """A backbone with a fresh action expert and projections, from the network's own initialisers, in float32.

    Args:
        weights: image encoder and language expert.
        variant: of the result.
        config: the expert's width and feed-forward, action dimension, horizon and prompt length; the rest is the
            backbone's.
        seed: of the random weights.
    """
    import flax.linen as nn
    import jax
    from flax.traverse_util import flatten_dict

    from pi0_jax.model.velocity import VelocityNetwork
    from pi0_jax.pi0 import init_params

    taken = ("action", "action_dim", "action_horizon", "prompt_length")
    chosen = {name: getattr(config, name) for name in taken}
    model = dataclasses.replace(weights.policy.model, variant=variant, **chosen)
    missing = [path for path in leaves(model) if path not in weights.tensors]

    @jax.jit
    def fresh(key):
        flat = flatten_dict(nn.meta.unbox(init_params(VelocityNetwork(model), key)), sep="/")
        return {path: flat[path] for path in missing}

    arrays = {path: in_memory(np.asarray(leaf)) for path, leaf in fresh(jax.random.key(seed)).items()}
    policy = dataclasses.replace(weights.policy, normalization="zscore" if variant == "pi0" else "quantile")
    tensors = {path: weights.tensors.get(path) or arrays[path] for path in leaves(model)}
    return _with_model(weights._replace(policy=policy), model, tensors)


def _with_model(weights: Weights, model: ModelConfig, tensors: Tensors) -> Weights:
    return weights._replace(policy=dataclasses.replace(weights.policy, model=model), tensors=tensors)


def _merged(name: str, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    dtype = np.result_type(w.dtype, a.dtype, b.dtype)
    return entry_by_entry(w.shape, dtype, lambda i: lora.merge(name, w.read(i), a.read(i), b.read(i), scale))


def _padded(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The tensor with zeros at the end of each axis that is longer in `shape`; not for tensors stacked by layers."""
    if shape == tensor.shape:
        return tensor
    widths = [(0, new - old) for new, old in zip(shape, tensor.shape, strict=True)]

    def read(i: Index) -> np.ndarray:
        array = np.pad(tensor.read(None), widths)
        return array if i is None else array[i]

    return Tensor(shape, tensor.dtype, read, stacked=False)
