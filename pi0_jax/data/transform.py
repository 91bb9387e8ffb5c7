"""From a raw observation to what the model reads, and from the model's actions back to the robot's.

A transform is a pair of functions on sample dicts, and `chain` runs forwards in order and inverses in reverse, so that
the way out cannot drift from the way in. Training, evaluation and serving use the same chain (`make_transform`):

    robot's units to the weights' → relative actions → normalise → tokenise → images → pad

π0.5 writes the normalised state into the prompt, so tokens come after normalising and before padding.

A sample holds `images` {camera: uint8 [*b h w 3]}, `state` [*b d], `prompt` (a string, or an array of them [*b]), and
in training `actions` [*b ah d] and `step_mask` [*b ah]. Leading axes *b are allowed throughout; a policy has none.
Relative actions leave their `anchor` [*b d] in the sample, the state that they are relative to; the way back needs it.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
from jaxtyping import UInt8

from pi0_jax.batch import Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.data import normalization as normalization
from pi0_jax.data.normalization import Mode, Stats
from pi0_jax.data.robots import Robot, semantics_of
from pi0_jax.data.tokenizer import Tokenizer

Sample = dict[str, Any]


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


def make_transform(policy: PolicyConfig, robot: Robot, stats: Stats, tokenizer: Tokenizer) -> Transform:
    """The whole way from a raw observation to the model's arrays, and from its actions to the robot's.

    Args:
        policy: the model's sizes, its variant and its normalisation.
        robot: whose observations come and whose actions go.
        stats: statistics of its demonstrations.
        tokenizer: the one that the weights were trained with.

    Raises:
        ValueError: the statistics are not the robot's, its dimensions do not fit into the model, none of the model's
            cameras is the robot's, the tokenizer has more tokens than the model, or the actions' semantics are not
            for this robot.
    """
    model = policy.model
    semantics = semantics_of(robot, policy.action_semantics)
    normalization.check_stats(stats, {"state": robot.state, "actions": robot.actions})
    if max(len(robot.state), len(robot.actions)) > model.action_dim:
        raise ValueError(
            f"{robot.name} has {len(robot.state)} state and {len(robot.actions)} action dimensions; the model has room "
            f"for {model.action_dim}. Raise `model.action_dim`."
        )
    if not set(model.cameras) & set(robot.cameras.values()):
        raise ValueError(
            f"the model's cameras are {list(model.cameras)}, those of {robot.name} {list(robot.cameras.values())}. "
            "Name at least one of the robot's in `model.cameras`."
        )
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"the tokenizer has {tokenizer.vocab_size} tokens, the model {model.vocab_size}. Raise `model.vocab_size`, "
            "or bring the tokenizer that belongs to the weights."
        )
    return chain(
        adapt(robot),
        relative_actions(semantics),
        normalize(stats, policy.normalization),
        tokenize(tokenizer, model.prompt_length, with_state=model.variant == "pi05"),
        select_images(model.cameras, model.vision.image_size),
        pad(model.action_dim, robot),
    )


def adapt(robot: Robot) -> Transform:
    """State and actions from the robot's units to those of the weights, and back; nothing for most robots."""
    if robot.adapt is None:
        return identity
    ways = {"state": robot.adapt.state, "actions": robot.adapt.actions}
    back = {"state": robot.adapt.state_inverse, "actions": robot.adapt.actions_inverse}

    def apply(functions: dict[str, Callable]) -> Callable[[Sample], Sample]:
        return lambda sample: sample | {key: f(sample[key]) for key, f in functions.items() if key in sample}

    return Transform(apply(ways), apply(back))


def relative_actions(semantics: tuple[str, ...]) -> Transform:
    """Actions of the dimensions that are relative to the state, as differences to it, and back.

    The whole chunk is relative to the state at its beginning. Angles differ by no more than half a turn; on the way
    back they are the state plus that difference, so that a robot that counts turns goes the short way.

    Args:
        semantics: one of `data.robots.SEMANTICS` for each dimension.

    Raises:
        ValueError: `inverse` gets a sample that did not come from `forward`, so that it has no anchor.
    """
    dims = np.flatnonzero([kind in ("relative", "angle") for kind in semantics])
    angles = np.flatnonzero([kind == "angle" for kind in semantics])
    if not dims.size:
        return identity

    def forward(sample: Sample) -> Sample:
        anchor = np.asarray(sample["state"])
        if "actions" not in sample:
            return sample | {"anchor": anchor}
        actions = np.array(sample["actions"])
        actions[..., dims] -= anchor[..., None, dims]
        actions[..., angles] = np.pi - np.mod(np.pi - actions[..., angles], 2 * np.pi)
        return sample | {"anchor": anchor, "actions": actions}

    def inverse(sample: Sample) -> Sample:
        if "anchor" not in sample:
            raise ValueError("relative actions need the state they are relative to: pass the sample's `anchor`.")
        actions = np.array(sample["actions"])
        actions[..., dims] += np.asarray(sample["anchor"])[..., None, dims]
        return sample | {"actions": actions}

    return Transform(forward, inverse)


def normalize(stats: Stats, mode: Mode) -> Transform:
    """State and actions to normalised units and back; both are looked up in `stats` by name."""
    for entry in stats.values():
        normalization.affine(entry, mode)  # fails now rather than at the first sample

    def apply(function: Callable[..., np.ndarray]) -> Callable[[Sample], Sample]:
        return lambda sample: (
            sample | {key: function(sample[key], entry, mode) for key, entry in stats.items() if key in sample}
        )

    return Transform(apply(normalization.normalize_values), apply(normalization.unnormalize_values))


def tokenize(tokenizer: Tokenizer, length: int, with_state: bool) -> Transform:
    """The string `prompt` to `length` token ids and `prompt_mask`; `with_state` is π0.5's format. No way back."""

    def forward(sample: Sample) -> Sample:
        prompts = np.asarray(sample["prompt"])
        state = np.asarray(sample["state"])
        states = state.reshape(-1, state.shape[-1]) if with_state else [None] * prompts.size
        encoded = [
            tokenizer.encode_prompt(str(prompt), length, state)
            for prompt, state in zip(prompts.ravel(), states, strict=True)
        ]
        ids, mask = (np.stack(parts).reshape(*prompts.shape, length) for parts in zip(*encoded, strict=True))
        return sample | {"prompt": ids, "prompt_mask": mask}

    return Transform(forward, _same)


def select_images(cameras: tuple[str, ...], size: int) -> Transform:
    """Exactly the model's `cameras`, `size` pixels square, and `image_masks`; an absent camera is black and False."""

    def forward(sample: Sample) -> Sample:
        batch = np.shape(sample["state"])[:-1]
        present = sample["images"]
        images = {
            c: resize_with_pad(present[c], size) if c in present else np.zeros((*batch, size, size, 3), np.uint8)
            for c in cameras
        }
        masks = {c: np.full(batch, c in present) for c in cameras}
        return sample | {"images": images, "image_masks": masks}

    return Transform(forward, _same)


def pad(action_dim: int, robot: Robot) -> Transform:
    """State and actions, float32, filled up to `action_dim` with zeros; back to the robot's own dimensions."""
    own = {"state": len(robot.state), "actions": len(robot.actions)}

    def fill(x: np.ndarray) -> np.ndarray:
        out = np.zeros((*np.shape(x)[:-1], action_dim), np.float32)
        out[..., : np.shape(x)[-1]] = x
        return out

    return Transform(
        lambda sample: sample | {key: fill(sample[key]) for key in own if key in sample},
        lambda sample: sample | {key: sample[key][..., :dims] for key, dims in own.items() if key in sample},
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
    """What `make_transform(...).forward` returned, as the model's input."""
    return Observation(*(sample[field] for field in Observation._fields))


def check_observation(raw: dict[str, Any], robot: Robot) -> Sample:
    """Checks a raw observation that a user or a robot sent, and brings it into form.

    Args:
        raw: `images` by camera, uint8 or float in [0, 1], `[h, w, 3]` RGB; `state` `[d]`; `prompt`, a string. For a
            chunk that goes on from the one in execution also `previous`, what is left of that, `[n, d]` in the robot's
            units; and `delay`, how many of these will be executed before the new chunk can be.
        robot: whose it should be.

    Returns:
        The same with uint8 images (floats as openpi converts them, 255 times and cut) and a float32 state. `previous`
        is called `actions`, which is what the transforms know them as.

    Raises:
        ValueError: something is missing, unknown, or of wrong shape, type or value.
    """
    if missing := {"images", "state", "prompt"} - set(raw):
        raise ValueError(f"the observation lacks {sorted(missing)}; it has {sorted(raw)}.")
    cameras = tuple(robot.cameras.values())
    images = raw["images"]
    if not isinstance(images, dict):
        raise ValueError(f"`images` came as {type(images).__name__}; expected a dict by camera, of {list(cameras)}.")
    if missing := [camera for camera in cameras if camera not in images]:
        unknown = [name for name in images if name not in cameras]
        hints = [f"{unknown_name!r} is perhaps {match[0]!r}" for unknown_name in unknown
                 if (match := difflib.get_close_matches(str(unknown_name), missing, n=1, cutoff=0.4))]  # fmt: skip
        raise ValueError(
            f"the observation lacks cameras {missing}; it has {sorted(map(str, images))}. "
            f"{robot.name} has {list(cameras)}{'; ' + ', '.join(hints) if hints else ''}."
        )
    if unknown := [name for name in images if name not in cameras]:
        raise ValueError(f"the observation has cameras {unknown} that {robot.name} has not; it has {list(cameras)}.")
    prompt = raw["prompt"]
    prompt = prompt.item() if isinstance(prompt, np.ndarray) and prompt.ndim == 0 else prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"`prompt` came as {prompt!r}; expected the instruction, a string that is not empty.")
    sample = {
        "images": {camera: _check_image(images[camera], camera) for camera in cameras},
        "state": _check_state(raw["state"], robot),
        "prompt": prompt,
    }
    return sample | _check_previous(raw, robot)


def _check_previous(raw: dict[str, Any], robot: Robot) -> Sample:
    if raw.get("previous") is None:
        return {}
    try:
        actions, delay = np.asarray(raw["previous"], np.float32), int(raw.get("delay", 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"`previous` or `delay` is no number: {error}.") from error
    if actions.ndim != 2 or actions.shape[1] != len(robot.actions):
        raise ValueError(
            f"`previous` has shape {actions.shape}; expected (steps, {len(robot.actions)}): {', '.join(robot.actions)}."
        )
    if not np.isfinite(actions).all():
        raise ValueError("`previous` is NaN or infinite in places; send what is left of the last chunk as it came.")
    if delay < 0:
        raise ValueError(f"`delay` is {delay}; expected the number of `previous` actions that will be executed.")
    return {"actions": actions, "delay": delay} if len(actions) else {}


def _check_image(image: Any, camera: str) -> UInt8[np.ndarray, "h w 3"]:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        first = image.ndim == 3 and image.shape[0] == 3
        hint = " Move the channels to the end: np.moveaxis(image, 0, -1)." if first else ""
        raise ValueError(f"camera {camera!r} has shape {image.shape}; expected (height, width, 3).{hint}")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise ValueError(f"camera {camera!r} is of type {image.dtype}; expected uint8, or float in [0, 1].")
    if not (image.min() >= 0 and image.max() <= 1):  # false for NaN
        raise ValueError(
            f"camera {camera!r} is of type {image.dtype} with values {image.min()} to {image.max()}; floats are "
            "expected in [0, 1]. Send uint8 for values up to 255."
        )
    return (255 * image).astype(np.uint8)


def _check_state(state: Any, robot: Robot) -> np.ndarray:
    names = ", ".join(robot.state)
    try:
        state = np.asarray(state, np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"`state` came as {state!r}; expected {len(robot.state)} numbers: {names}.") from error
    if state.shape != (len(robot.state),):
        raise ValueError(f"`state` has shape {state.shape}; expected {(len(robot.state),)}: {names}.")
    if not np.isfinite(state).all():
        bad = [name for name, value in zip(robot.state, state, strict=True) if not np.isfinite(value)]
        raise ValueError(f"`state` is NaN or infinite in {bad}. Check the sensors before asking for actions.")
    return state
