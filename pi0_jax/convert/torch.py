"""The PyTorch dialects, openpi's and LeRobot's: one tensor a layer, kernels transposed, heads flattened. No torch here.

LeRobot puts `model.` before each name. The embedding is stored as `embed_tokens`, as the tied `lm_head`, or as both.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from pi0_jax.config import ModelConfig
from pi0_jax.convert.leaves import EXPERTS
from pi0_jax.convert.rules import Rule

_PALIGEMMA = "paligemma_with_expert.paligemma"
_VISION = f"{_PALIGEMMA}.model.vision_tower.vision_model"
_LANGUAGE = f"{_PALIGEMMA}.model.language_model"
_EXPERT = "paligemma_with_expert.gemma_expert"

EMBEDDING = f"{_LANGUAGE}.embed_tokens.weight"
LM_HEAD = f"{_PALIGEMMA}.lm_head.weight"
EXPERT_HEAD = f"{_EXPERT}.lm_head.weight"
"""The action expert's output layer, which exists in the class it is built from and is never used."""

SPARE = {EMBEDDING: "v d", LM_HEAD: "v d", EXPERT_HEAD: "v e", f"{_EXPERT}.model.embed_tokens.weight": "v e"}
"""Names that may be left over, and their axes: whichever of the tied pair is not read, and the unused layers."""


def rules(variant: str) -> tuple[Rule, ...]:
    """Every tensor of a π0, π0.5 or π0-FAST in PyTorch, without LeRobot's prefix."""
    time = "action_time_mlp" if variant == "pi0" else "time_mlp"
    block = f"{_VISION}.encoder.layers.{{L}}"
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
    return (
        *_linear("image_encoder/patch_embedding", f"{_VISION}.embeddings.patch_embedding", "D b y x", "D"),
        Rule("image_encoder/position_embedding", f"{_VISION}.embeddings.position_embedding.weight", "p D"),
        *_norm("image_encoder/layers/attn_norm", f"{block}.layer_norm1", "L D"),
        *_norm("image_encoder/layers/mlp_norm", f"{block}.layer_norm2", "L D"),
        *_norm("image_encoder/norm", f"{_VISION}.post_layernorm", "D"),
        *(
            rule
            for ours, theirs in attention.items()
            for rule in _linear(f"image_encoder/layers/{ours}", f"{block}.self_attn.{theirs}", "L (N H) D", "L (N H)")
        ),
        *_linear("image_encoder/layers/out", f"{block}.self_attn.out_proj", "L D (N H)", "L D"),
        *_linear("image_encoder/layers/mlp_in", f"{block}.mlp.fc1", "L F D", "L F"),
        *_linear("image_encoder/layers/mlp_out", f"{block}.mlp.fc2", "L D F", "L D"),
        *_linear("image_projector", f"{_PALIGEMMA}.model.multi_modal_projector.linear", "d D", "d"),
        Rule("embedding", EMBEDDING, "v d"),
        Rule("embedding", LM_HEAD, "v d"),
        *_expert("language", _LANGUAGE),
        *_expert("action", f"{_EXPERT}.model"),
        *_linear("action_in", "action_in_proj", "e a", "e"),
        *_linear("action_out", "action_out_proj", "a e", "a"),
        *_linear("state_in", "state_proj", "e a", "e"),
        *_linear("time_mlp_in", f"{time}_in", "e t", "e"),
        *_linear("time_mlp_out", f"{time}_out", "e i", "e"),
    )


def variant_of(names: Iterable[str]) -> ModelConfig:
    """What the names (without LeRobot's prefix) alone say: the variant."""
    names = list(names)
    marks = {
        "pi05": sum(bool(re.search(r"norm\.dense\.|^time_mlp", name)) for name in names),
        "pi0": sum(
            bool(re.search(r"gemma_expert\..*norm\.weight|^state_proj|^action_time_mlp", name)) for name in names
        ),
    }
    variant = "pi05" if marks["pi05"] > marks["pi0"] else "pi0"
    return ModelConfig(variant=variant if marks[variant] else "pi0_fast")


def _linear(ours: str, theirs: str, weight: str, bias: str) -> list[Rule]:
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", weight), Rule(f"{ours}/bias", f"{theirs}.bias", bias)]


def _norm(ours: str, theirs: str, axes: str) -> list[Rule]:
    return [Rule(f"{ours}/scale", f"{theirs}.weight", axes), Rule(f"{ours}/bias", f"{theirs}.bias", axes)]


def _expert(name: str, theirs: str) -> list[Rule]:
    ours, layer = f"backbone/layers/{name}", f"{theirs}.layers.{{l}}"
    d, f, *_ = EXPERTS[name]
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    found = [
        Rule(f"{ours}/attn/q", f"{attention}.q_proj.weight", f"l (n h) {d}"),
        Rule(f"{ours}/attn/kv", (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"), f"l c (k h) {d}"),
        Rule(f"{ours}/attn/o", f"{attention}.o_proj.weight", f"l {d} (n h)"),
        Rule(f"{ours}/mlp/gate_up", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), f"l c {f} {d}"),
        Rule(f"{ours}/mlp/down", f"{mlp}.down_proj.weight", f"l {d} {f}"),
    ]
    norms = {
        f"{ours}/attn_norm": (f"{layer}.input_layernorm", "l "),
        f"{ours}/mlp_norm": (f"{layer}.post_attention_layernorm", "l "),
        f"backbone/{name}_norm": (f"{theirs}.norm", ""),
    }
    for mine, (other, stacked) in norms.items():
        found.append(Rule(f"{mine}/scale", f"{other}.weight", f"{stacked}{d}"))
        if name == "action":
            found += _linear(f"{mine}/modulation", f"{other}.dense", f"{stacked}m i", f"{stacked}m")
    return found
