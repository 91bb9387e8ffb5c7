"""The files around the weights of a LeRobot 0.6 policy: config.json, the processors' JSON and their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, NamedTuple

import ml_dtypes
import numpy as np

from pi0_jax.config import PolicyConfig
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.lazy import Tensor, in_memory, open_safetensors, read_all, write_safetensors

STATE, ACTION, IMAGES = "observation.state", "action", "observation.images."
_MODES: dict[str, Literal["zscore", "quantile"]] = {"MEAN_STD": "zscore", "QUANTILES": "quantile"}
_STATS = ("mean", "std", "min", "max", "q01", "q99")
_TOKENIZER = "google/paligemma-3b-pt-224"
EXACT = "norm_stats.json"
"""The statistics in double precision, beside LeRobot's in single precision; used while the two agree."""


class Config(NamedTuple):
    """What config.json says about the model."""

    variant: Literal["pi0", "pi05", "pi0_fast"]
    cameras: tuple[str, ...]
    horizon: int
    prompt_length: int
    image_size: int
    dtype: Literal["bfloat16", "float32"]
    normalization: Literal["zscore", "quantile"]
    num_steps: int
    execute_steps: int
    max_delay: int
    warnings: tuple[str, ...]
    raw: dict[str, Any]


def read_config(path: Path) -> Config:
    """Reads a policy's config.json.

    Raises:
        ValueError: another policy than π0, π0.5 or π0-FAST, or a normalisation that we lack.
    """
    raw = read_json(path)
    if raw["type"] not in ("pi0", "pi05", "pi0_fast"):
        raise ValueError(f"{path} is of a policy {raw['type']!r}; pi0, pi05 and pi0_fast are read.")
    modes = raw.get("normalization_mapping", {})
    usual = "QUANTILES" if raw["type"] == "pi05" else "MEAN_STD"
    state, action = (modes.get(key, usual) for key in ("STATE", "ACTION"))
    if state != action or state not in _MODES:
        raise ValueError(
            f"{path} normalises the state by {state} and actions by {action}; both have to be MEAN_STD, or both "
            "QUANTILES."
        )
    _check_supported(path, raw)
    cameras = [name for name, entry in (raw.get("input_features") or {}).items() if entry["type"] == "VISUAL"]
    height, width = raw.get("image_resolution", (224, 224))
    if height != width:
        raise ValueError(f"{path} resizes images to {height} x {width}; square images are supported.")
    warnings = []
    if raw.get("use_relative_actions"):
        warnings.append(
            "the policy predicts actions relative to the state (use_relative_actions), which pi0_jax does not add back"
        )
    horizon = raw.get("chunk_size", 50)
    return Config(
        variant=raw["type"],
        cameras=tuple(name.removeprefix(IMAGES) for name in cameras if not name.startswith(f"{IMAGES}empty_camera_")),
        horizon=horizon,
        prompt_length=raw.get("tokenizer_max_length", 48 if raw["type"] == "pi0" else 200),
        image_size=height,
        dtype="bfloat16" if raw.get("dtype") == "bfloat16" else "float32",
        normalization=_MODES[state],
        num_steps=raw.get("num_inference_steps", 10),
        execute_steps=raw.get("n_action_steps", horizon),
        max_delay=raw.get("rtc_training_max_delay", 0),
        warnings=tuple(warnings),
        raw=raw,
    )


def _check_supported(path: Path, raw: dict[str, Any]) -> None:
    """Raises ValueError where the policy is run in a way that no weights show and that we lack."""
    for name in ("use_visual_memory", "use_proprioceptive_memory"):
        if raw.get(name):
            raise ValueError(f"{path} has {name}: the policy sees earlier observations, and pi0_jax has no such model.")
    for name, usual in (("min_period", 4e-3), ("max_period", 4.0)):
        if raw.get(name, usual) != usual:
            raise ValueError(f"{path} embeds the flow time with {name} {raw[name]}; {usual} is supported.")


def read_stats(folder: Path) -> dict[str, Any] | None:
    """The normaliser's statistics as the JSON object of a `norm_stats.json`; None where there are none."""
    pipeline = folder / "policy_preprocessor.json"
    if not pipeline.is_file():
        return None
    steps = read_json(pipeline)["steps"]
    files = [s["state_file"] for s in steps if s.get("registry_name") == "normalizer_processor" and "state_file" in s]
    if not files:
        return None
    if not (folder / files[0]).is_file():
        raise FileNotFoundError(f"{pipeline} names {files[0]} for the statistics, and there is no such file.")
    arrays = read_all(open_safetensors(folder / files[0]))
    stats = {}
    for ours, theirs in (("state", STATE), ("actions", ACTION)):
        found = {stat: arrays[f"{theirs}.{stat}"] for stat in _STATS if f"{theirs}.{stat}" in arrays}
        if not found:
            continue
        stats[ours] = {stat: value.astype(np.float64).tolist() for stat, value in found.items()}
        stats[ours] = {"q01": None, "q99": None} | stats[ours]
    exact = folder / EXACT
    if exact.is_file() and _agree(content := read_json(exact), stats):
        return content
    return {"norm_stats": stats} if stats else None


def write_folder(folder: Path, policy: PolicyConfig, norm_stats: dict[str, Any] | None, dtype: str) -> None:
    """Writes config.json, both processors and their statistics beside the weights."""
    model = policy.model
    features = _features(policy, norm_stats)
    inputs = {name: entry for name, entry in features.items() if name != ACTION}
    outputs = {ACTION: features[ACTION]}
    mode = {mine: theirs for theirs, mine in _MODES.items()}[policy.normalization]
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    config = {
        "type": model.variant,
        "n_obs_steps": 1,
        "input_features": inputs,
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m",
        "dtype": dtype,
        "chunk_size": model.action_horizon,
        "n_action_steps": min(policy.execute_steps, model.action_horizon),
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "image_resolution": [model.vision.image_size] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": model.prompt_length,
        "normalization_mapping": norm_map,
    }
    if model.variant != "pi0_fast":
        config["num_inference_steps"] = policy.num_steps
    write_json(folder / "config.json", config)

    normalizer = {"eps": 1e-8, "features": features, "norm_map": norm_map}
    unnormalizer = normalizer | {"features": outputs}
    rename = _step("rename_observations_processor", {"rename_map": {}})
    batch = _step("to_batch_processor", {})
    relative = _step(
        "relative_actions_processor", {"enabled": False, "exclude_joints": ["gripper"], "action_names": None}
    )
    tokenizer = _step(
        "tokenizer_processor",
        {
            "max_length": model.prompt_length,
            "task_key": "task",
            "padding_side": "right",
            "padding": "max_length",
            "truncation": True,
            "tokenizer_name": _TOKENIZER,
        },
    )
    device = _step("device_processor", {"device": "cpu", "float_dtype": None})
    normalize = _step("normalizer_processor", normalizer)
    state_in_prompt = {"pi05": "pi05_prepare_state_tokenizer_processor_step"}.get(
        model.variant, "pi0_fast_prepare_state_tokenizer_processor_step"
    )
    if model.variant == "pi0":
        before = [rename, batch, _step("pi0_new_line_processor", {}), tokenizer, device, relative, normalize]
    else:
        # π0-FAST's action tokenizer is for training, and names a tokenizer that only the user can choose.
        before = [rename, batch, relative, normalize, _step(state_in_prompt, {}), tokenizer, device]
    after = [
        _step("unnormalizer_processor", unnormalizer),
        _step("absolute_actions_processor", {"enabled": False}),
        _step("device_processor", {"device": "cpu", "float_dtype": None}),
    ]
    tensors = _stat_tensors(norm_stats)
    for name, steps in (("policy_preprocessor", before), ("policy_postprocessor", after)):
        for i, step in enumerate(steps):
            if tensors and step["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                step["state_file"] = f"{name}_step_{i}_{step['registry_name']}.safetensors"
                write_safetensors(folder / step["state_file"], tensors)
        write_json(folder / f"{name}.json", {"name": name, "steps": steps})
    if norm_stats is not None:
        write_json(folder / EXACT, norm_stats)


def dtype_name(tensor: Tensor) -> Literal["bfloat16", "float32"]:
    """How the two frameworks call the dtype of a model whose embedding this is."""
    return "bfloat16" if tensor.dtype == ml_dtypes.bfloat16 else "float32"


def _features(policy: PolicyConfig, norm_stats: dict[str, Any] | None) -> dict[str, Any]:
    model = policy.model
    stats = (norm_stats or {}).get("norm_stats", {})

    def width(key: str) -> int:
        return len(stats[key]["mean"]) if key in stats else model.action_dim

    features: dict[str, Any] = {
        f"{IMAGES}{camera}": {"type": "VISUAL", "shape": [3, model.vision.image_size, model.vision.image_size]}
        for camera in model.cameras
    }
    features[STATE] = {"type": "STATE", "shape": [width("state")]}
    features[ACTION] = {"type": "ACTION", "shape": [width("actions")]}
    return features


def _stat_tensors(norm_stats: dict[str, Any] | None) -> dict[str, Tensor]:
    found = {}
    for ours, theirs in (("state", STATE), ("actions", ACTION)):
        for stat, values in (norm_stats or {}).get("norm_stats", {}).get(ours, {}).items():
            if values is not None:
                found[f"{theirs}.{stat}"] = in_memory(np.array(values, np.float32))
    return found


def _agree(content: dict[str, Any], stats: dict[str, Any]) -> bool:
    """Whether double-precision statistics round to the single-precision ones."""
    exact = content.get("norm_stats", {})
    rounded = {
        key: {stat: None if v is None else np.float32(v).tolist() for stat, v in entry.items()}
        for key, entry in exact.items()
    }
    return {k: {s: v for s, v in e.items() if v is not None} for k, e in rounded.items()} == {
        k: {s: np.float32(v).tolist() for s, v in e.items() if v is not None} for k, e in stats.items()
    }


def _step(name: str, config: dict[str, Any]) -> dict[str, Any]:
    return {"registry_name": name, "config": config}
