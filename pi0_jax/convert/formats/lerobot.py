"""Policy folders of LeRobot 0.6: openpi's PyTorch tensors, config.json, the processors' JSON and their statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.config import Autoregressive, Fast, PolicyConfig
from pi0_jax.convert.assemble import CAMERAS, CODEC_FOLDERS, finished, lost_settings, make_policy, write_tokenizers
from pi0_jax.convert.files import read_json, write_json
from pi0_jax.convert.formats import Format, OpenCheckpoint, Overrides, openpi_torch
from pi0_jax.convert.lazy import LazyArrays, all_finite, in_memory, open_safetensors, read_all, write_safetensors
from pi0_jax.convert.relative import converts_units, relative_actions
from pi0_jax.convert.verify import lerobot as verify
from pi0_jax.errors import UserError
from pi0_jax.sampler import Categorical, Solver

_STATE, _ACTION, _IMAGES = "observation.state", "action", "observation.images."
_NORMALIZATIONS = {"MEAN_STD": "zscore", "QUANTILES": "quantile"}
_STAT_KEYS = (("state", _STATE), ("actions", _ACTION))
"""Keys of our statistics, and of LeRobot's."""
_STATS = ("mean", "std", "min", "max", "q01", "q99")
_IMAGE_RESOLUTION = (224, 224)
_TOKENIZER = "google/paligemma-3b-pt-224"
_CODEC = CODEC_FOLDERS[1]
_EXACT_STATS = "norm_stats.json"
"""The statistics in double precision, beside LeRobot's in single precision; used while the two agree."""


def read_settings(path: Path, raw: dict[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What config.json states: fields of our policy to their values; and warnings.

    Policies but π0, π0.5 and π0-FAST, and settings that we lack, are a UserError.
    """
    variant = raw["type"]
    if variant not in ("pi0", "pi05", "pi0_fast"):
        raise UserError(f"{path} is of a policy {variant!r}; pi0, pi05 and pi0_fast are read.")
    modes = raw.get("normalization_mapping", {})
    usual = "QUANTILES" if variant == "pi05" else "MEAN_STD"
    state, action = (modes.get(key, usual) for key in ("STATE", "ACTION"))
    if state != action or state not in _NORMALIZATIONS:
        raise UserError(
            f"{path} normalises the state by {state} and actions by {action}; both have to be MEAN_STD, or both "
            "QUANTILES."
        )
    height, width = raw.get("image_resolution", _IMAGE_RESOLUTION)
    if height != width:
        raise UserError(f"{path} resizes images to {height} x {width}; square images are supported.")
    for name in ("use_visual_memory", "use_proprioceptive_memory"):
        if raw.get(name):
            raise UserError(f"{path} has {name}: the policy sees earlier observations, and pi0_jax has no such model.")
    for name, supported in (("min_period", 4e-3), ("max_period", 4.0)):
        if raw.get(name, supported) != supported:
            raise UserError(f"{path} embeds the flow time with {name} {raw[name]}; {supported} is supported.")
    warnings = []
    if raw.get("use_relative_actions"):
        warnings.append(
            "the policy predicts actions relative to the state (use_relative_actions), which pi0_jax adds back if the "
            "`semantics` of the robot (--robot) say so"
        )
    visual = [name for name, entry in (raw.get("input_features") or {}).items() if entry["type"] == "VISUAL"]
    cameras = tuple(n.removeprefix(_IMAGES) for n in visual if not n.startswith(f"{_IMAGES}empty_camera_"))
    if not cameras:
        cameras = CAMERAS[variant]
        warnings.append(f"config.json names no cameras; {', '.join(cameras)} are assumed, and --cameras says otherwise")
    horizon = raw.get("chunk_size", 50)
    stated = {
        "model.action_horizon": horizon,
        "model.cameras": cameras,
        "model.prompt_length": raw.get("tokenizer_max_length", 48 if variant == "pi0" else 200),
        "normalization": _NORMALIZATIONS[state],
    }
    if (steps := raw.get("n_action_steps", horizon)) < horizon or variant != "pi0_fast":
        stated["execute_steps"] = steps  # else the length that LeRobot decodes, and not how much of it is executed
    if "num_inference_steps" in raw:
        stated["sampler.num_steps"] = raw["num_inference_steps"]
    if delay := raw.get("rtc_training_max_delay"):
        stated["objective.max_delay"] = delay
    return stated, tuple(warnings)


def read_stats(folder: Path) -> dict[str, Any] | None:
    """The normaliser's statistics as the JSON object of a `norm_stats.json`; None where there are none."""
    pipeline = folder / "policy_preprocessor.json"
    steps = read_json(pipeline)["steps"] if pipeline.is_file() else []
    files = [s["state_file"] for s in steps if s.get("registry_name") == "normalizer_processor" and "state_file" in s]
    if not files:
        return None
    if not (folder / files[0]).is_file():
        raise FileNotFoundError(f"{pipeline} names {files[0]} for the statistics, and there is no such file.")
    arrays = read_all(open_safetensors(folder / files[0]))
    stats = {}
    for ours, theirs in _STAT_KEYS:
        found = {stat: arrays[f"{theirs}.{stat}"] for stat in _STATS if f"{theirs}.{stat}" in arrays}
        if found:
            lists = {stat: value.astype(np.float64).tolist() for stat, value in found.items()}
            stats[ours] = {"q01": None, "q99": None} | lists
    exact = folder / _EXACT_STATS
    if exact.is_file() and _rounded(content := read_json(exact)) == _rounded({"norm_stats": stats}):
        return content
    return {"norm_stats": stats} if stats else None


def _rounded(norm_stats: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Statistics in single precision, as LeRobot keeps them."""
    return {
        key: {stat: np.float32(values).tolist() for stat, values in entry.items() if values is not None}
        for key, entry in norm_stats.get("norm_stats", {}).items()
    }


def write_settings(folder: Path, opened: OpenCheckpoint, *, use_peft: bool = False) -> None:
    """Writes config.json, both processors and their statistics; `use_peft` where the folder holds adapters."""
    policy, norm_stats = opened.policy, opened.norm_stats
    model, relative = policy.model, relative_actions(opened)
    tokens = _action_tokens(opened)
    features = _features(policy, norm_stats)
    outputs = {_ACTION: features[_ACTION]}
    mode = {ours: theirs for theirs, ours in _NORMALIZATIONS.items()}[policy.normalization]
    norm_map = {"VISUAL": "IDENTITY", "STATE": mode, "ACTION": mode}
    config = {
        "type": model.variant,
        "n_obs_steps": 1,
        "input_features": {name: entry for name, entry in features.items() if name != _ACTION},
        "output_features": outputs,
        "device": "cpu",
        "use_amp": False,
        "push_to_hub": False,
        **openpi_torch.VARIANTS,
        "dtype": openpi_torch.dtype_name(opened),
        "chunk_size": model.action_horizon,
        # LeRobot's π0-FAST takes this for the length of the chunks that it decodes.
        "n_action_steps": model.action_horizon if tokens else min(policy.execute_steps, model.action_horizon),
        "max_state_dim": model.action_dim,
        "max_action_dim": model.action_dim,
        "image_resolution": [model.vision.image_size] * 2,
        "empty_cameras": 0,
        "tokenizer_max_length": model.prompt_length,
        "normalization_mapping": norm_map,
    }
    if use_peft:
        config["use_peft"] = True
    if isinstance(policy.sampler, Solver):
        config["num_inference_steps"] = policy.sampler.num_steps
    elif tokens:
        config |= tokens | {"temperature": getattr(policy.sampler, "temperature", 0.0)}
    excluded = list(relative.excluded) if relative.names else ["gripper"]
    if relative.names:
        config |= {"use_relative_actions": True, "relative_exclude_joints": excluded}
        config["action_feature_names"] = relative.names
    write_json(folder / "config.json", config)

    device = _step("device_processor", device="cpu", float_dtype=None)
    before = {
        "rename": _step("rename_observations_processor", rename_map={}),
        "batch": _step("to_batch_processor"),
        "relative": _step(
            "relative_actions_processor",
            enabled=relative.names is not None,
            exclude_joints=excluded,
            action_names=relative.names,
        ),
        "normalize": _step("normalizer_processor", eps=1e-8, features=features, norm_map=norm_map),
        "new_line": _step("pi0_new_line_processor"),
        "state_in_prompt": _step(f"{model.variant}_prepare_state_tokenizer_processor_step"),
        "tokenize": _step(
            "tokenizer_processor",
            max_length=model.prompt_length,
            task_key="task",
            padding_side="right",
            padding="max_length",
            truncation=True,
            tokenizer_name=_TOKENIZER,
        ),
        "tokenize_actions": _step(
            "action_tokenizer_processor", trust_remote_code=True, paligemma_tokenizer_name=_TOKENIZER, **tokens
        )
        # LeRobot 0.6.1 takes the name as it is; later ones look for the folder beside this file.
        | {"artifacts": {"action_tokenizer_name": _CODEC}},
        "device": device,
    }
    order = (
        ("rename", "batch", "new_line", "tokenize", "device", "relative", "normalize")
        if model.variant == "pi0"
        else ("rename", "batch", "relative", "normalize", "state_in_prompt", "tokenize", "tokenize_actions", "device")
    )
    if "action_tokenizer_name" not in tokens:
        order = tuple(key for key in order if key != "tokenize_actions")
    after = [
        _step("unnormalizer_processor", eps=1e-8, features=outputs, norm_map=norm_map),
        _step("absolute_actions_processor", enabled=relative.names is not None),
        device,
    ]
    tensors = _stat_tensors(norm_stats)
    for name, steps in (("policy_preprocessor", [before[key] for key in order]), ("policy_postprocessor", after)):
        for i, step in enumerate(steps):
            if tensors and step["registry_name"] in ("normalizer_processor", "unnormalizer_processor"):
                step["state_file"] = f"{name}_step_{i}_{step['registry_name']}.safetensors"
                write_safetensors(folder / step["state_file"], tensors)
        write_json(folder / f"{name}.json", {"name": name, "steps": steps})
    if norm_stats is not None:
        write_json(folder / _EXACT_STATS, norm_stats)


def _action_tokens(opened: OpenCheckpoint) -> dict[str, Any]:
    """LeRobot's settings of action tokens; empty where the policy does not act by them."""
    codec = opened.policy.objective.codec
    if codec is None or opened.policy.model.variant != "pi0_fast":
        return {}
    found = {"max_action_tokens": codec.max_tokens, "fast_skip_tokens": codec.skip}
    return found if opened.codec is None else found | {"action_tokenizer_name": _CODEC}


def _step(name: str, **config: Any) -> dict[str, Any]:
    return {"registry_name": name, "config": config}


def _features(policy: PolicyConfig, norm_stats: dict[str, Any] | None) -> dict[str, Any]:
    model = policy.model
    stats = (norm_stats or {}).get("norm_stats", {})
    state, action = (len(stats[k]["mean"]) if k in stats else model.action_dim for k in ("state", "actions"))
    images = {
        f"{_IMAGES}{camera}": {"type": "VISUAL", "shape": [3, model.vision.image_size, model.vision.image_size]}
        for camera in model.cameras
    }
    return images | {_STATE: {"type": "STATE", "shape": [state]}, _ACTION: {"type": "ACTION", "shape": [action]}}


def _stat_tensors(norm_stats: dict[str, Any] | None) -> LazyArrays:
    found = {}
    for ours, theirs in _STAT_KEYS:
        for stat, values in (norm_stats or {}).get("norm_stats", {}).get(ours, {}).items():
            if values is not None:
                found[f"{theirs}.{stat}"] = in_memory(np.array(values, np.float32))
    return found


def _open(folder: Path, overrides: Overrides) -> OpenCheckpoint:
    path = folder / "config.json"
    tensors = all_finite(
        {n.removeprefix("model."): t for n, t in open_safetensors(folder / openpi_torch.WEIGHTS).items()}
    )
    config, guess = read_json(path), openpi_torch.guess_model(tensors)
    stated, warnings = read_settings(path, config)
    if config["type"] != guess.variant:
        raise UserError(
            f"{path} says {config['type']!r} and most tensors are of a {guess.variant!r}. LeRobot would load it and "
            "be wrong; set the right `type`."
        )
    defaults: dict[str, Any] = {"model.dtype": "bfloat16" if config.get("dtype") == "bfloat16" else "float32"}
    if config["type"] == "pi0_fast":
        room, skip = config.get("max_action_tokens", 256), config.get("fast_skip_tokens", 128)
        codec = Fast(skip=skip, max_tokens=room, bos=True)
        defaults["objective"] = Autoregressive(codec=codec, lowercase=False, reduction="token")
        if temperature := config.get("temperature"):
            defaults["sampler"] = Categorical(temperature=temperature)
    policy = make_policy(folder, overrides, guess, stated, defaults)
    claimed = openpi_torch.claim_tensors(folder, overrides, tensors, policy.model, config)
    image_size = config.get("image_resolution", _IMAGE_RESOLUTION)[0]
    if image_size != claimed.model.vision.image_size:
        raise UserError(
            f"{path} resizes images to {image_size} px, and the position embedding is for "
            f"{claimed.model.vision.image_size} px."
        )
    stats = read_stats(folder)
    return finished("lerobot", folder, policy, claimed, norm_stats=stats, warnings=warnings)


def _write(opened: OpenCheckpoint, folder: Path, asset_id: str) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in openpi_torch.torch_tensors(opened, "lerobot").items()}
    write_safetensors(folder / openpi_torch.WEIGHTS, tensors, {"format": "pt"})
    write_settings(folder, opened)
    write_tokenizers(opened, folder, _CODEC)


def _lost(opened: OpenCheckpoint) -> list[str]:
    notes, delay = lost_settings(opened, "lerobot"), getattr(opened.policy.objective, "max_delay", 0)
    if opened.tokenizer is not None:
        notes.append("LeRobot names its tokenizer and reads no file: tokenizer.model lies beside the weights unused")
    notes += _lost_tokens(opened)
    if opened.policy.model.variant == "pi05" and not opened.policy.state_in_prompt:
        notes.append("LeRobot writes the state into every prompt of a π0.5; these weights were trained without it")
    if (relative := relative_actions(opened)).count and relative.names is None:
        what = f"{relative.count} action dimensions are differences to the state, which LeRobot does not add back"
        notes.append(f"{what}: {relative.reason}")
    if converts_units(opened):
        notes.append("the robot's `adapt` converts units, which LeRobot does not: states and actions are the weights'")
    if delay and opened.policy.model.variant == "pi05":
        notes.append(f'LeRobot after 0.6.1 reads "rtc_training_max_delay": {delay} in config.json of a π0.5')
    return notes


def _lost_tokens(opened: OpenCheckpoint) -> list[str]:
    """What LeRobot does otherwise with action tokens."""
    policy = opened.policy
    objective, tokens = policy.objective, _action_tokens(opened)
    if not tokens:
        why = "acts by the flow alone and reads no action codec"
        return [f"LeRobot {why}: this one is in {_CODEC}/ unused"] if opened.codec is not None else []
    if opened.codec is None:
        notes = ["there is no action codec to write (--codec FOLDER), and LeRobot would decode with its own"]
    else:
        how = "start it there, or name the folder's full path, or a repository, in config.json"
        notes = [f"LeRobot looks for action_tokenizer_name {_CODEC!r} where it is started: {how}"]
    if objective.codec is not None and not objective.codec.bos:
        notes.append("LeRobot begins action tokens with a BOS; these weights were trained without one (codec.bos)")
    if objective.lowercase:
        notes.append("LeRobot reads instructions as they are; these weights read them in lower case: send them so")
    if policy.execute_steps < policy.model.action_horizon:
        notes.append(
            "LeRobot's π0-FAST decodes chunks of n_action_steps, so that is the whole chunk; conversion.json has the "
            f"{policy.execute_steps} that are executed"
        )
    return notes


FORMAT = Format(
    "lerobot",
    "model.safetensors, and a config.json with the policy's type",
    lambda path: openpi_torch.detect(path, lerobot=True),
    _open,
    _write,
    _lost,
    card=True,
    runner=verify.RUNNER,
)
