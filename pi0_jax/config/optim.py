"""Optimizer, learning rate, and what is trained."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule: linear warm-up, then cosine decay."""

    name: str = "adamw"
    """One of `training.optimizer.OPTIMIZERS`. adamw. adamw_8bit: both moments in blocks of 8-bit codes (Dettmers et al.
    2022). adafactor: the second moment as rows and columns (Shazeer & Stern 2018), without scaling by the parameters'
    size. muon: orthogonalised momentum for hidden matrices (Jordan et al. 2024), Adam for the others."""
    peak_lr: float = 2.5e-5
    end_lr: float = 2.5e-6
    warmup_steps: int = 1000
    decay_steps: int | None = None
    """Step at which the rate reaches `end_lr`, counted from step 0; None means the last step of the run."""
    b1: float = 0.9
    """Decay of the first moment. Under adafactor 0 means that there is none, which saves its memory."""
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment (muon: of its momentum and of Adam's first moment); adamw_8bit has its own form."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float | None = 0.99
    """Exponential moving average of the weights, which is what inference uses; None turns it off."""
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is rounded at random, up or down in proportion, so that steps too small for it still add up."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Which parameters are trained.

    The others are frozen: they are stored in bfloat16, have no gradient, no optimizer state and no moving average, and
    stay what they are, bit for bit. Patterns are of parameter paths, and * stands for anything:
    "backbone/layers/language/*", "*/attn/*", "*norm*".
    """

    recipe: Literal["full", "expert", "vision_frozen", "lora"] = "full"
    """full: all. expert: the action expert, or whichever head, and the projections around it; image encoder and
    language expert are frozen. vision_frozen: all but the image encoder. lora: adapters of both experts, and what is
    not of the experts, as in openpi; their weights, norms and the embedding are frozen. Adapters are trained under any
    recipe."""
    lora_ranks: tuple[int, int] = (16, 32)
    """Under the recipe lora, ranks of the adapters that the language and the action expert get if the model has none,
    for attention and feed-forward alike; 0: that expert has none, and is trained. For adapters on chosen parts let the
    model name them (`--policy.model.action.lora-attn-rank 8`): then it gets no others, and only the weights of experts
    with adapters are frozen."""
    frozen: tuple[str, ...] = ()
    """Patterns of what is frozen besides."""
    trained: tuple[str, ...] = ()
    """Patterns of what is trained whatever the two above say."""
