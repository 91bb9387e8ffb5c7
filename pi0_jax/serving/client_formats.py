"""Formats of requests: converts what clients send to a policy's raw observation.

Ours is `images` by camera, `state` and `prompt`. The names of openpi's clients depend on the robot: keys with slashes
in a flat map, states in pieces, channels first. All of these are accepted; other keys are ignored.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from pi0_jax.data.robots import Robot
from pi0_jax.errors import UserError

PREFIXES = ("observation.images.", "observation/images/", "observation/", "images/")
STATES = ("state", "observation/state", "observation.state")
REAL_TIME = ("previous", "delay")
"""Entries of an observation whose chunk is to continue the one in execution."""
MAX_PROMPT = 10_000
"""Characters; a model reads a few hundred, and a longer one would only take time."""


def read_request(request: Any, robot: Robot, prompt: str | None = None) -> dict[str, Any]:
    """The raw observation in a decoded frame, for `data.observation.check_observation` to check.

    A frame that is no map, or has no images or no state, is a UserError. `prompt` is for requests without one.
    """
    if not isinstance(request, dict):
        raise UserError(f"a request came as {type(request).__name__}; expected a map with images, state and prompt.")
    observation = {"state": _state(request, robot), "images": _images(request, robot)}
    observation |= {key: request[key] for key in REAL_TIME if key in request}
    if (subtask := request.get("subtask")) is not None:
        observation["subtask"] = str(subtask)
    prompt = request.get("prompt", prompt)
    for name, text in (("prompt", prompt), ("subtask", observation.get("subtask"))):
        if isinstance(text, (str, bytes)) and len(text) > MAX_PROMPT:
            raise UserError(f"`{name}` has {len(text)} characters; at most {MAX_PROMPT} are accepted.")
    if prompt is not None:
        observation["prompt"] = prompt.decode("utf-8", "replace") if isinstance(prompt, bytes) else prompt
    return observation


def read_seed(request: dict[str, Any]) -> tuple[int, ...] | None:
    """The noise of a request: a seed, or the two words of a JAX key's data; UserError if it is something else."""
    seed = request.get("seed")
    if seed is None:
        return None
    seed = seed.tolist() if isinstance(seed, (np.ndarray, np.generic)) else seed
    words = tuple(seed) if isinstance(seed, list) else (seed,)
    if len(words) in (1, 2) and all(type(word) is int and 0 <= word < 2**32 for word in words):
        return words
    raise UserError(f"`seed` came as {str(seed)[:80]}; expected a whole number from 0 to 2³² - 1, or two of them.")


def read_executed(request: dict[str, Any]) -> int | None:
    """Executed actions of the session's last chunk, whose rest is to be continued; UserError if it is no number."""
    executed = request.get("executed")
    if executed is None:
        return None
    if not isinstance(executed, (int, np.integer)) or executed < 0:
        raise UserError(f"`executed` came as {str(executed)[:40]}; expected how many actions of the last chunk were.")
    return int(executed)


def _images(request: dict[str, Any], robot: Robot) -> dict[Any, Any]:
    names = {feature.rpartition(".")[2]: camera for feature, camera in robot.cameras.items()}
    names |= {**robot.clients.cameras} | {camera: camera for camera in robot.cameras.values()}
    nested = request.get("images")
    if nested is not None and not isinstance(nested, dict):
        raise UserError(f"`images` came as {type(nested).__name__}; expected a map by camera.")
    images = {str(name): image for name, image in (nested or {}).items()}
    for key, image in request.items():
        short = next((key.removeprefix(p) for p in PREFIXES if isinstance(key, str) and key.startswith(p)), "")
        if short in names:
            images[short] = image
    if nested is None and not images and robot.cameras:
        keys = sorted(str(key) for key in request if key not in ("state", "prompt"))[:20]
        raise UserError(
            f"a request has no picture of {robot.name}'s cameras; it has {keys}. Send `images` with "
            f"{list(robot.cameras.values())}, or openpi's {[f'observation/{name}' for name in names]}."
        )
    for name in robot.clients.unused_cameras:
        images.pop(name, None)
    return {names.get(name, name): _channels_last(image) for name, image in images.items()}


def _channels_last(image: Any) -> Any:
    image = np.asarray(image)
    return np.moveaxis(image, 0, -1) if image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3 else image


def _state(request: dict[str, Any], robot: Robot) -> Any:
    for key in STATES:
        if key in request:
            return request[key]
    pieces = [np.atleast_1d(np.asarray(request[key], np.float32)) for key in robot.clients.state if key in request]
    if pieces and len(pieces) == len(robot.clients.state):
        return np.concatenate(pieces)
    raise UserError(
        f"a request lacks the state; it has {sorted(map(str, request))[:20]}. Send `state` (or `observation/state`): "
        f"{', '.join(robot.state)}."
    )
