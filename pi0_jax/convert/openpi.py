"""openpi's JAX checkpoints, and big_vision's PaliGemma, whose names openpi kept for the first expert."""

from __future__ import annotations

import re
from collections.abc import Iterable

from pi0_jax.config import ModelConfig
from pi0_jax.convert.leaves import EXPERTS
from pi0_jax.convert.rules import Rule

_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_LLM = "PaliGemma/llm"


def rules(variant: str) -> tuple[Rule, ...]:
    """Every leaf of openpi's trees, with or without adapters."""
    time = "action_time_mlp" if variant == "pi0" else "time_mlp"
    return (
        *_dense("image_encoder/patch_embedding", "PaliGemma/img/embedding", "y x b D", "D"),
        Rule("image_encoder/position_embedding", "PaliGemma/img/pos_embedding", "1 p D"),
        *_norm("image_encoder/layers/attn_norm", f"{_BLOCK}/LayerNorm_0", "L D"),
        *_norm("image_encoder/layers/mlp_norm", f"{_BLOCK}/LayerNorm_1", "L D"),
        *_norm("image_encoder/norm", "PaliGemma/img/Transformer/encoder_norm", "D"),
        *(
            rule
            for name in ("query", "key", "value")
            for rule in _dense(
                f"image_encoder/layers/{name}", f"{_BLOCK}/MultiHeadDotProductAttention_0/{name}", "L D N H", "L N H"
            )
        ),
        *_dense("image_encoder/layers/out", f"{_BLOCK}/MultiHeadDotProductAttention_0/out", "L N H D", "L D"),
        *_dense("image_encoder/layers/mlp_in", f"{_BLOCK}/MlpBlock_0/Dense_0", "L D F", "L F"),
        *_dense("image_encoder/layers/mlp_out", f"{_BLOCK}/MlpBlock_0/Dense_1", "L F D", "L D"),
        *_dense("image_projector", "PaliGemma/img/head", "D d", "d"),
        Rule("embedding", f"{_LLM}/embedder/input_embedding", "v d"),
        *_expert("language", ""),
        *_expert("action", "_1"),
        *_dense("action_in", "action_in_proj", "a e", "e"),
        *_dense("action_out", "action_out_proj", "e a", "a"),
        *_dense("state_in", "state_proj", "a e", "e"),
        *_dense("time_mlp_in", f"{time}_in", "t e", "e"),
        *_dense("time_mlp_out", f"{time}_out", "i e", "e"),
    )


def variant_of(names: Iterable[str]) -> ModelConfig:
    """What the names alone say: the variant, and which adapters there are (of rank 1 until the shapes are read)."""
    names = list(names)
    marks = {
        "pi05": sum(bool(re.search(r"_1/Dense_0/|^time_mlp", name)) for name in names),
        "pi0": sum(bool(re.search(r"norm_1/scale|^state_proj|^action_time_mlp", name)) for name in names),
    }
    variant = "pi05" if marks["pi05"] > marks["pi0"] else "pi0"
    model = ModelConfig(variant=variant if marks[variant] else "pi0_fast")
    return with_adapters(
        model,
        {
            expert: (
                any(f"einsum{s}/lora" in name for name in names),
                any(f"mlp{s}/" in n and "lora" in n for n in names),
            )
            for expert, s in (("language", ""), ("action", "_1"))
        },
    )


def with_adapters(model: ModelConfig, present: dict[str, tuple[bool, bool]]) -> ModelConfig:
    """The model with rank 1 where there are adapters of attention or of the MLP, and none elsewhere."""
    import dataclasses

    return dataclasses.replace(
        model,
        **{
            expert: dataclasses.replace(getattr(model, expert), lora_attn_rank=int(attn), lora_mlp_rank=int(mlp))
            for expert, (attn, mlp) in present.items()
        },
    )


def _dense(ours: str, theirs: str, kernel: str, bias: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}/kernel", kernel), Rule(f"{ours}/bias", f"{theirs}/bias", bias)]


def _norm(ours: str, theirs: str, axes: str) -> list[Rule]:
    return [Rule(f"{ours}/{leaf}", f"{theirs}/{leaf}", axes) for leaf in ("scale", "bias")]


def _expert(name: str, suffix: str) -> list[Rule]:
    ours, theirs = f"backbone/layers/{name}", f"{_LLM}/layers"
    d, f, r, R = EXPERTS[name]
    q, kv, o = (f"{theirs}/attn/{part}_einsum{suffix}" for part in ("q", "kv", "attn_vec"))
    gate_up, down = f"{theirs}/mlp{suffix}/gating_einsum", f"{theirs}/mlp{suffix}/linear"
    found = [
        Rule(f"{ours}/attn/q", f"{q}/w", f"l n {d} h"),
        Rule(f"{ours}/attn/q_lora_a", f"{q}/lora_a", f"l n {d} {r}"),
        Rule(f"{ours}/attn/q_lora_b", f"{q}/lora_b", f"l n {r} h"),
        Rule(f"{ours}/attn/kv", f"{kv}/w", f"l c k {d} h"),
        Rule(f"{ours}/attn/kv_lora_a", f"{kv}/lora_a", f"l c k {d} {r}"),
        Rule(f"{ours}/attn/kv_lora_b", f"{kv}/lora_b", f"l c k {r} h"),
        Rule(f"{ours}/attn/o", f"{o}/w", f"l n h {d}"),
        Rule(f"{ours}/attn/o_lora_a", f"{o}/lora_a", f"l n h {r}"),
        Rule(f"{ours}/attn/o_lora_b", f"{o}/lora_b", f"l n {r} {d}"),
        Rule(f"{ours}/mlp/gate_up", gate_up, f"l c {d} {f}"),
        Rule(f"{ours}/mlp/gate_up_lora_a", f"{gate_up}_lora_a", f"l c {d} {R}"),
        Rule(f"{ours}/mlp/gate_up_lora_b", f"{gate_up}_lora_b", f"l c {R} {f}"),
        Rule(f"{ours}/mlp/down", down, f"l {f} {d}"),
        Rule(f"{ours}/mlp/down_lora_a", f"{down}_lora_a", f"l {f} {R}"),
        Rule(f"{ours}/mlp/down_lora_b", f"{down}_lora_b", f"l {R} {d}"),
    ]
    norms = {
        f"{ours}/attn_norm": (f"{theirs}/pre_attention_norm{suffix}", "l "),
        f"{ours}/mlp_norm": (f"{theirs}/pre_ffw_norm{suffix}", "l "),
        f"backbone/{name}_norm": (f"{_LLM}/final_norm{suffix}", ""),
    }
    for mine, (other, stacked) in norms.items():
        found.append(Rule(f"{mine}/scale", f"{other}/scale", f"{stacked}{d}"))
        if name == "action":
            found += _dense(f"{mine}/modulation", f"{other}/Dense_0", f"{stacked}i m", f"{stacked}m")
    return found
