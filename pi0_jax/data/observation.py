"""Raw observations, as users and robots send them: what is wrong with one is said before it reaches the model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from pi0_jax.data.robots import Robot
from pi0_jax.data.transform import Sample
from pi0_jax.errors import UserError, did_you_mean


def check_observation(raw: Mapping[str, Any], robot: Robot) -> Sample:
    """Checks a raw observation that a user or a robot sent, and brings it into form.

    Returns:
        The same with uint8 images (floats as openpi converts them, 255 times and cut), a float32 state, and `previous`
        only where an action remains.

    Raises:
        UserError: something is missing, unknown, or of wrong shape, type or value.
    """
    if missing := {"images", "state", "prompt"} - set(raw):
        raise UserError(f"the observation lacks {sorted(missing)}; it has {sorted(raw)}.")
    cameras = tuple(robot.cameras.values())
    images = raw["images"]
    if not isinstance(images, dict):
        raise UserError(f"`images` came as {type(images).__name__}; expected a dict by camera, of {list(cameras)}.")
    if missing := [camera for camera in cameras if camera not in images]:
        unknown = [name for name in images if name not in cameras]
        hints = "".join(did_you_mean(name, missing, 0.4) for name in unknown)
        raise UserError(
            f"the observation lacks cameras {missing}; it has {sorted(map(str, images))}. "
            f"{robot.name} has {list(cameras)}.{hints}"
        )
    if unknown := [name for name in images if name not in cameras]:
        raise UserError(f"the observation has cameras {unknown} that {robot.name} has not; it has {list(cameras)}.")
    prompt = raw["prompt"]
    prompt = prompt.item() if isinstance(prompt, np.ndarray) and prompt.ndim == 0 else prompt
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"`prompt` came as {prompt!r}; expected the instruction, a string that is not empty.")
    sample: Sample = {
        "images": {camera: _check_image(images[camera], camera) for camera in cameras},
        "state": _check_state(raw["state"], robot),
        "prompt": prompt,
    }
    if (subtask := raw.get("subtask")) is not None:
        if not isinstance(subtask, str):
            raise UserError(f"`subtask` came as {subtask!r}; expected a string, empty for none.")
        sample["text"] = subtask.strip()
    return sample | _check_previous(raw, robot)


def _check_previous(raw: Mapping[str, Any], robot: Robot) -> Sample:
    if raw.get("previous") is None:
        return {}
    try:
        actions, delay = np.asarray(raw["previous"], np.float32), int(raw.get("delay", 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"`previous` or `delay` is no number: {error}.") from error
    if actions.ndim != 2 or actions.shape[1] != len(robot.actions):
        raise UserError(
            f"`previous` has shape {actions.shape}; expected (steps, {len(robot.actions)}): {', '.join(robot.actions)}."
        )
    if not np.isfinite(actions).all():
        raise UserError("`previous` is NaN or infinite in places; send what remains of the last chunk as it came.")
    if delay < 0:
        raise UserError(f"`delay` is {delay}; expected the number of `previous` actions that will be executed.")
    return {"previous": actions, "delay": delay} if len(actions) else {}


def _check_image(image: Any, camera: str) -> UInt8[np.ndarray, "h w 3"]:
    image = np.asarray(image)
    if image.ndim != 3 or image.shape[-1] != 3 or 0 in image.shape:
        first = image.ndim == 3 and image.shape[0] == 3
        hint = " Move the channels to the end: np.moveaxis(image, 0, -1)." if first else ""
        raise UserError(f"camera {camera!r} has shape {image.shape}; expected (height, width, 3).{hint}")
    if image.dtype == np.uint8:
        return image
    if image.dtype.kind != "f":
        raise UserError(f"camera {camera!r} is of type {image.dtype}; expected uint8, or float in [0, 1].")
    if not (image.min() >= 0 and image.max() <= 1):  # false for NaN
        raise UserError(
            f"camera {camera!r} is of type {image.dtype} with values {image.min()} to {image.max()}; floats are "
            "expected in [0, 1]. Send uint8 for values up to 255."
        )
    return (255 * image).astype(np.uint8)


def _check_state(state: Any, robot: Robot) -> np.ndarray:
    names = ", ".join(robot.state)
    try:
        state = np.asarray(state, np.float32)
    except (TypeError, ValueError) as error:
        raise UserError(f"`state` came as {state!r}; expected {len(robot.state)} numbers: {names}.") from error
    if state.shape != (len(robot.state),):
        raise UserError(f"`state` has shape {state.shape}; expected {(len(robot.state),)}: {names}.")
    if not np.isfinite(state).all():
        bad = [name for name, value in zip(robot.state, state, strict=True) if not np.isfinite(value)]
        raise UserError(f"`state` is NaN or infinite in {bad}. Check the sensors before asking for actions.")
    return state
