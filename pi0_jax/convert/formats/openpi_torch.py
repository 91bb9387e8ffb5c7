"""openpi's PyTorch checkpoints: one tensor per layer, kernels transposed, heads flattened. No torch here.

LeRobot has the same tensors (`lerobot.py`). The embedding is stored as `embed_tokens`, as the tied `lm_head`, or both.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from pi0_jax.config import ModelConfig
from pi0_jax.convert import assemble
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides, openpi
from pi0_jax.convert.lazy import LazyArrays, all_finite, computed, open_safetensors, write_safetensors
from pi0_jax.convert.rules import Rule
from pi0_jax.convert.verify import openpi_torch as verify
from pi0_jax.errors import UserError

WEIGHTS = "model.safetensors"
_PALIGEMMA = "paligemma_with_expert.paligemma"
_VISION = f"{_PALIGEMMA}.model.vision_tower.vision_model"
LANGUAGE = f"{_PALIGEMMA}.model.language_model"
EXPERT = "paligemma_with_expert.gemma_expert"
_EMBEDDING = f"{LANGUAGE}.embed_tokens.weight"
_LM_HEAD = f"{_PALIGEMMA}.lm_head.weight"
_EXPERT_HEAD = f"{EXPERT}.lm_head.weight"
"""The action expert's output layer, which exists in the class it is built from and is never used."""

_HEADS = {"gemma_2b": (8, 1), "gemma_300m": (8, 1), "dummy": (8, 1)}
"""Query and key/value heads of openpi's and LeRobot's named Gemma variants."""
VARIANTS = {"paligemma_variant": "gemma_2b", "action_expert_variant": "gemma_300m"}
"""How both frameworks' config.json name the experts."""


def rules(variant: str) -> tuple[Rule, ...]:
    """Every tensor of a π0, π0.5 or π0-FAST in PyTorch, without LeRobot's prefix."""
    time = "action_time_mlp" if variant == "pi0" else "time_mlp"
    block = f"{_VISION}.encoder.layers.{{}}"
    linear = (
        ("image_encoder/patch_embedding", f"{_VISION}.embeddings.patch_embedding", "embed axis2 axis0 axis1"),
        ("image_encoder/layers/query", f"{block}.self_attn.q_proj", "(heads head_dim) embed"),
        ("image_encoder/layers/key", f"{block}.self_attn.k_proj", "(heads head_dim) embed"),
        ("image_encoder/layers/value", f"{block}.self_attn.v_proj", "(heads head_dim) embed"),
        ("image_encoder/layers/out", f"{block}.self_attn.out_proj", "embed (heads head_dim)"),
        ("image_encoder/layers/mlp_in", f"{block}.mlp.fc1", "mlp embed"),
        ("image_encoder/layers/mlp_out", f"{block}.mlp.fc2", "embed mlp"),
        ("image_projector", f"{_PALIGEMMA}.model.multi_modal_projector.linear", "embed_out embed"),
        ("action_in", "action_in_proj", "embed action"),
        ("action_out", "action_out_proj", "action embed"),
        ("state_in", "state_proj", "embed action"),
        ("time_mlp_in", f"{time}_in", "embed_out embed"),
        ("time_mlp_out", f"{time}_out", "embed_out embed"),
    )
    norms = {
        "image_encoder/layers/attn_norm": f"{block}.layer_norm1",
        "image_encoder/layers/mlp_norm": f"{block}.layer_norm2",
        "image_encoder/norm": f"{_VISION}.post_layernorm",
    }
    return (
        Rule(
            "image_encoder/position_embedding", f"{_VISION}.embeddings.position_embedding.weight", "(axis0 patch) embed"
        ),
        Rule("embedding", _EMBEDDING),
        Rule("embedding", _LM_HEAD),
        *(rule for names in linear for rule in _linear(*names)),
        *(Rule(f"{ours}/scale", f"{theirs}.weight") for ours, theirs in norms.items()),
        *(Rule(f"{ours}/bias", f"{theirs}.bias") for ours, theirs in norms.items()),
        *_expert("language", LANGUAGE),
        *_expert("action", f"{EXPERT}.model"),
    )


def _linear(ours: str, theirs: str, weight: str) -> list[Rule]:
    """A linear layer, whose bias has the first axis of its weight."""
    bias = weight[: weight.index(")") + 1] if weight.startswith("(") else weight.split()[0]
    return [Rule(f"{ours}/kernel", f"{theirs}.weight", weight), Rule(f"{ours}/bias", f"{theirs}.bias", bias)]


def _expert(name: str, theirs: str) -> list[Rule]:
    ours, layer = f"backbone/layers/{name}", f"{theirs}.layers.{{}}"
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    norms = {
        f"{ours}/attn_norm": f"{layer}.input_layernorm",
        f"{ours}/mlp_norm": f"{layer}.post_attention_layernorm",
        f"backbone/{name}_norm": f"{theirs}.norm",
    }
    modulated = {} if name == "language" else norms
    return [
        Rule(f"{ours}/attn/q", f"{attention}.q_proj.weight", "(heads head_dim) embed"),
        Rule(
            f"{ours}/attn/kv", (f"{attention}.k_proj.weight", f"{attention}.v_proj.weight"), "(kv_heads head_dim) embed"
        ),
        Rule(f"{ours}/attn/o", f"{attention}.o_proj.weight", "embed (heads head_dim)"),
        Rule(f"{ours}/mlp/gate_up", (f"{mlp}.gate_proj.weight", f"{mlp}.up_proj.weight"), "mlp embed"),
        Rule(f"{ours}/mlp/down", f"{mlp}.down_proj.weight", "embed mlp"),
        *(Rule(f"{mine}/scale", f"{other}.weight") for mine, other in norms.items()),
        *(
            rule
            for mine, other in modulated.items()
            for rule in _linear(f"{mine}/modulation", f"{other}.dense", "modulation embed")
        ),
    ]


def guess_model(tensors: LazyArrays) -> ModelConfig:
    """The variant, by the names (without LeRobot's prefix) alone."""
    pi0 = r"gemma_expert\..*norm\.weight|^state_proj|^action_time_mlp"
    return assemble.variant_of(list(tensors), pi0=pi0, pi05=r"norm\.dense\.|^time_mlp")


def claim_tensors(
    folder: Path, overrides: Overrides, tensors: LazyArrays, guess: ModelConfig, config: Mapping[str, Any]
) -> assemble.Claimed:
    """The model that the tensors make, with numbers of heads, which their flat projections do not show.

    `guess` is as of `infer_model`, `config` the folder's config.json.
    """
    recorded = assemble.recorded_policy(folder, guess.variant)
    model = recorded.model if recorded else None
    named = _HEADS.get(str(config.get("paligemma_variant", "")).removesuffix("_lora"), (None, None))
    released = any(name.endswith("post_layernorm.bias") and t.shape == (1152,) for name, t in tensors.items())
    heads = {
        "num_heads": overrides.num_heads or (model.num_heads if model else named[0]),
        "num_kv_heads": overrides.num_kv_heads or (model.num_kv_heads if model else named[1]),
        "vision.num_heads": overrides.vision_heads or (model.vision.num_heads if model else 16 if released else None),
    }
    known = {field: value for field, value in heads.items() if value is not None}
    return assemble.claim(rules(guess.variant), tensors, guess, known, _spare)


def _spare(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Tensors that may be left over: whichever of the tied pair is not read, and the action expert's unused layers."""
    language, action = ((model.vocab_size, expert.width) for expert in (model.language, model.action))
    expert = {_EXPERT_HEAD: action, f"{EXPERT}.model.embed_tokens.weight": action}
    return {_EMBEDDING: language, _LM_HEAD: language} | expert


def torch_tensors(opened: OpenCheckpoint, format: str) -> LazyArrays:
    """The tensors of a π0 in PyTorch, the unused layer too, on which LeRobot's strict loading insists."""
    model = opened.policy.model
    found = assemble.foreign_tensors(opened, format, rules(model.variant))
    if model.variant != "pi0_fast":
        shape, dtype = (model.vocab_size, model.action.width), opened.tensors["embedding"].dtype
        found[_EXPERT_HEAD] = computed(shape, dtype, lambda: np.zeros(shape, dtype))  # no memory until it is looked at
    return found


def dtype_name(opened: OpenCheckpoint) -> Literal["bfloat16", "float32"]:
    """The weights' dtype, by the embedding, as both frameworks' config.json name it."""
    return "bfloat16" if opened.tensors["embedding"].dtype == ml_dtypes.bfloat16 else "float32"


def detect(path: Path, lerobot: bool = False) -> Path | None:
    """The folder in which a path has `model.safetensors`, with a config.json that names a LeRobot policy or without."""
    folder = path.parent if path.suffix == ".safetensors" and path.is_file() else path
    config = folder / "config.json"
    if not (folder / WEIGHTS).is_file() or lerobot != (config.is_file() and "type" in read_json(config)):
        return None
    return folder


def _open(folder: Path, overrides: Overrides) -> OpenCheckpoint:
    tensors = all_finite(open_safetensors(folder / WEIGHTS))
    if any(name.startswith("model.") for name in tensors):
        raise UserError(
            f"the tensors of {folder} have LeRobot's names, and its config.json, which says horizon, cameras and "
            "normalisation, is missing or does not name the policy's type; copy it too."
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    horizon = config.get("action_horizon")
    stated = {} if horizon is None else {"model.action_horizon": horizon}
    policy = assemble.make_policy(folder, overrides, guess_model(tensors), stated)
    claimed = claim_tensors(folder, overrides, tensors, policy.model, config)
    stats, name = openpi.read_stats(folder, overrides.asset_id)
    return assemble.finished("openpi-torch", folder, policy, claimed, name, norm_stats=stats)


def _write(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    tensors, model = torch_tensors(opened, "openpi-torch"), opened.policy.model
    del tensors[_EMBEDDING]
    write_safetensors(folder / WEIGHTS, tensors, {"format": "pt"})
    sizes = {"action_dim": model.action_dim, "action_horizon": model.action_horizon}
    write_json(folder / "config.json", sizes | VARIANTS | {"precision": dtype_name(opened)})
    openpi.write_beside(opened, folder, asset_id)


FORMAT = Format(
    "openpi-torch",
    WEIGHTS,
    detect,
    _open,
    _write,
    lambda opened: assemble.lost_settings(opened, "openpi-torch"),
    runner=verify.RUNNER,
)
