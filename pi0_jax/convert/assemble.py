"""Steps that formats have in common: from foreign tensors and small files to an opened checkpoint, and back."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pi0_jax import checkpoint
from pi0_jax.checkpoint.assets import CODEC, write_files
from pi0_jax.config import Autoregressive, ModelConfig, PolicyConfig
from pi0_jax.convert.files import RECORD, read_json
from pi0_jax.convert.formats import OpenCheckpoint, Overrides
from pi0_jax.convert.lazy import LazyArray, LazyArrays
from pi0_jax.convert.parameters import exists_elsewhere, infer_model, parameters, replaced
from pi0_jax.convert.rules import Rule, bind, from_ours, to_ours
from pi0_jax.data.fast import TOKENIZER, FastCodec
from pi0_jax.errors import UserError
from pi0_jax.sampler import Euler, Greedy, Solver

CAMERAS = {
    "pi0_fast": ("base_0_rgb", "base_1_rgb", "wrist_0_rgb"),
    "pi0": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
    "pi05": ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"),
}
"""The camera slots that openpi's models are built with."""
PROMPT_LENGTH = {"pi0": 48, "pi05": 200, "pi0_fast": 250}
CODEC_FOLDERS = (CODEC, "action_tokenizer")
"""Folders beside weights that may hold a FAST codec: ours and LeRobot's."""
_NONE: Mapping[str, Any] = {}


class Claimed(NamedTuple):
    """Foreign tensors as parameters of the model that they make."""

    model: ModelConfig
    tensors: LazyArrays
    dropped: Mapping[str, LazyArray]
    names: Mapping[str, str]


def claim(
    rules: Sequence[Rule],
    tensors: Mapping[str, LazyArray],
    guess: ModelConfig,
    heads: Mapping[str, int] = _NONE,
    spare: Callable[[ModelConfig], Mapping[str, tuple[int, ...]]] = lambda model: _NONE,
) -> Claimed:
    """Infers the model from the tensors and says which tensor is which parameter.

    `spare` gives names that may be left over, and their shapes; the other arguments are those of `infer_model`.

    Raises:
        UserError: they do not correspond, or heads have to be given.
    """
    model = infer_model(rules, tensors, guess, heads)
    wanted = parameters(model)
    chosen, left_over = bind(rules, wanted, tensors, spare(model))
    names = {path: " and ".join(rule.names).replace("{}", "*") for path, rule in chosen.items()}
    return Claimed(model, to_ours(chosen, wanted, tensors), {name: tensors[name] for name in left_over}, names)


def finished(
    format: str, path: Path, policy: PolicyConfig, claimed: Claimed, asset_id: str | None = None, **fields: Any
) -> OpenCheckpoint:
    """The opened checkpoint, with the tokenizer and the action codec that lie beside the weights.

    `policy` is what is known beside the tensors, `asset_id` the name of the statistics, which are those of a robot;
    `fields` are further ones of `OpenCheckpoint`.
    """
    policy = replaced(policy, {"model": claimed.model})
    if asset_id is not None and policy.robot == "none":
        policy = replaced(policy, {"robot": asset_id})
    folder = path if path.is_dir() else path.parent
    tokenizer = folder / "tokenizer.model"
    codec = next((folder / name for name in CODEC_FOLDERS if (folder / name / TOKENIZER).is_file()), None)
    return OpenCheckpoint(
        format,
        path,
        policy,
        claimed.tensors,
        tokenizer=tokenizer.read_bytes() if tokenizer.is_file() else None,
        codec={file.name: file.read_bytes() for file in sorted(codec.iterdir())} if codec else None,
        dropped=claimed.dropped,
        names=claimed.names,
        **fields,
    )


def write_tokenizers(opened: OpenCheckpoint, folder: Path, codec_folder: str = CODEC) -> None:
    """Writes the tokenizer and the action codec beside the weights."""
    if opened.tokenizer is not None:
        (folder / "tokenizer.model").write_bytes(opened.tokenizer)
    if opened.codec is not None:
        write_files(folder, {f"{codec_folder}/{name}": content for name, content in opened.codec.items()})


def recorded_policy(folder: Path, variant: str) -> PolicyConfig | None:
    """The policy in the record of an earlier conversion, if it is of the same variant."""
    path = folder / RECORD
    content = read_json(path).get("policy") if path.is_file() else None
    policy = checkpoint.policy_from_json(content) if content else None
    return policy if policy is not None and policy.model.variant == variant else None


def make_policy(
    folder: Path,
    overrides: Overrides,
    guess: ModelConfig,
    stated: Mapping[str, Any] = _NONE,
    defaults: Mapping[str, Any] = _NONE,
) -> PolicyConfig:
    """The policy as far as it is known without the shapes.

    In order of precedence: `stated`, fields such as `model.cameras` in the folder's own configuration; the record of an
    earlier conversion; `--horizon`, or that of `--codec`; the format's `defaults`; openpi's settings for the variant. A
    backbone without a codec does not act, and needs no horizon. `guess` has variant and adapters, as the names of the
    tensors show them.

    Raises:
        UserError: nothing says the horizon.
    """
    recorded = recorded_policy(folder, guess.variant)
    if recorded is not None:
        ranks = {
            f"model.{expert}.{rank}": getattr(getattr(guess, expert), rank)
            for expert in ("language", "action")
            for rank in ("lora_attn_rank", "lora_mlp_rank")
        }
        return replaced(recorded, ranks | dict(stated))
    horizon = stated.get("model.action_horizon", overrides.horizon)
    if horizon is None and overrides.codec is not None:
        horizon = FastCodec.load(overrides.codec).horizon
    if horizon is None and (guess.variant != "pi0_fast" or overrides.codec is not None):
        raise UserError(
            f"{folder} does not say how many actions are in a chunk; give --horizon (openpi's configs: 50 for π0 and "
            "ALOHA, 10 for LIBERO, π0-FAST and π0 DROID, 15 for π0.5 DROID)."
        )
    horizon = guess.action_horizon if horizon is None else horizon
    usual = {
        "model.action_horizon": horizon,
        "model.cameras": CAMERAS[guess.variant],
        "model.prompt_length": PROMPT_LENGTH[guess.variant],
        "normalization": "zscore" if guess.variant == "pi0" else "quantile",
        "execute_steps": horizon,
    }
    if guess.variant == "pi0_fast":
        usual |= {"objective": Autoregressive(), "sampler": Greedy()}
    return replaced(PolicyConfig(model=guess, robot="none"), usual | dict(defaults) | dict(stated))


def variant_of(names: Sequence[str], pi0: str, pi05: str) -> ModelConfig:
    """The variant that the tensors' names show, as a model with default sizes.

    `pi0` and `pi05` are patterns of names that only that variant has; without any it is a backbone alone.
    """
    counts = {variant: sum(bool(re.search(p, name)) for name in names) for variant, p in (("pi0", pi0), ("pi05", pi05))}
    variant = "pi05" if counts["pi05"] > counts["pi0"] else "pi0"
    return ModelConfig(variant=variant if counts[variant] else "pi0_fast")


def foreign_tensors(opened: OpenCheckpoint, format: str, rules: Sequence[Rule]) -> LazyArrays:
    """The tensors of another format, by their names there, read from our parameters.

    Raises:
        UserError: the format has no place for a parameter, or the model is one that exists only here.
    """
    policy = opened.policy
    if not exists_elsewhere(policy):
        raise UserError(
            f"{format} holds action experts that predict velocities, and {opened.path} is of another kind: "
            f"{policy.model.head}, {policy.objective}. Nothing there could run it. Such weights convert to pi0 only "
            "(--to pi0)."
        )
    return from_ours(rules, parameters(policy.model), opened.tensors)


def lost_settings(opened: OpenCheckpoint, format: str) -> list[str]:
    """Settings of the policy that openpi and LeRobot have no place for: a sentence each."""
    notes, policy = [], opened.policy
    if isinstance(policy.sampler, Solver) and policy.sampler != Euler(policy.sampler.num_steps):
        notes.append(f"{format} samples by Euler's method with equal steps, without {policy.sampler}")
    if policy.guidance is not None:
        notes.append(f"{format} has no classifier-free guidance (guidance.scale {policy.guidance.scale})")
    if delay := getattr(policy.objective, "max_delay", 0):
        notes.append(
            f"{format} has no setting for a model that was trained to go on from up to {delay} actions "
            "(objective.max_delay); conversion.json remembers it"
        )
    return notes
