"""What a checkpoint is, and how two differ; of any format."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np

from pi0_jax import checkpoint
from pi0_jax.convert.formats import OpenCheckpoint
from pi0_jax.convert.lazy import pieces_of_both
from pi0_jax.convert.parameters import has_velocity_expert
from pi0_jax.data.fast import PROCESSOR

_COMPONENTS = {
    "image_encoder": "image encoder",
    "image_projector": "image projector",
    "embedding": "token embedding",
    "backbone/layers/language": "language expert",
    "backbone/language_norm": "language expert",
    "backbone/layers/action": "action expert",
    "backbone/action_norm": "action expert",
}
_MAY_BE_UNKNOWN = ("action_horizon", "execute_steps", "lora_scale")
"""What openpi's checkpoints do not hold; 0 or nan then."""
_NAMES = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "backbone alone (π0-FAST, PaliGemma)"}


def describe(opened: OpenCheckpoint) -> dict[str, Any]:
    """Family, sizes, parameters by component, dtypes, statistics, adapters and step, as a JSON object."""
    model = opened.policy.model
    other = "projections of actions and time" if has_velocity_expert(opened.policy) else "head"
    counts: Counter[str] = Counter()
    for path, tensor in opened.tensors.items():
        counts[_component(path, other)] += tensor.size
    stats = (opened.norm_stats or {}).get("norm_stats", {})
    policy = checkpoint.policy_to_json(opened.policy)
    config = policy["model"]
    if model.variant == "pi0_fast":
        for name in ("action", "action_dim", "action_horizon"):
            config.pop(name)
    return {
        "format": opened.format,
        "path": str(opened.path),
        "family": model.variant,
        "step": opened.step,
        "robot": opened.policy.robot,
        "normalization": opened.policy.normalization,
        "model": config,
        "recipe": _recipe(opened),
        "objective": policy["objective"],
        "sampler": policy["sampler"],
        "parameters": {**counts, "all": sum(counts.values())},
        "bytes": sum(tensor.nbytes for tensor in opened.tensors.values()),
        "dtypes": dict(Counter(str(tensor.dtype) for tensor in opened.tensors.values())),
        "norm_stats": {key: {s: len(v) for s, v in entry.items() if v is not None} for key, entry in stats.items()},
        "lora": {
            name: {"attn_rank": e.lora_attn_rank, "mlp_rank": e.lora_mlp_rank, "scale": e.lora_scale}
            for name, e in (("language", model.language), ("action", model.action))
            if e.lora_attn_rank or e.lora_mlp_rank
        },
        "tokenizer": opened.tokenizer is not None,
        "codec": None if opened.codec is None else json.loads(opened.codec[PROCESSOR]),
        "dropped": list(opened.dropped),
        "warnings": list(opened.warnings),
    }


def text(content: dict[str, Any]) -> str:
    """`describe`'s object as a few lines for people."""
    model, vision = content["model"], content["model"]["vision"]
    patches = (vision["image_size"] // vision["patch_size"]) ** 2
    lines = [
        f"{content['path']}",
        f"  format         {content['format']}" + ("" if content["step"] is None else f", step {content['step']}"),
        f"  family         {_NAMES[content['family']]}",
        f"  image encoder  width {vision['width']}, {vision['depth']} layers, {vision['num_heads']} heads, "
        f"{vision['image_size']} px in {patches} patches",
        f"  language       width {model['language']['width']}, {model['depth']} layers, {model['num_heads']} heads of "
        f"{model['head_dim']} ({model['num_kv_heads']} key/value), vocabulary {model['vocab_size']}",
    ]
    kind = model["head"]["type"]
    if "action" in model:
        head = f"expert of width {model['action']['width']}" if kind == "Expert" else f"head {kind}"
        horizon = model["action_horizon"] or "a length that is not stored"
        lines.append(f"  actions        {head}, {model['action_dim']} dimensions, chunks of {horizon}")
    lines.append(f"  recipe         {content['recipe']}")
    objective = content["objective"]
    settings = [f"{name} {value}" for name in ("predicts", "path") if (value := _short(objective.get(name)))]
    lines.append(f"  objective      {', '.join([objective['type'], *settings])}")
    lines.append(f"  inputs         cameras {', '.join(model['cameras'])}; prompts of {model['prompt_length']} tokens")
    for name, adapter in content["lora"].items():
        lines.append(
            f"  LoRA           {name}: rank {adapter['attn_rank']} (attention, scale {adapter['scale']:g}), "
            f"{adapter['mlp_rank']} (feed-forward)"
        )
    dtypes = ", ".join(f"{name} ({count})" for name, count in content["dtypes"].items())
    lines.append(f"  tensors        {sum(content['dtypes'].values())}: {dtypes}; {content['bytes'] / 1e9:.3f} GB")
    lines += [f"  {number:>13,}  {name}" for name, number in content["parameters"].items()]
    stats = "; ".join(
        f"{key} {max(entry.values())} dims ({', '.join(entry)})" for key, entry in content["norm_stats"].items()
    )
    lines.append(f"  statistics     {stats or 'none'}; {content['normalization']}, robot {content['robot']!r}")
    lines.append(f"  tokenizer      {'in the folder' if content['tokenizer'] else 'none'}")
    if (codec := content["codec"]) is not None:
        fitted = f"{codec.get('time_horizon') or 'any'} actions of {codec.get('action_dim') or 'any'} dimensions"
        lines.append(f"  action codec   FAST, {codec.get('vocab_size')} codes, scale {codec['scale']:g}, {fitted}")
    lines += [f"  unused         {name}" for name in content["dropped"]]
    lines += [f"  warning        {warning}" for warning in content["warnings"]]
    return "\n".join(lines)


def differences(a: OpenCheckpoint, b: OpenCheckpoint) -> list[str]:
    """How two checkpoints differ, one line per parameter or field; empty where they are the same."""
    lines = _fields(checkpoint.policy_to_json(a.policy), checkpoint.policy_to_json(b.policy))
    for name in ("norm_stats", "tokenizer", "codec"):
        x, y = getattr(a, name), getattr(b, name)
        if x != y:
            lines.append(f"{name}: " + ("only one has it" if x is None or y is None else "they differ"))
    for path in sorted({*a.tensors, *b.tensors}):
        if path not in b.tensors or path not in a.tensors:
            lines.append(f"{path}: only in {'the first' if path in a.tensors else 'the second'}")
            continue
        x, y = a.tensors[path], b.tensors[path]
        if x.shape != y.shape:
            lines.append(f"{path}: shape {x.shape} and {y.shape}")
            continue
        largest, square, total = 0.0, 0.0, 0.0
        for p, q in pieces_of_both(x, y):
            p, q = p.astype(np.float32), q.astype(np.float32)
            largest = max(largest, float(np.max(np.abs(p - q), initial=0.0)))
            square += float(np.sum(np.square(p - q), dtype=np.float64))
            total += float(np.sum(np.square(p), dtype=np.float64))
        if largest:
            relative = math.sqrt(square / total) if total else math.inf
            lines.append(f"{path}: largest difference {largest:.3g}, relative {relative:.3g}")
        if x.dtype != y.dtype:
            lines.append(f"{path}: {x.dtype} and {y.dtype}")
    return lines


def _recipe(opened: OpenCheckpoint) -> str:
    """What the policy learns and how it acts, in a line."""
    policy = opened.policy
    if policy.model.variant == "pi0_fast" and opened.codec is None:
        return "π0-FAST, or a backbone that does not act: no action codec says which"
    every = f"every {policy.subtask_every} chunks" if policy.subtask_every > 1 else "each chunk"
    writes = f"; writes a subtask for {every}" if policy.subtask_every else ""
    return policy.objective.recipe + writes


def _short(value: Any) -> Any:
    """A setting in a word: of a choice among kinds, its kind."""
    return value["type"] if isinstance(value, dict) else value


def _component(path: str, other: str) -> str:
    if "_lora_" in path:
        return "adapters"
    return next((name for prefix, name in _COMPONENTS.items() if path.startswith(prefix)), other)


def _fields(a: dict[str, Any], b: dict[str, Any], prefix: str = "") -> list[str]:
    lines = []
    for name, x in a.items():
        y = b.get(name)
        if isinstance(x, dict) and isinstance(y, dict):
            lines += _fields(x, y, f"{prefix}{name}.")
        elif x != y and not (name in _MAY_BE_UNKNOWN and (not x or not y or x != x or y != y)):  # 0 or nan
            lines.append(f"policy {prefix}{name}: {x} and {y}")
    return lines
