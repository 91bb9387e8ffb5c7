"""openpi's JAX checkpoints, whose first expert has PaliGemma's names as big_vision gave them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pi0_jax import checkpoint
from pi0_jax.config import Autoregressive, ModelConfig
from pi0_jax.convert import assemble
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides
from pi0_jax.convert.lazy import LazyArrays, all_finite
from pi0_jax.convert.orbax_format import open_orbax, write_orbax
from pi0_jax.convert.parameters import replaced
from pi0_jax.convert.rules import Rule
from pi0_jax.errors import UserError

_BLOCK = "PaliGemma/img/Transformer/encoderblock"
_ATTENTION = f"{_BLOCK}/MultiHeadDotProductAttention_0"
_LLM = "PaliGemma/llm"


def rules(variant: str) -> tuple[Rule, ...]:
    """Every parameter of openpi's trees, with or without adapters."""
    time = "action_time_mlp" if variant == "pi0" else "time_mlp"
    dense = {
        "image_encoder/patch_embedding": "PaliGemma/img/embedding",
        **{f"image_encoder/layers/{name}": f"{_ATTENTION}/{name}" for name in ("query", "key", "value", "out")},
        "image_encoder/layers/mlp_in": f"{_BLOCK}/MlpBlock_0/Dense_0",
        "image_encoder/layers/mlp_out": f"{_BLOCK}/MlpBlock_0/Dense_1",
        "image_projector": "PaliGemma/img/head",
        "action_in": "action_in_proj",
        "action_out": "action_out_proj",
        "state_in": "state_proj",
        "time_mlp_in": f"{time}_in",
        "time_mlp_out": f"{time}_out",
    }
    norms = {
        "image_encoder/layers/attn_norm": f"{_BLOCK}/LayerNorm_0",
        "image_encoder/layers/mlp_norm": f"{_BLOCK}/LayerNorm_1",
        "image_encoder/norm": "PaliGemma/img/Transformer/encoder_norm",
    }
    return (
        Rule("image_encoder/position_embedding", "PaliGemma/img/pos_embedding"),
        Rule("embedding", f"{_LLM}/embedder/input_embedding"),
        *(Rule(f"{ours}/{x}", f"{theirs}/{x}") for ours, theirs in dense.items() for x in ("kernel", "bias")),
        *(Rule(f"{ours}/{x}", f"{theirs}/{x}") for ours, theirs in norms.items() for x in ("scale", "bias")),
        *_expert("language", ""),
        *_expert("action", "_1"),
    )


def _expert(name: str, suffix: str) -> list[Rule]:
    ours, theirs = f"backbone/layers/{name}", f"{_LLM}/layers"
    q, kv, o = (f"{theirs}/attn/{name}_einsum{suffix}" for name in ("q", "kv", "attn_vec"))
    gate_up, down = f"{theirs}/mlp{suffix}/gating_einsum", f"{theirs}/mlp{suffix}/linear"
    norms = {
        f"{ours}/attn_norm": f"{theirs}/pre_attention_norm{suffix}",
        f"{ours}/mlp_norm": f"{theirs}/pre_ffw_norm{suffix}",
        f"backbone/{name}_norm": f"{_LLM}/final_norm{suffix}",
    }
    modulation = {} if name == "language" else norms
    return [
        Rule(f"{ours}/attn/q", f"{q}/w", "layers heads embed head_dim"),
        Rule(f"{ours}/attn/q_lora_a", f"{q}/lora_a", "layers heads embed lora_rank"),
        Rule(f"{ours}/attn/q_lora_b", f"{q}/lora_b"),
        Rule(f"{ours}/attn/kv", f"{kv}/w", "layers stack kv_heads embed head_dim"),
        Rule(f"{ours}/attn/kv_lora_a", f"{kv}/lora_a", "layers stack kv_heads embed lora_rank"),
        Rule(f"{ours}/attn/kv_lora_b", f"{kv}/lora_b"),
        Rule(f"{ours}/attn/o", f"{o}/w"),
        *(Rule(f"{ours}/attn/o_lora_{x}", f"{o}/lora_{x}") for x in "ab"),
        *(Rule(f"{ours}/mlp/gate_up{x}", f"{gate_up}{x}") for x in ("", "_lora_a", "_lora_b")),
        *(Rule(f"{ours}/mlp/down{x}", f"{down}{x}") for x in ("", "_lora_a", "_lora_b")),
        *(Rule(f"{mine}/scale", f"{other}/scale") for mine, other in norms.items()),
        *(
            Rule(f"{mine}/modulation/{x}", f"{other}/Dense_0/{x}")
            for mine, other in modulation.items()
            for x in ("kernel", "bias")
        ),
    ]


def guess_model(tensors: LazyArrays) -> ModelConfig:
    """What the names alone say: the variant, and which adapters there are (of rank 1 until the shapes are read)."""
    names = list(tensors)
    guess = assemble.variant_of(names, pi0=r"norm_1/scale|^state_proj|^action_time_mlp", pi05=r"_1/Dense_0/|^time_mlp")
    ranks = {}
    for expert, suffix in (("language", ""), ("action", "_1")):
        ranks[f"{expert}.lora_attn_rank"] = int(any(f"einsum{suffix}/lora" in name for name in names))
        ranks[f"{expert}.lora_mlp_rank"] = int(any(f"mlp{suffix}/" in name and "lora" in name for name in names))
    return replaced(guess, ranks)


def read_stats(folder: Path, asset_id: str | None) -> tuple[dict[str, Any] | None, str | None]:
    """The statistics under `assets/` and their name; UserError if there are several and no choice, or not that one."""
    found = {str(p.parent.relative_to(folder / "assets")): p for p in sorted(folder.glob("assets/**/norm_stats.json"))}
    if asset_id is not None and found and asset_id not in found:
        raise UserError(f"{folder / 'assets'} has no statistics {asset_id!r}; it has {sorted(found)}.")
    if len(found) > 1 and asset_id is None:
        raise UserError(f"{folder / 'assets'} has statistics of {sorted(found)}; choose with --asset-id.")
    name = asset_id if asset_id in found else next(iter(found), None)
    return (None, None) if name is None else (read_json(found[name]), name)


def write_beside(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    """Writes the statistics under `assets/`, and the tokenizers; UserError if the name leads out of the folder."""
    assemble.write_tokenizers(opened, folder)
    if opened.norm_stats is not None:
        assets = folder / "assets" / asset_id
        if ".." in assets.parts or Path(asset_id).is_absolute():
            raise UserError(f"--asset-id {asset_id} does not name a folder under assets/.")
        assets.mkdir(parents=True)
        write_json(assets / "norm_stats.json", opened.norm_stats)


def _detect(path: Path) -> Path | None:
    if not path.exists():
        return None
    found = checkpoint.identify(path)
    if found.kind == "unknown" and (path / "params").is_dir():
        raise UserError(f"{path / 'params'} has no _METADATA, so it is not whole; copy it again.")
    return found.path if found.kind == "openpi" else None


def _open(folder: Path, overrides: Overrides) -> OpenCheckpoint:
    tensors = all_finite(open_orbax(folder / "params" if (folder / "params").is_dir() else folder))
    guess = guess_model(tensors)
    fast = {"objective": Autoregressive(blank_cameras=True)} if guess.variant == "pi0_fast" else {}
    policy = assemble.make_policy(folder, overrides, guess, defaults=fast)
    claimed = assemble.claim(rules(guess.variant), tensors, policy.model)
    adapted = [e for e in ("language", "action") if getattr(claimed.model, e).lora_attn_rank]
    if adapted and assemble.recorded_policy(folder, guess.variant) is None:
        if overrides.lora_scale is None:
            raise UserError(
                f"{folder} has LoRA adapters, and their scale alpha / rank is not in the weights; give --lora-scale (1 "
                "for openpi's gemma_2b_lora and gemma_300m_lora)."
            )
        scales = {f"{expert}.lora_scale": overrides.lora_scale for expert in adapted}
        claimed = claimed._replace(model=replaced(claimed.model, scales))
    stats, name = read_stats(folder, overrides.asset_id)
    step = int(folder.name) if folder.name.isdecimal() else None
    return assemble.finished("openpi", folder, policy, claimed, name, norm_stats=stats, step=step)


def _write(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    write_orbax(folder / "params", assemble.foreign_tensors(opened, "openpi", rules(opened.policy.model.variant)))
    write_beside(opened, folder, asset_id)


FORMAT = Format(
    "openpi",
    "params/ with _METADATA in it; a step's folder, or that of steps",
    _detect,
    _open,
    _write,
    lambda opened: assemble.lost_settings(opened, "openpi"),
)
