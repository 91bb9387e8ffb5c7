"""Meta-World 3.1.1 (Yu et al. 2019, arXiv 1910.10897): fifty tasks of a Sawyer arm, seen and named as LeRobot does.

Camera `corner2`, moved and turned upright; state = position of the hand and opening of the gripper; at most 500 steps;
an episode ends when it succeeds. Positions of objects and goals are drawn anew for each episode. LeRobot and its
dataset `lerobot/metaworld_mt50` draw with shadows and multisampling, which is ten times as slow without a GPU:
--env-options shadows=true.

Its packages pin MuJoCo 3.3.0: the extra `metaworld` without `sim`, or pi0 env install metaworld.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from pi0_jax.errors import UserError, did_you_mean
from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = "metaworld"
PACKAGES = ("metaworld==3.1.1", "packaging>=23")
SENTENCES = {
    "assembly": "Pick up a nut and place it onto a peg",
    "basketball": "Dunk the basketball into the basket",
    "bin-picking": "Grasp the puck from one bin and place it into another bin",
    "box-close": "Grasp the cover and close the box with it",
    "button-press": "Press a button",
    "button-press-topdown": "Press a button from the top",
    "button-press-topdown-wall": "Bypass a wall and press a button from the top",
    "button-press-wall": "Bypass a wall and press a button",
    "coffee-button": "Push a button on the coffee machine",
    "coffee-pull": "Pull a mug from a coffee machine",
    "coffee-push": "Push a mug under a coffee machine",
    "dial-turn": "Rotate a dial 180 degrees",
    "disassemble": "Pick a nut out of a peg",
    "door-close": "Close a door with a revolving joint",
    "door-lock": "Lock the door by rotating the lock clockwise",
    "door-open": "Open a door with a revolving joint",
    "door-unlock": "Unlock the door by rotating the lock counter-clockwise",
    "drawer-close": "Push and close a drawer",
    "drawer-open": "Open a drawer",
    "faucet-close": "Rotate the faucet clockwise",
    "faucet-open": "Rotate the faucet counter-clockwise",
    "hammer": "Hammer a screw on the wall",
    "hand-insert": "Insert the gripper into a hole",
    "handle-press": "Press a handle down",
    "handle-press-side": "Press a handle down sideways",
    "handle-pull": "Pull a handle up",
    "handle-pull-side": "Pull a handle up sideways",
    "lever-pull": "Pull a lever down 90 degrees",
    "peg-insert-side": "Insert a peg sideways",
    "peg-unplug-side": "Unplug a peg sideways",
    "pick-out-of-hole": "Pick up a puck from a hole",
    "pick-place": "Pick and place a puck to a goal",
    "pick-place-wall": "Pick a puck, bypass a wall and place the puck",
    "plate-slide": "Slide a plate into a cabinet",
    "plate-slide-back": "Get a plate from the cabinet",
    "plate-slide-back-side": "Get a plate from the cabinet sideways",
    "plate-slide-side": "Slide a plate into a cabinet sideways",
    "push": "Push the puck to a goal",
    "push-back": "Push the puck to a goal",
    "push-wall": "Bypass a wall and push a puck to a goal",
    "reach": "Reach a goal position",
    "reach-wall": "Bypass a wall and reach a goal",
    "shelf-place": "Pick and place a puck onto a shelf",
    "soccer": "Kick a soccer into the goal",
    "stick-pull": "Grasp a stick and pull a box with the stick",
    "stick-push": "Grasp a stick and push a box using the stick",
    "sweep": "Sweep a puck off the table",
    "sweep-into": "Sweep a puck into a hole",
    "window-close": "Push and close a window",
    "window-open": "Push and open a window",
}
"""Task to its instruction, by which policies know it."""
MT10 = (
    "reach",
    "push",
    "pick-place",
    "door-open",
    "drawer-open",
    "drawer-close",
    "button-press-topdown",
    "peg-insert-side",
    "window-open",
    "window-close",
)
CAMERA_POSITION = (0.75, 0.075, 0.7)
"""Where LeRobot puts the camera `corner2`, metres."""


def make(*, tasks: str = "mt10", image_size: int = 480, shadows: bool = False) -> Simulator:
    """Meta-World as a simulator.

    `tasks` is mt10, mt50, or names with commas between them, such as reach,push. `image_size` is the side of the
    images, pixels. With `shadows` they have shadows and multisampling, as LeRobot's have.
    """
    names = {"mt10": MT10, "mt50": tuple(SENTENCES)}.get(tasks) or tuple(tasks.split(","))
    for name in names:
        if name not in SENTENCES:
            known = f"expected mt10, mt50, or some of {', '.join(SENTENCES)}"
            raise UserError(f"tasks has {name!r}; {known}.{did_you_mean(name, SENTENCES)}")
    return Simulator(
        make=functools.partial(SawyerEnv, image_size=image_size, shadows=shadows),
        robot=ROBOT,
        fps=80,
        tasks=names,
        observe=lambda env, seen: {
            "images": {"base_0_rgb": env.render()},
            "state": seen[:4].astype(np.float32),
            "prompt": SENTENCES[env.task],
        },
        expert=lambda env, seen: np.clip(env.expert.get_action(seen), -1, 1),
        per_task=50,
    )


class SawyerEnv:
    """One of Meta-World's environments, whose `reset` obeys its seed; observations are its 39 numbers."""

    def __init__(self, task: str, image_size: int, shadows: bool):
        from metaworld.env_dict import ALL_V3_ENVIRONMENTS  # type: ignore[import-not-found]
        from metaworld.policies import ENV_POLICY_MAP  # type: ignore[import-not-found]

        name, size = f"{task}-v3", {"width": image_size, "height": image_size}
        self.task, self.expert = task, ENV_POLICY_MAP[name]()
        self._env: Any = ALL_V3_ENVIRONMENTS[name](render_mode="rgb_array", camera_name="corner2", **size)
        # What its benchmarks do when they set a task: the goal is observed, and each episode draws its positions.
        self._env._partially_observable = self._env._freeze_rand_vec = False
        self._env._set_task_called = self._env.seeded_rand_vec = True
        vars(self._env).pop("sawyer_observation_space", None)  # made anew, with room for the goal
        self.action_space, self.mujoco_renderer = self._env.action_space, self._env.mujoco_renderer
        model = self._env.model
        model.cam_pos[model.camera("corner2").id] = CAMERA_POSITION
        model.vis.global_.offwidth = model.vis.global_.offheight = image_size
        if not shadows:
            model.light_castshadow[:] = model.vis.quality.shadowsize = model.vis.quality.offsamples = 0

    def reset(self, *, seed: int, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        self._env.seed(seed)
        return self._env.reset()

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return self._env.step(action)

    def render(self) -> np.ndarray:
        return np.ascontiguousarray(self._env.render()[::-1, ::-1])

    def close(self) -> None:
        self._env.close()
