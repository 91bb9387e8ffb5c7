"""What the tabletop's tasks with a scene of their own share: one task, its phrasings, and a layout."""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

import functools
from typing import Any, ClassVar

import mujoco
import numpy as np

from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.tabletop import scene
from pi0_jax.evaluate.simulators.tabletop.gantry import GantryEnv


@functools.cache
def load_scene(things: str) -> mujoco.MjModel:
    """The compiled scene with these things on the table. Nothing changes it."""
    return mujoco.MjModel.from_xml_string(scene.build_xml(things))


class SingleTaskEnv(GantryEnv):
    """An environment of one task. `info` holds `task`, `success`, `failed` (for good) and `mode`."""

    name: str
    """The task's name."""
    prompts: tuple[str, ...]
    """Phrasings of the instruction. None says left or right, since training mirrors the scene."""
    things: ClassVar[str]
    """What is on the table, in MuJoCo's XML: mocap bodies, in the order in which `_layout` places them."""

    def __init__(self, image_size: int = 48, lazy_images: bool = False):
        super().__init__(load_scene(self.things), None, image_size, lazy_images=lazy_images)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Starts an episode; everything but the actions depends on `seed` alone. `options` may hold `prompt`."""
        super().reset(seed=seed)
        options = options or {}
        if unknown := set(options) - {"prompt"}:
            raise UserError(f'reset got the options {sorted(unknown)}; it knows "prompt".')
        start = self._layout(self.np_random)
        prompt = self.prompts[self.np_random.integers(len(self.prompts))]
        self._begin(start, options.get("prompt", prompt))
        self._place()
        self.success = self.failed = False
        mujoco.mj_forward(self._model, self._data)
        return self._observation(), self._info()

    def expert(self) -> np.ndarray:
        """The scripted expert's action, metres, float32[3], each within `MAX_ACTION`."""
        raise NotImplementedError

    @property
    def mode(self) -> str | None:
        """Which of several right ways the ring has taken by now; None: none yet, or there is but one."""
        return None

    def _layout(self, rng: np.random.Generator) -> np.ndarray:
        """Draws where things are, and returns where the ring starts, `[3]`."""
        raise NotImplementedError

    def _positions(self) -> list[np.ndarray]:
        """Where the mocap bodies are now, x and y."""
        raise NotImplementedError

    def _judge(self) -> None:
        """Sets `success` and `failed` after a control step."""
        raise NotImplementedError

    def _action(self, move: np.ndarray, height: float) -> np.ndarray:
        """An action of a horizontal move, made shorter where it is too long, that also leads to `height`, metres."""
        lift = np.clip(height - self._data.ctrl[2], -scene.MAX_ACTION, scene.MAX_ACTION)
        return np.array([*shortened(move), lift], np.float32)

    def _place(self) -> None:
        self._data.mocap_pos[:, :2] = self._positions()

    def _info(self) -> dict[str, Any]:
        if self._steps:
            self._judge()
        return {"task": self.name, "success": self.success, "failed": self.failed, "mode": self.mode}

    @property
    def _tool(self) -> np.ndarray:
        return self._data.qpos[:3]


def shortened(move: np.ndarray) -> np.ndarray:
    """A horizontal move, made shorter as a whole to be within the limits: clipping each axis would bend the path."""
    return move * min(1.0, scene.MAX_ACTION / max(float(np.abs(move).max()), 1e-9))
