"""Learning-rate schedule and optimizer.

Muon takes the hidden matrices and Adam the rest. Which leaf is which follows from its logical axis names alone, where
the model lists input axes before output axes:

    layers, stack                                    each index is a matrix of its own
    embed, embed_out, heads, kv_heads, head_dim, mlp  sides of a hidden matrix
    any other name, or none                          not hidden: vocabulary, patches, actions, modulation of norms

A hidden matrix has `embed` on one side; several axes on the other side (heads x head_dim) count as one.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax.contrib import MuonDimensionNumbers

from pi0_jax.config import OptimConfig
from pi0_jax.errors import UserError, did_you_mean
from pi0_jax.training.low_precision import scale_by_adam_8bit

_BATCH = {"layers", "stack"}
_HIDDEN = {"embed", "embed_out", "heads", "kv_heads", "head_dim", "mlp"}


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from peak / (warm-up + 1) to the peak, then a cosine to the end rate.

    The decay is counted from step 0 and includes the warm-up, as in openpi (and optax).

    The decay ends with the run, after `num_steps`, unless the config says otherwise.

    Raises:
        UserError: the warm-up leaves no step to decay in.
    """
    decay_steps = num_steps if config.decay_steps is None else config.decay_steps
    if config.warmup_steps >= decay_steps:
        raise UserError(
            f"optim.warmup_steps is {config.warmup_steps}, which leaves nothing of the {decay_steps} steps of the "
            f"schedule; lower it (--optim.warmup-steps {decay_steps // 10}) or raise --num-steps."
        )
    return optax.warmup_cosine_decay_schedule(
        config.peak_lr / (config.warmup_steps + 1), config.peak_lr, config.warmup_steps, decay_steps, config.end_lr
    )


def make_optimizer(config: OptimConfig, schedule: optax.Schedule, boxed) -> optax.GradientTransformation:
    """Clipping by global norm, then AdamW, its 8-bit form, Adafactor, or Muon with Adam.

    Muon (Jordan et al. 2024) has its updates scaled to a root mean square of 0.2 (Liu et al. 2025, arXiv 2502.16982),
    Adam's usual one, so that one learning rate serves both. Its momentum is 0.95; Adam has b1 and b2. Adafactor steps
    by the learning rate, too, and not by a share of the parameters' size; its second moment decays as 1 - step^-0.8.

    Args:
        config, schedule: optimizer and its numbers; learning rate by step.
        boxed: parameters with logical axis names, arrays or shapes.

    Raises:
        UserError: there is no such optimizer.
    """
    if config.name not in OPTIMIZERS:
        raise UserError(
            f"optim.name is {config.name!r}; choose {', '.join(OPTIMIZERS)}.{did_you_mean(config.name, OPTIMIZERS)}"
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), OPTIMIZERS[config.name](config, schedule, boxed))


def _adamw(c: OptimConfig, schedule: optax.Schedule, boxed) -> optax.GradientTransformation:
    moment = jnp.dtype(c.moment_dtype)
    return optax.adamw(schedule, b1=c.b1, b2=c.b2, eps=c.eps, mu_dtype=moment, weight_decay=c.weight_decay)


def _adamw_8bit(c: OptimConfig, schedule: optax.Schedule, boxed) -> optax.GradientTransformation:
    return optax.chain(
        scale_by_adam_8bit(c.b1, c.b2, c.eps),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _adafactor(c: OptimConfig, schedule: optax.Schedule, boxed) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.ema(c.b1, accumulator_dtype=jnp.dtype(c.moment_dtype)) if c.b1 else optax.identity(),
        optax.add_decayed_weights(c.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )


def _muon(c: OptimConfig, schedule: optax.Schedule, boxed) -> optax.GradientTransformation:
    return optax.contrib.muon(
        schedule,
        eps=c.eps,
        weight_decay=c.weight_decay,
        mu_dtype=jnp.dtype(c.moment_dtype),
        adam_b1=c.b1,
        adam_b2=c.b2,
        adam_weight_decay=c.weight_decay,
        muon_weight_dimension_numbers=muon_dimensions(boxed),
        consistent_rms=0.2,
    )


OPTIMIZERS = {"adamw": _adamw, "adamw_8bit": _adamw_8bit, "adafactor": _adafactor, "muon": _muon}
"""Name to a function of configuration, schedule and boxed parameters; a new optimizer is a row."""


def muon_dimensions(boxed):
    """For each leaf with logical axis names, a hidden matrix's input and output axes; None where Adam takes it."""
    return jax.tree.map(lambda x: _matrix(x.names), boxed, is_leaf=_is_box)


def _matrix(names: tuple[str | None, ...]) -> MuonDimensionNumbers | None:
    axes = [i for i, name in enumerate(names) if name not in _BATCH]
    if len(axes) < 2 or not all(names[i] in _HIDDEN for i in axes):
        return None
    if names[axes[0]] == "embed":
        return MuonDimensionNumbers(axes[:1], axes[1:])
    if names[axes[-1]] == "embed":
        return MuonDimensionNumbers(axes[:-1], axes[-1:])
    return None


def describe(boxed) -> str:
    """A table with one line per leaf: optimizer, path, axes and sizes."""
    lines = []
    for path, leaf in jax.tree.leaves_with_path(boxed, is_leaf=_is_box):
        axes = " x ".join(f"{name or '-'} {size}" for name, size in zip(leaf.names, leaf.value.shape, strict=True))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        lines.append(f"{'muon' if _matrix(leaf.names) else 'adam'}  {name:60} {axes}")
    return "\n".join(lines)


def _is_box(x) -> bool:
    return isinstance(x, nn.LogicallyPartitioned)
