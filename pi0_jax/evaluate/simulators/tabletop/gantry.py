"""The robot of all tabletop environments: a ring on a gantry, two cameras, an English instruction."""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

import string
from typing import Any

import gymnasium
import mujoco
import numpy as np

from pi0_jax.data.raw import RawObservation
from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.render import draw

CAMERAS = ("top", "tool")
MAX_STEPS = 40
MAX_PROMPT_LENGTH = 256
PROMPTS = gymnasium.spaces.Text(MAX_PROMPT_LENGTH, charset=string.printable)
SUBSTEPS = round(1 / (scene.CONTROL_HZ * scene.PHYSICS_STEP))


class GantryEnv(gymnasium.Env):
    """A ring on a gantry over a table; subclasses put things on it, and say what to do with them.

    Observation, the policy's raw input:
        images: {"top": the whole table, "tool": the ring's surroundings}, uint8[image_size, image_size, 3], both
            straight down with +x to the right and +y up. Absent while `lazy_images` is on.
        state: float32[6], the ring's position (x, y, z) and its commanded position (x, y, z), metres.
        prompt: the instruction.

    Action: float32[3], change of the commanded position in metres, clipped to ±0.04 on each axis; five a second.

    An episode terminates when its task is done, with reward 1 for that step and 0 before, or has failed for good
    (`failed` in `info`), and is truncated after `MAX_STEPS`.

    Args:
        model: the scene; nothing changes it.
        render_mode: "rgb_array" or None.
        image_size: side of the observed images, pixels.
        render_size: side of the image that `render` draws, pixels.
        lazy_images: `reset` and `step` leave the images out, and `observe` draws them when the policy asks. A policy
            that executes four actions of a chunk then pays for one observation in four.

    Environments share nothing that changes, and physics and rays run without Python's lock: step many in threads.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": scene.CONTROL_HZ}  # noqa: RUF012

    def __init__(
        self,
        model: mujoco.MjModel,
        render_mode: str | None = None,
        image_size: int = 48,
        render_size: int = 256,
        lazy_images: bool = False,
    ):
        if render_mode not in (None, "rgb_array"):
            raise UserError(f'render_mode is {render_mode!r}; expected "rgb_array" or None.')
        self.render_mode = render_mode
        self.image_size, self.render_size, self.lazy_images = image_size, render_size, lazy_images
        image = gymnasium.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        spaces = {
            "state": gymnasium.spaces.Box(-1.0, 1.0, (6,), np.float32),
            "prompt": PROMPTS,
        }
        if not lazy_images:
            spaces["images"] = gymnasium.spaces.Dict({camera: image for camera in CAMERAS})
        self.observation_space = gymnasium.spaces.Dict(spaces)
        self.action_space = gymnasium.spaces.Box(-scene.MAX_ACTION, scene.MAX_ACTION, (3,), np.float32)
        self._model = model
        self._data = mujoco.MjData(model)
        self.prompt = ""
        self._steps = 0

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        """Moves the command by `action` (float[3], metres, clipped to ±0.04) and simulates a fifth of a second.

        Raises:
            UserError: if `action` is not three finite numbers.
        """
        change = np.asarray(action, np.float64)
        if change.shape != (3,) or not np.isfinite(change).all():
            raise UserError(
                f"action is {action!r}; expected three finite numbers, metres. Pass one row of a chunk at a time."
            )
        change = np.clip(change, -scene.MAX_ACTION, scene.MAX_ACTION)
        self._data.ctrl[:] = np.clip(self._data.ctrl + change, scene.COMMAND_LOW, scene.COMMAND_HIGH)
        self._move()
        mujoco.mj_step(self._model, self._data, SUBSTEPS)
        mujoco.mj_kinematics(self._model, self._data)  # mj_step leaves poses one substep old
        mujoco.mj_camlight(self._model, self._data)
        self._steps += 1
        info = self._info()
        success = info["success"]
        over = success or info.get("failed", False)
        return self._observation(), float(success), over, self._steps >= MAX_STEPS and not over, info

    def observe(self) -> RawObservation:
        """The full observation of this moment, images included, whatever `lazy_images` says."""
        images = {camera: draw(self._model, self._data, camera, self.image_size) for camera in CAMERAS}
        return RawObservation(images=images, state=self._state(), prompt=self.prompt)

    def render(self) -> np.ndarray | None:
        """A picture from the table's front, uint8[render_size, render_size, 3]; None without a render mode."""
        if self.render_mode is None:
            return None
        return self.draw_view("view", self.render_size)

    def draw_view(self, camera: str = "view", size: int = 256) -> np.ndarray:
        """A smooth picture for people, uint8[size, size, 3]: camera "top", "tool", or "view" from the front."""
        lamp = (-0.3, -0.5, 1.0) if camera == "view" else (0.0, 0.0, 1.0)
        return draw(self._model, self._data, camera, size, lamp=lamp, oversample=3)

    def _begin(self, start: np.ndarray, prompt: str) -> None:
        """Resets the physics, with the ring at `start`; `mj_forward` has to follow when the things are placed."""
        if prompt not in PROMPTS:
            raise UserError(
                f"prompt is {prompt!r}; expected 1 to {MAX_PROMPT_LENGTH} printable ASCII characters: shorten or "
                "transliterate it."
            )
        self.prompt = prompt
        self._steps = 0
        mujoco.mj_resetData(self._model, self._data)
        self._data.ctrl[:] = self._data.qpos[:3] = start

    def _move(self) -> None:
        """Moves what moves by itself, by one control step."""

    def _info(self) -> dict[str, Any]:
        """What `reset` and `step` tell besides the observation: at least `success`."""
        raise NotImplementedError

    def _state(self) -> np.ndarray:
        return np.concatenate([self._data.qpos[:3], self._data.ctrl]).astype(np.float32)

    def _observation(self) -> dict[str, Any]:
        return {"state": self._state(), "prompt": self.prompt} if self.lazy_images else {**self.observe()}
