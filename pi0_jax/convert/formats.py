"""Checkpoints of every format, opened as our leaves.

    pi0           our folder: params/ and assets/
    openpi        openpi's JAX: params/ (with or without trailing `value`) and assets/<id>/norm_stats.json
    openpi-torch  model.safetensors, config.json, assets/<id>/norm_stats.json
    lerobot       a policy folder of LeRobot 0.6
    big_vision    PaliGemma as .npz; read only

Opening reads names, shapes and small files; tensors are read when asked. What a format cannot say (horizon, cameras,
heads) comes from `Choices`, from a `conversion.json` that an earlier conversion left beside the weights, or from the
error that asks for it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from pi0_jax import checkpoint
from pi0_jax.config import ModelConfig, PolicyConfig, TrainConfig
from pi0_jax.convert import lerobot, openpi, remote, torch
from pi0_jax.convert.files import RECORD, Format, detect, read_json
from pi0_jax.convert.lazy import (
    Index,
    Tensor,
    Tensors,
    entry_by_entry,
    open_npz,
    open_orbax,
    open_safetensors,
    read_all,
)
from pi0_jax.convert.leaves import Sizes, is_velocity_expert, leaves, model_of, sizes
from pi0_jax.convert.rules import Rule, bind, infer_sizes, to_ours
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tokenizer import Tokenizer

_CAMERAS = {
    "pi0_fast": ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
    "pi0": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    "pi05": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
}
"""The camera slots that openpi's models are built with."""

_HEADS = {"gemma_2b": (8, 1), "gemma_300m": (8, 1), "dummy": (8, 1)}
"""Query and key/value heads of openpi's and LeRobot's named Gemma variants."""


@dataclasses.dataclass(frozen=True)
class Choices:
    """What a source may not say, or what shall become different. None: what the source says."""

    action_dim: int | None = None
    """Width of state and action vectors. Above the source's: new rows are zero, old inputs give the old outputs."""
    horizon: int | None = None
    """Actions in a chunk."""
    cameras: tuple[str, ...] | None = None
    """Cameras in token order."""
    prompt_length: int | None = None
    """Tokens of the prompt."""
    variant: Literal["pi0", "pi05"] | None = None
    """Give a backbone without action expert (PaliGemma, π0-FAST) a fresh one of this variant."""
    num_heads: int | None = None
    """Query heads of the experts."""
    num_kv_heads: int | None = None
    """Key/value heads of the experts."""
    vision_heads: int | None = None
    """Attention heads of the image encoder."""
    lora_scale: float | None = None
    """Factor of attention's adapters, alpha / rank."""
    asset_id: str | None = None
    """Which of the norm_stats.json under openpi's assets/ (read), or under which name (written)."""
    robot: str | None = None
    """Name of the robot in `pi0_jax.data.robots`."""
    tokenizer: str | None = None
    """SentencePiece model to copy into the result, PaliGemma's for released weights."""


class Weights(NamedTuple):
    """An opened checkpoint: our leaves, unread, and all that goes with them."""

    format: Format
    path: Path
    policy: PolicyConfig
    tensors: Tensors
    """Our path to tensor."""
    norm_stats: dict[str, Any] | None = None
    """The JSON object of `norm_stats.json`."""
    tokenizer: bytes | None = None
    train: TrainConfig | None = None
    step: int | None = None
    dropped: Mapping[str, Tensor] = MappingProxyType({})
    """The source's tensors that are not needed, such as the action expert's unused head."""
    warnings: tuple[str, ...] = ()
    names: Mapping[str, str] = MappingProxyType({})
    """Our path to what the source calls its tensors, `*` for the layers, where it calls them otherwise."""


def open_checkpoint(path: str | Path, choices: Choices = Choices(), offline: bool = False) -> Weights:
    """Opens a checkpoint of any format.

    Args:
        path: folder (a run's newest step is taken), `.safetensors`, or `.npz` with `:subtree` if wanted; or a URL of
            one, which is copied to the cache first (`remote.fetch`).
        choices: what the source does not say.
        offline: URLs have to be in the cache; no connection is opened.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: not a checkpoint, tensors that do not fit one another, sizes that have to be given, or no such
            robot or tokenizer; reading a tensor raises it too, where there are numbers that are not finite.
    """
    if remote.is_remote(path):
        path = remote.fetch(str(path), offline)
    kind, folder = detect(Path(path).expanduser().absolute())
    weights = _OPEN[kind](folder, choices)
    if choices.tokenizer is not None:
        weights = weights._replace(tokenizer=Tokenizer.from_file(choices.tokenizer).model)
    if choices.robot is not None:
        get_robot(choices.robot)
        weights = weights._replace(policy=dataclasses.replace(weights.policy, robot=choices.robot))
    return weights


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor, whose reading raises a ValueError with its name where numbers are not finite."""
    if tensor.dtype.kind not in "fV":
        raise ValueError(f"tensor {name} has dtype {tensor.dtype}; weights are floating-point numbers.")

    def read(i: Index) -> np.ndarray:
        array = tensor.read(i)
        flat = np.asarray(array).reshape(-1)
        for start in range(0, flat.size, 2**22):
            if not np.isfinite(flat[start : start + 2**22].astype(np.float32)).all():
                raise ValueError(f"tensor {name} holds numbers that are not finite; the checkpoint is damaged.")
        return array

    return tensor._replace(read=read)


# ---------------------------------------------------------------------------------------------------------------- open


def _open_pi0(folder: Path, choices: Choices) -> Weights:
    assets = checkpoint.load_assets(folder)
    model = assets.policy.model
    tensors = _checked(open_orbax(folder / "params"))
    if is_velocity_expert(model):
        table = [Rule(path, path, axes) for path, axes in leaves(model).items()]
        rules, _ = bind(table, leaves(model), tensors, sizes(model))
        ours = to_ours(rules, leaves(model), tensors, sizes(model))
    else:
        _check_shapes(folder, tensors, model)
        ours = tensors
    step = int(folder.name) if folder.name.isdecimal() else None
    return Weights("pi0", folder, assets.policy, ours, assets.norm_stats, assets.tokenizer, assets.train, step)


def _open_openpi(folder: Path, choices: Choices) -> Weights:
    tensors = _checked(open_orbax(folder / "params" if (folder / "params").is_dir() else folder))
    guess = openpi.variant_of(tensors)
    policy = _policy(folder, choices, guess, horizon=None, default=None)
    model, claimed = _claim(openpi.rules, tensors, policy.model, {}, {})
    if any(getattr(model, e).lora_attn_rank for e in ("language", "action")) and not _remembered(folder, guess.variant):
        model = _with_lora_scale(model, choices, folder)
    step = int(folder.name) if folder.name.isdecimal() else None
    return _finish(folder, choices, Weights("openpi", folder, policy, step=step, **claimed), model)


def _open_openpi_torch(folder: Path, choices: Choices) -> Weights:
    tensors = _checked(open_safetensors(folder / "model.safetensors"))
    if any(name.startswith("model.") for name in tensors):
        raise ValueError(
            f"the tensors of {folder} have LeRobot's names, and its config.json, which says horizon, cameras and "
            "normalisation, is missing or does not name the policy's type; copy it too."
        )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    policy = _policy(folder, choices, torch.variant_of(tensors), horizon=config.get("action_horizon"), default=None)
    known = _known_heads(folder, choices, policy.model, tensors, config)
    model, claimed = _claim(torch.rules, tensors, policy.model, known, torch.SPARE)
    return _finish(folder, choices, Weights("openpi-torch", folder, policy, **claimed), model)


def _open_lerobot(folder: Path, choices: Choices) -> Weights:
    tensors = open_safetensors(folder / "model.safetensors")
    tensors = _checked({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    config = lerobot.read_config(folder / "config.json")
    guess = torch.variant_of(tensors)
    if config.variant != guess.variant:
        raise ValueError(
            f"{folder / 'config.json'} says {config.variant!r} and most tensors are of a {guess.variant!r}. LeRobot "
            "would load it and be wrong; set the right `type`."
        )
    if not config.cameras:
        assumed = _CAMERAS[config.variant]
        said = f"config.json names no cameras; {', '.join(assumed)} are assumed, and --cameras says otherwise"
        config = config._replace(cameras=assumed, warnings=(*config.warnings, said))
    policy = _policy(folder, choices, guess, horizon=config.horizon, default=config)
    known = _known_heads(folder, choices, policy.model, tensors, config.raw)
    model, claimed = _claim(torch.rules, tensors, policy.model, known, torch.SPARE)
    if config.image_size != model.vision.image_size:
        raise ValueError(
            f"{folder / 'config.json'} resizes images to {config.image_size} px, and the position embedding is for "
            f"{model.vision.image_size} px."
        )
    stats = lerobot.read_stats(folder)
    weights = Weights("lerobot", folder, policy, norm_stats=stats, warnings=config.warnings, **claimed)
    return _finish(folder, choices, weights, model)


def _open_big_vision(path: Path, choices: Choices) -> Weights:
    file, _, subtree = str(path).partition(".npz:")
    file = Path(file + ".npz" if subtree else file)
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}.")
    tensors = open_npz(file)
    for prefix in [subtree.strip("/") + "/"] if subtree else ["params/", "opt/target/", "params/params/"]:
        if any(name.startswith(f"{prefix}img/") or name.startswith(f"{prefix}llm/") for name in tensors):
            tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            break
    if not any(name.startswith("llm/") for name in tensors):
        raise ValueError(f"{path} has no `llm/` and `img/` parameters of a PaliGemma; it has {sorted(tensors)[:6]} …")
    tensors = _checked({f"PaliGemma/{name}": tensor for name, tensor in _stack_blocks(tensors).items()})
    policy = PolicyConfig(model=dataclasses.replace(openpi.variant_of(tensors), cameras=_CAMERAS["pi0"]), robot="none")
    model, claimed = _claim(openpi.rules, tensors, policy.model, {}, {})
    return _finish(file.parent, choices, Weights("big_vision", file, policy, **claimed), model)


_OPEN: dict[str, Callable[[Path, Choices], Weights]] = {
    "pi0": _open_pi0,
    "openpi": _open_openpi,
    "openpi-torch": _open_openpi_torch,
    "lerobot": _open_lerobot,
    "big_vision": _open_big_vision,
}


def _check_shapes(folder: Path, tensors: Tensors, model: ModelConfig) -> None:
    """Compares tensors with the parameters of the network itself, for heads that no table describes.

    Raises:
        ValueError: tensors that are missing, of no use or of another shape; all of them are listed.
    """
    wanted = _shapes(model)
    problems = [f"missing: {path}" for path in wanted if path not in tensors]
    problems += [f"of no use: {path}" for path in tensors if path not in wanted]
    problems += [
        f"{path} has shape {tensor.shape}, and {wanted[path]} is needed"
        for path, tensor in tensors.items()
        if path in wanted and tensor.shape != wanted[path]
    ]
    if problems:
        raise ValueError(f"the tensors of {folder} do not make its model:\n  " + "\n  ".join(problems[:40]))


@functools.lru_cache
def _shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the network's own parameters, by path."""
    import flax.linen as nn
    import jax

    from pi0_jax.model.heads import make_network
    from pi0_jax.pi0 import init_params

    shapes = jax.eval_shape(lambda key: nn.meta.unbox(init_params(make_network(model), key)), jax.random.key(0))
    flat: dict[str, Any] = dict(flatten_dict(shapes, sep="/"))
    return {path: leaf.shape for path, leaf in flat.items()}


def _checked(tensors: Tensors) -> Tensors:
    return {name: finite(name, tensor) for name, tensor in tensors.items()}


def _claim(
    rules: Callable[[str], tuple[Rule, ...]],
    tensors: Tensors,
    guess: ModelConfig,
    known: Sizes,
    spare: Mapping[str, str],
) -> tuple[ModelConfig, dict[str, Any]]:
    """The model that the tensors make, and the fields of `Weights` that say which tensor is which."""
    table = rules(guess.variant)
    model = model_of(infer_sizes(table, tensors, known), guess)
    letters, wanted = sizes(model), leaves(model)
    chosen, rest = bind(table, wanted, tensors, letters, spare)
    return model, {
        "tensors": to_ours(chosen, wanted, tensors, letters),
        "dropped": {name: tensors[name] for name in rest},
        "names": {path: re.sub(r"\{\w\}", "*", " and ".join(rule.names)) for path, rule in chosen.items()},
    }


def _finish(folder: Path, choices: Choices, weights: Weights, model: ModelConfig) -> Weights:
    """Adds what lies beside the weights, and the model that they turned out to be."""
    policy = dataclasses.replace(weights.policy, model=model)
    stats, asset_id = weights.norm_stats, None
    if stats is None and weights.format in ("openpi", "openpi-torch"):
        stats, asset_id = _openpi_stats(folder, choices)
    if asset_id is not None and policy.robot == "none":
        policy = dataclasses.replace(policy, robot=asset_id)
    tokenizer = folder / "tokenizer.model"
    return weights._replace(
        policy=policy, norm_stats=stats, tokenizer=tokenizer.read_bytes() if tokenizer.is_file() else None
    )


def _policy(
    folder: Path, choices: Choices, guess: ModelConfig, horizon: int | None, default: lerobot.Config | None
) -> PolicyConfig:
    """The policy as far as it is known without the shapes.

    Raises:
        ValueError: nobody says the horizon.
    """
    remembered = _remembered(folder, guess.variant)
    if remembered is not None:
        model = remembered.model
        same = {f.name: getattr(guess, f.name) for f in dataclasses.fields(guess) if f.name in ("variant",)}
        for expert in ("language", "action"):
            ranks = {
                f"lora_{part}_rank": getattr(getattr(guess, expert), f"lora_{part}_rank") for part in ("attn", "mlp")
            }
            same[expert] = dataclasses.replace(getattr(model, expert), **ranks)
        model = dataclasses.replace(model, **same)
        if horizon is not None:
            model = dataclasses.replace(model, action_horizon=horizon)
        return _with_config(dataclasses.replace(remembered, model=model), default)
    horizon = choices.horizon if horizon is None else horizon
    if horizon is None and guess.variant != "pi0_fast":
        raise ValueError(
            f"{folder} does not say how many actions are in a chunk; give --horizon (openpi's configs: 50 for π0 and "
            "ALOHA, 10 for LIBERO and π0 DROID, 15 for π0.5 DROID)."
        )
    model = dataclasses.replace(
        guess,
        action_horizon=guess.action_horizon if horizon is None else horizon,
        cameras=default.cameras if default else _CAMERAS[guess.variant],
        prompt_length=default.prompt_length if default else {"pi0": 48, "pi05": 200, "pi0_fast": 250}[guess.variant],
        dtype=default.dtype if default else guess.dtype,
        max_delay=default.max_delay if default else 0,
    )
    normalization = default.normalization if default else "zscore" if guess.variant == "pi0" else "quantile"
    num_steps = default.num_steps if default else 10
    execute = default.execute_steps if default else model.action_horizon
    return PolicyConfig(
        model=model, robot="none", normalization=normalization, num_steps=num_steps, execute_steps=execute
    )


def _with_config(policy: PolicyConfig, config: lerobot.Config | None) -> PolicyConfig:
    """A remembered policy with what LeRobot's config.json says, which may have been changed since."""
    if config is None:
        return policy
    model = dataclasses.replace(
        policy.model,
        cameras=config.cameras,
        prompt_length=config.prompt_length,
        max_delay=config.max_delay or policy.model.max_delay,
    )
    return dataclasses.replace(
        policy,
        model=model,
        normalization=config.normalization,
        num_steps=config.num_steps if "num_inference_steps" in config.raw else policy.num_steps,
        execute_steps=config.execute_steps,
    )


def _remembered(folder: Path, variant: str) -> PolicyConfig | None:
    """The policy in the record of an earlier conversion, if it is of the same variant."""
    path = folder / RECORD
    if not path.is_file():
        return None
    content = read_json(path).get("policy")
    policy = checkpoint.policy_from_json(content) if content else None
    return policy if policy is not None and policy.model.variant == variant else None


def _with_lora_scale(model: ModelConfig, choices: Choices, folder: Path) -> ModelConfig:
    if choices.lora_scale is None:
        raise ValueError(
            f"{folder} has LoRA adapters, and their scale alpha / rank is not in the weights; give --lora-scale (1 for "
            "openpi's gemma_2b_lora and gemma_300m_lora)."
        )
    experts = {
        name: dataclasses.replace(getattr(model, name), lora_scale=choices.lora_scale)
        for name in ("language", "action")
        if getattr(model, name).lora_attn_rank
    }
    return dataclasses.replace(model, **experts)


def _known_heads(
    folder: Path, choices: Choices, model: ModelConfig, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> Sizes:
    """Numbers of heads, which PyTorch's flat projections do not show."""
    remembered = _remembered(folder, model.variant)
    named = _HEADS.get(str(config.get("paligemma_variant", "")).removesuffix("_lora"), (None, None))
    standard = any(name.endswith("post_layernorm.bias") and t.shape == (1152,) for name, t in tensors.items())
    found = {
        "n": choices.num_heads or (remembered.model.num_heads if remembered else named[0]),
        "k": choices.num_kv_heads or (remembered.model.num_kv_heads if remembered else named[1]),
        "N": choices.vision_heads or (remembered.model.vision.num_heads if remembered else 16 if standard else None),
    }
    return {letter: value for letter, value in found.items() if value is not None}


def _openpi_stats(folder: Path, choices: Choices) -> tuple[dict[str, Any] | None, str | None]:
    """The statistics under `assets/`, and the name they go by.

    Raises:
        ValueError: several, and none is chosen; or a name that is not there.
    """
    found = {str(p.parent.relative_to(folder / "assets")): p for p in sorted(folder.glob("assets/**/norm_stats.json"))}
    if choices.asset_id is not None and found and choices.asset_id not in found:
        raise ValueError(f"{folder / 'assets'} has no statistics {choices.asset_id!r}; it has {sorted(found)}.")
    if len(found) > 1 and choices.asset_id is None:
        raise ValueError(f"{folder / 'assets'} has statistics of {sorted(found)}; choose with --asset-id.")
    name = choices.asset_id if choices.asset_id in found else next(iter(found), None)
    return (read_json(found[name]), name) if name is not None else (None, None)


def _stack_blocks(tensors: Tensors) -> Tensors:
    """Stacks big_vision's `encoderblock_<i>` trees, as models without scan are saved, into `encoderblock`."""
    pattern = re.compile(r"/encoderblock_(\d+)/")
    rest = {name: tensor for name, tensor in tensors.items() if not pattern.search(name)}
    blocks: dict[str, dict[int, Tensor]] = {}
    for name, tensor in tensors.items():
        if match := pattern.search(name):
            blocks.setdefault(pattern.sub("/encoderblock/", name), {})[int(match[1])] = tensor
    depth = 1 + max((i for layers in blocks.values() for i in layers), default=-1)
    for name, layers in blocks.items():
        if missing := [i for i in range(depth) if i not in layers]:
            raise ValueError(f"missing: {name.replace('/encoderblock/', f'/encoderblock_{missing[0]}/')}")
        rest[name] = _stack([layers[i] for i in range(depth)])
    return rest


def _stack(layers: list[Tensor]) -> Tensor:
    return entry_by_entry((len(layers), *layers[0].shape), layers[0].dtype, lambda i: layers[i].read(None))


def params_of(weights: Weights) -> dict[str, Any]:
    """Reads everything into memory, as the tree that the network's `apply` takes; numpy, in the stored dtypes."""
    return unflatten_dict(read_all(weights.tensors), sep="/")


def parameters(tensors: Mapping[str, Tensor]) -> int:
    """Number of parameters."""
    return sum(math.prod(tensor.shape) for tensor in tensors.values())
