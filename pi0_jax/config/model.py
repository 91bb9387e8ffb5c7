"""Sizes and layout of the networks."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

Variant = Literal["pi0", "pi05", "pi0_fast"]
Dtype = Literal["bfloat16", "float32"]
Remat = Literal["full", "gate_up", "matmuls", "none"]
Kernel = Literal["xla", "cudnn"]
Pooling = Literal["last", "mean", "attention"]


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP image encoder; the defaults are So400m/14 at 224 px (Zhai et al. 2023, arXiv 2303.15343)."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    image_size: int = 224
    """Side of the square input image, pixels."""
    patch_size: int = 14
    """Side of the image patch that becomes one token, pixels (with a stem: of the whole stack of convolutions)."""
    stem_width: int = 0
    """Channels of a convolution before the patch embedding (Xiao et al. 2021, arXiv 2106.14881); 0: no stem, as in
    the released weights. Small encoders trained from scratch learn faster with one."""
    stem_stride: int = 4
    """Kernel size and stride of that convolution, pixels; divides `patch_size`."""
    position: Literal["learned", "sincos2d"] = "learned"
    """Position embedding: learned (released weights) or fixed two-dimensional sine and cosine."""


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """One set of Gemma weights. Experts differ in width; depth and attention heads are shared (`ModelConfig`)."""

    width: int
    mlp_dim: int
    lora_attn_rank: int = 0
    """Rank of the low-rank adapters of the attention weights, one pair per head (`model.lora`); 0: no adapters."""
    lora_mlp_rank: int = 0
    """Rank of the adapters of the feed-forward weights; 0: no adapters."""
    lora_scale: float = 1.0
    """Factor of attention's adapters, alpha / rank. Feed-forward adapters have none, as in openpi."""


@dataclasses.dataclass(frozen=True)
class Expert:
    """Head of π0 and π0.5: action tokens of the action expert, which attend to the whole observation in every layer."""

    time_per_action: ClassVar[bool] = True
    """Whether each action of a chunk may have its own flow time."""


@dataclasses.dataclass(frozen=True)
class Compact:
    """Small head: an MLP from the pooled observation, the noisy chunk and the flow time."""

    time_per_action: ClassVar[bool] = False
    width: int = 1024
    depth: int = 3
    """Hidden layers."""
    time_width: int = 256
    """Width of the time embedding, sine and cosine, before its linear layer and SiLU."""
    pooling: Pooling = "last"
    """How the backbone's tokens become one vector: the last valid one, their mean, or a learned query's attention."""
    conditioning: Literal["concat", "adaln"] = "concat"
    """concat: observation and time are concatenated to the chunk. adaln: they scale, shift and gate every layer."""


Head = Expert | Compact


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The network: image encoder, language expert, and the head that predicts action chunks."""

    variant: Variant = "pi0"
    """pi0: a state token, and the time mixed into the action tokens by an MLP (arXiv 2410.24164).
    pi05: the state is part of the prompt, the time modulates the action expert's norms (arXiv 2504.16054).
    pi0_fast: image encoder and language expert alone, which writes action tokens (arXiv 2501.09747)."""
    head: Head = Expert()
    vision: VisionConfig = VisionConfig()
    language: ExpertConfig = ExpertConfig(width=2048, mlp_dim=16_384)
    """Gemma 2B, which reads images and text."""
    action: ExpertConfig = ExpertConfig(width=1024, mlp_dim=4096)
    """The 300M action expert."""
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257_152
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    """Camera slots in token order. A camera that is not listed is never computed."""
    action_dim: int = 32
    """Width of state and action vectors inside the model; a robot's own are zero-padded to it."""
    action_horizon: int = 50
    """Actions per chunk."""
    prompt_length: int = 48
    """Tokens that prompts are padded or cut to (the π0.5 release: 200)."""
    dtype: Dtype = "bfloat16"
    """Activations. Parameters, statistics of norms, softmax, RoPE and time embedding are float32 regardless."""
    remat: Remat = "full"
    """Rematerialisation (activation checkpointing) in the backward pass. full: each layer is computed again from its
    input; least memory, 1.23 times the compute. gate_up: the wide half of the feed-forward, and norms. matmuls: norms
    and other cheap operations. none: nothing is computed again."""
    attention: Kernel = "xla"
    """Kernel of attention among image patches and among the prefix's tokens, in training and inference. cudnn: fused,
    for NVIDIA GPUs (heads of 256: Hopper and later) and bfloat16; elsewhere it is xla. The numbers are the same within
    bfloat16's rounding."""


PI0 = ModelConfig()
PI05 = ModelConfig(variant="pi05", prompt_length=200)
