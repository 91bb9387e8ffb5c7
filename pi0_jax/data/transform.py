"""From a raw observation to what the model reads, and from the model's actions back to the robot's.

A transform is a pair of functions on sample dicts, and `chain` runs forwards in order and inverses in reverse, so that
the way out cannot drift from the way in. Training, evaluation and serving use the same chain (`make_transform`):

    robot's units to the weights', poses → relative actions → normalise → tokenise → images → pad

π0.5 writes the normalised state into the prompt, so tokens come after normalising and before padding.

Relative actions leave their `anchor` in the sample, the state that they are relative to; the way back needs it. Poses
leave the state as it was `reported`, for the signs of quaternions (`ANCHORS` are both).
"""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict, cast

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from pi0_jax.batch import Observation, Targets
from pi0_jax.config import ModelConfig, PolicyConfig
from pi0_jax.data.normalization import (
    Mode,
    Normalization,
    Stats,
    affine,
    check_stats,
    normalize_values,
    unnormalize_values,
)
from pi0_jax.data.poses import (
    Poses,
    absolute,
    from_model,
    model_index,
    model_slice,
    relative,
    steady_signs,
    to_model,
)
from pi0_jax.data.robots import Robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.errors import UserError

ACTION_KEYS = ("actions", "previous")
"""Keys of a sample that hold action chunks, which transforms map alike."""
ANCHORS = ("anchor", "reported")
"""Keys that `Transform.forward` may add to a sample, and `inverse` needs."""


class Sample(TypedDict, total=False):
    """What transforms map, from robot units to the model's arrays. Leading axes *b are allowed; a policy has none."""

    images: dict[str, np.ndarray]
    """By camera, uint8 `[*b h w 3]`."""
    image_masks: dict[str, np.ndarray]
    """By camera, `[*b]`; False: the robot lacks it."""
    state: np.ndarray
    """`[*b d]`."""
    prompt: str | np.ndarray
    """The instruction, or an array of them `[*b]`; after tokenising token ids `[*b p]`."""
    prompt_mask: np.ndarray
    text: str | np.ndarray
    """What is to be written after the prompt and before actions, such as the subtask, or an array of them `[*b]`; empty
    is nothing. In training."""
    asks: bool | np.ndarray
    """Whether the prompt asks for text, `[*b]`; left out: where there is `text`."""
    actions: np.ndarray
    """The demonstrated chunk in training, the model's at inference, `[*b ah d]`."""
    has_actions: np.ndarray
    """False where `actions` mean nothing, `[*b]`; left out: they do."""
    step_mask: np.ndarray
    """False at steps of `actions` that are not to be learnt, `[*b ah]`; in training."""
    targets: Targets
    """What is learnt as tokens."""
    previous: np.ndarray
    """What remains of the chunk in execution, `[n d]`; at inference only."""
    delay: int
    """How many actions of `previous` will be executed before the new chunk can be."""
    anchor: np.ndarray
    """State that relative actions are relative to, `[*b d]`."""
    reported: np.ndarray
    """State whose quaternions have the signs that those of the actions are to begin with, `[*b d]`."""


Function = Callable[[np.ndarray], np.ndarray]


class Transform(NamedTuple):
    """Two pure functions from sample to sample. `inverse` undoes `forward` on `actions`, and on `state` if present."""

    forward: Callable[[Sample], Sample]
    inverse: Callable[[Sample], Sample]


def _same(sample: Sample) -> Sample:
    return sample


identity = Transform(_same, _same)


def chain(*transforms: Transform) -> Transform:
    """One transform that runs `transforms` in order, and their inverses in reverse."""

    def forward(sample: Sample) -> Sample:
        for transform in transforms:
            sample = transform.forward(sample)
        return sample

    def inverse(sample: Sample) -> Sample:
        for transform in reversed(transforms):
            sample = transform.inverse(sample)
        return sample

    return Transform(forward, inverse)


def per_key(forward: Mapping[str, Function], inverse: Mapping[str, Function]) -> Transform:
    """A transform that maps each of the named keys, where a sample has it, by its own function."""

    def apply(functions: Mapping[str, Function]) -> Callable[[Sample], Sample]:
        def mapped(sample: Sample) -> Sample:
            values = {key: functions[key](value) if key in functions else value for key, value in sample.items()}  # pyright: ignore[reportArgumentType]
            return cast(Sample, values)

        return mapped

    return Transform(apply(forward), apply(inverse))


def _state_and_actions(state: Function, actions: Function) -> dict[str, Function]:
    return {"state": state, **dict.fromkeys(ACTION_KEYS, actions)}


def make_transform(
    policy: PolicyConfig,
    robot: Robot,
    normalization: Normalization,
    tokenizer: Tokenizer,
    targets: Transform = identity,
) -> Transform:
    """The transform from a raw observation to the model's arrays, and from its actions to the robot's.

    The tokenizer is the one that the weights were trained with; `targets` adds what is learnt as tokens
    (`data.targets`).

    Raises:
        UserError: the statistics are not the robot's, its dimensions do not fit into the model, none of the model's
            cameras is the robot's, or the tokenizer has more tokens than the model.
    """
    model = policy.model
    check_stats(normalization.stats, {"state": robot.model_state, "actions": robot.model_actions})
    check_fits(robot, model)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}. Raise `model.vocab_size`, "
            "or bring the tokenizer that belongs to the weights."
        )
    return chain(
        to_normalized(robot, normalization, policy.normalization),
        targets,
        tokenize(tokenizer, policy),
        select_images(model.cameras, model.vision.image_size, blank=policy.objective.blank_cameras),
        pad(model.action_dim, robot),
    )


def make_pairs_transform(
    policy: PolicyConfig, robot: Robot, tokenizer: Tokenizer, targets: Transform = identity
) -> Transform:
    """The transform of image-text pairs: the prompt is the question, and the robot's state is not in it."""
    model = policy.model
    return chain(
        Transform(lambda sample: sample | {"asks": np.zeros(np.shape(sample["prompt"]), bool)}, _same),
        targets,
        tokenize(tokenizer, dataclasses.replace(policy, state_in_prompt=False)),
        select_images(model.cameras, model.vision.image_size),
        pad(model.action_dim, robot),
    )


def to_normalized(robot: Robot, normalization: Normalization, mode: Mode) -> Transform:
    """State and actions from the robot's units to normalised ones, in the robot's dimensions in the model, and back."""
    return chain(
        adapt(robot),
        relative_actions(normalization.semantics, robot.poses),
        normalize(normalization.stats, mode),
    )


def check_fits(robot: Robot, model: ModelConfig) -> None:
    """Refuses a robot of more dimensions than the model has, or none of whose cameras the model reads.

    Raises:
        UserError: what does not fit, and what to do.
    """
    widths = len(robot.model_state), len(robot.model_actions)
    if (wide := max(widths)) > model.action_dim:
        nine = ", nine of each pose" if robot.poses != Poses() else ""
        raise UserError(
            f"{robot.name} has {widths[0]} state and {widths[1]} action dimensions{nine}; the model has room for "
            f"{model.action_dim}. Raise `model.action_dim`; trained weights grow by `pi0 convert CHECKPOINT TARGET "
            f"--action-dim {wide}`."
        )
    if not robot.select_cameras(model.cameras):
        raise UserError(
            f"the model's cameras are {list(model.cameras)}, those of {robot.name} {list(robot.cameras.values())}. "
            "Name at least one of the robot's in `model.cameras`."
        )


def adapt(robot: Robot) -> Transform:
    """State and actions from the robot's units to those of the weights, and back; nothing for most robots.

    Rotations of the robot's poses become six numbers. Quaternions of a chunk come back with the signs of the state's.
    """
    converted = identity
    if robot.adapt is not None:
        converted = per_key(
            _state_and_actions(robot.adapt.state, robot.adapt.actions),
            _state_and_actions(robot.adapt.state_inverse, robot.adapt.actions_inverse),
        )
    state, actions = robot.poses
    if not (state or actions):
        return converted
    write = functools.partial(from_model, poses=state)
    read = _state_and_actions(functools.partial(to_model, poses=state), functools.partial(to_model, poses=actions))

    def back(sample: Sample) -> Sample:
        def with_signs(values: np.ndarray) -> np.ndarray:
            return steady_signs(from_model(values, actions), robot.poses, sample.get("reported"))

        return per_key({}, _state_and_actions(write, with_signs)).inverse(sample)

    posed = Transform(lambda sample: per_key(read, {}).forward(sample | {"reported": sample["state"]}), back)
    return chain(converted, posed)


def relative_actions(semantics: tuple[str, ...], poses: Poses = Poses()) -> Transform:
    """Actions of the dimensions that are relative to the state, as differences to it, and back.

    The whole chunk is relative to the state at its beginning. Angles differ by no more than half a turn; on the way
    back they are the state plus that difference, so that a robot that counts turns goes the short way. Poses are
    relative in SE(3) (`data.poses`). `semantics` has one of `data.robots.SEMANTICS` per dimension of the robot, and
    samples have the dimensions of the model.

    Raises:
        UserError: `inverse` gets a sample that did not come from `forward`, so that it has no anchor.
    """
    dims, origins, angles, frames = _relative_places(semantics, poses)
    if not dims and not frames:
        return identity

    def forward(sample: Sample) -> Sample:
        anchor = np.asarray(sample["state"])

        def difference(actions: np.ndarray) -> np.ndarray:
            actions = np.array(actions)
            actions[..., dims] -= anchor[..., None, origins]
            actions[..., angles] = np.pi - np.mod(np.pi - actions[..., angles], 2 * np.pi)
            for target, origin in frames:
                actions[..., target] = relative(actions[..., target], anchor[..., None, origin])
            return actions

        return per_key(dict.fromkeys(ACTION_KEYS, difference), {}).forward(sample | {"anchor": anchor})

    def inverse(sample: Sample) -> Sample:
        if "anchor" not in sample:
            raise UserError("relative actions need the state they are relative to: pass the sample's `anchor`.")
        actions, anchor = np.array(sample["actions"]), np.asarray(sample["anchor"])
        actions[..., dims] += anchor[..., None, origins]
        for target, origin in frames:
            actions[..., target] = absolute(actions[..., target], anchor[..., None, origin])
        return sample | {"actions": actions}

    return Transform(forward, inverse)


def relative_dims(semantics: tuple[str, ...], poses: Poses = Poses()) -> list[int]:
    """Dimensions of actions in the model that are relative to the state."""
    dims, _, _, frames = _relative_places(semantics, poses)
    return sorted([*dims, *(i for target, _ in frames for i in range(target.start, target.stop))])


class _RelativePlaces(NamedTuple):
    """Dimensions of actions that are relative, and those of the state that they are relative to, in the model."""

    dims: list[int]
    origins: list[int]
    angles: list[int]
    """Those of `dims` that are angles."""
    frames: list[tuple[slice, slice]]
    """Poses."""


def _relative_places(semantics: tuple[str, ...], poses: Poses) -> _RelativePlaces:
    posed = {i for pose in poses.actions for i in range(pose.start, pose.end)}
    singles = [i for i, kind in enumerate(semantics) if kind in ("relative", "angle") and i not in posed]
    return _RelativePlaces(
        [model_index(i, poses.actions) for i in singles],
        [model_index(i, poses.state) for i in singles],
        [model_index(i, poses.actions) for i in singles if semantics[i] == "angle"],
        [
            (model_slice(target, poses.actions), model_slice(origin, poses.state))
            for target, origin in zip(poses.actions, poses.state, strict=False)
            if semantics[target.start] == "relative"
        ],
    )


def normalize(stats: Stats, mode: Mode) -> Transform:
    """State and actions to normalised units and back."""
    for entry in stats.values():
        affine(entry, mode)  # fails now rather than at the first sample

    def functions(function: Callable[..., np.ndarray]) -> dict[str, Function]:
        return _state_and_actions(*(lambda x, s=stats[key]: function(x, s, mode) for key in ("state", "actions")))

    return per_key(functions(normalize_values), functions(unnormalize_values))


def tokenize(tokenizer: Tokenizer, policy: PolicyConfig) -> Transform:
    """The string `prompt` to the model's number of token ids and `prompt_mask`, in its variant's format; no inverse."""
    model = policy.model
    with_state = model.variant != "pi0" and policy.state_in_prompt
    usual = "" if model.variant == "pi0_fast" else None

    def forward(sample: Sample) -> Sample:
        prompts, state = np.asarray(sample["prompt"]), np.asarray(sample["state"])
        written = np.asarray(sample.get("text", ""), object)
        asks = np.broadcast_to(sample.get("asks", written != ""), prompts.shape).ravel()
        states = state.reshape(-1, state.shape[-1]) if with_state else [None] * prompts.size
        texts = [str(prompt).lower() if policy.objective.lowercase else str(prompt) for prompt in prompts.ravel()]
        endings = ["Subtask: " if each else usual for each in asks]
        encoded = [
            tokenizer.encode_prompt(text, model.prompt_length, state, ending)
            for text, state, ending in zip(texts, states, endings, strict=True)
        ]
        ids, mask = (np.stack(rows).reshape(*prompts.shape, -1) for rows in zip(*encoded, strict=True))
        return sample | {"prompt": ids, "prompt_mask": mask}

    return Transform(forward, _same)


def select_images(cameras: tuple[str, ...], size: int, *, blank: bool = False) -> Transform:
    """Exactly the model's `cameras`, `size` pixels square, and `image_masks`; an absent camera is black and False, or
    with `blank` True."""

    def forward(sample: Sample) -> Sample:
        batch = np.shape(sample["state"])[:-1]
        present = sample["images"]
        images = {
            c: resize_with_pad(present[c], size) if c in present else np.zeros((*batch, size, size, 3), np.uint8)
            for c in cameras
        }
        seen = sample.get("image_masks", {})
        masks = {c: np.asarray(seen[c]) if c in seen else np.full(batch, blank or c in present) for c in cameras}
        return sample | {"images": images, "image_masks": masks}

    return Transform(forward, _same)


def pad(action_dim: int, robot: Robot) -> Transform:
    """State and actions, float32, filled up to `action_dim` with zeros; back to the robot's dimensions in the model."""
    state, actions = len(robot.model_state), len(robot.model_actions)

    def fill(x: np.ndarray) -> np.ndarray:
        out = np.zeros((*np.shape(x)[:-1], action_dim), np.float32)
        out[..., : np.shape(x)[-1]] = x
        return out

    return per_key(
        _state_and_actions(fill, fill),
        _state_and_actions(lambda x: x[..., :state], lambda x: x[..., :actions]),
    )


def resize_with_pad(images: UInt8[np.ndarray, "*b h w 3"], size: int) -> UInt8[np.ndarray, "*b s s 3"]:
    """Images at `size` pixels square: aspect kept, black bars around. Pillow's bilinear, as openpi's client does.

    Images that have the size already are returned as they are.
    """
    height, width = images.shape[-3:-1]
    if (height, width) == (size, size):
        return images
    ratio = max(width, height) / size
    new_height, new_width = max(int(height / ratio), 1), max(int(width / ratio), 1)
    top, left = (size - new_height) // 2, (size - new_width) // 2
    out = np.zeros((*images.shape[:-3], size, size, 3), np.uint8)
    for index in np.ndindex(*images.shape[:-3]):
        image = PIL.Image.fromarray(images[index])
        resized = image.resize((new_width, new_height), resample=PIL.Image.Resampling.BILINEAR)
        out[index][top : top + new_height, left : left + new_width] = np.asarray(resized)
    return out


def to_observation(sample: Sample) -> Observation:
    """The model's input, from what `make_transform(...).forward` returned."""
    values: Mapping[str, Any] = sample
    return Observation(*(values[field] for field in Observation._fields))
