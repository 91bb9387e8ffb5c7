"""openpi's JAX checkpoints: an Orbax folder `params/`, of the released or of the training layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax.config import ModelConfig
from pi0_jax.convert.table import Rule, convert_in
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import init_params


def _expert_rules(name: str, suffix: str) -> list[Rule]:
    ours, theirs = f"backbone/layers/{name}", "PaliGemma/llm/layers"
    rules = [
        Rule(f"{ours}/attn/q", f"{theirs}/attn/q_einsum{suffix}/w", "l d n h -> l n d h"),
        Rule(f"{ours}/attn/kv", f"{theirs}/attn/kv_einsum{suffix}/w", "l c d k h -> l c k d h"),
        Rule(f"{ours}/attn/o", f"{theirs}/attn/attn_vec_einsum{suffix}/w"),
        Rule(f"{ours}/mlp/gate_up", f"{theirs}/mlp{suffix}/gating_einsum"),
        Rule(f"{ours}/mlp/down", f"{theirs}/mlp{suffix}/linear"),
    ]
    norms = {
        f"{ours}/attn_norm": f"{theirs}/pre_attention_norm{suffix}",
        f"{ours}/mlp_norm": f"{theirs}/pre_ffw_norm{suffix}",
        f"backbone/{name}_norm": f"PaliGemma/llm/final_norm{suffix}",
    }
    for mine, other in norms.items():
        rules.append(Rule(f"{mine}/scale", f"{other}/scale"))
        rules += [Rule(f"{mine}/modulation/{leaf}", f"{other}/Dense_0/{leaf}") for leaf in ("kernel", "bias")]
    return rules


def _paired(pairs: dict[str, str], leaves: tuple[str, str]) -> list[Rule]:
    return [Rule(f"{ours}/{leaf}", f"{theirs}/{leaf}") for ours, theirs in pairs.items() for leaf in leaves]


_BLOCK = "PaliGemma/img/Transformer/encoderblock"
RULES: tuple[Rule, ...] = (
    *_expert_rules("language", ""),
    *_expert_rules("action", "_1"),
    Rule("embedding", "PaliGemma/llm/embedder/input_embedding"),
    Rule("image_encoder/position_embedding", "PaliGemma/img/pos_embedding"),
    *_paired(
        {
            "image_encoder/layers/attn_norm": f"{_BLOCK}/LayerNorm_0",
            "image_encoder/layers/mlp_norm": f"{_BLOCK}/LayerNorm_1",
            "image_encoder/norm": "PaliGemma/img/Transformer/encoder_norm",
        },
        ("scale", "bias"),
    ),
    *_paired(
        {
            "image_encoder/patch_embedding": "PaliGemma/img/embedding",
            "image_encoder/layers/mlp_in": f"{_BLOCK}/MlpBlock_0/Dense_0",
            "image_encoder/layers/mlp_out": f"{_BLOCK}/MlpBlock_0/Dense_1",
            **{
                f"image_encoder/layers/{name}": f"{_BLOCK}/MultiHeadDotProductAttention_0/{name}"
                for name in ("query", "key", "value", "out")
            },
            "image_projector": "PaliGemma/img/head",
            "action_in": "action_in_proj",
            "action_out": "action_out_proj",
            "state_in": "state_proj",
        },
        ("kernel", "bias"),
    ),
    # π0 and π0.5 name the time MLP differently; a checkpoint has one of the two.
    *_paired({"time_mlp_in": "action_time_mlp_in", "time_mlp_out": "action_time_mlp_out"}, ("kernel", "bias")),
    *_paired({"time_mlp_in": "time_mlp_in", "time_mlp_out": "time_mlp_out"}, ("kernel", "bias")),
)
"""Our leaf, openpi's leaf, and how the axes move; both π0 and π0.5."""


def read_params(path: str | Path) -> dict[str, np.ndarray]:
    """Reads every tensor of an openpi `params/` folder into host memory, in its stored dtype.

    Args:
        path: the `params` folder, or a folder that holds one.

    Returns:
        Path (joined by "/") to array. The trailing `value` that openpi's training writes is dropped.

    Raises:
        FileNotFoundError: no Orbax folder there.
        ValueError: an Orbax folder without a `params` tree.
    """
    folder = Path(path).absolute()
    if (folder / "params").is_dir():
        folder /= "params"
    if not (folder / "_METADATA").is_file():
        raise FileNotFoundError(
            f"{folder} is not an openpi checkpoint: it has no _METADATA. Name the folder `params`, or the one it is in."
        )
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(folder).item_metadata.tree
        restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        restored = checkpointer.restore(folder, restore_args=restore_args)
    if "params" not in restored:
        raise ValueError(f"{folder} holds {sorted(restored)} but no `params`; is it a train_state folder?")
    flat: dict[str, Any] = dict(flatten_dict(restored["params"], sep="/"))
    if all(name.endswith("/value") for name in flat):
        flat = {name.removesuffix("/value"): leaf for name, leaf in flat.items()}
    return flat


def params_from_openpi(source: dict[str, np.ndarray], config: ModelConfig) -> dict:
    """Our parameter tree from openpi's tensors.

    Args:
        source: as `read_params` returns them.
        config: the model the weights are for; its sizes have to be the checkpoint's.

    Raises:
        ValueError: leaves that do not correspond one to one, or shapes that differ.
    """
    network = VelocityNetwork(config)
    target = nn.meta.unbox(jax.eval_shape(lambda: init_params(network, jax.random.key(0))))
    return unflatten_dict(convert_in(RULES, source, flatten_dict(target, sep="/")), sep="/")
