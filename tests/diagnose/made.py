"""A made world whose actions follow from instruction, picture and state, and policies that see some of these."""

from __future__ import annotations

import numpy as np

from pi0_jax.batch import Observation
from pi0_jax.data.robots import Robot
from pi0_jax.data.transform import Transform
from pi0_jax.diagnose.frames import Chunks
from pi0_jax.diagnose.run import Subject
from tests.conftest import tiny_config

TASKS = ["left", "right"]
EPISODES, LENGTH, EVERY, HORIZON, FPS = 8, 60, 5, 10, 10.0
CLOSES = 30
"""Frame at which the gripper closes, give or take one."""
MODEL = tiny_config(cameras=("top",), action_dim=3, action_horizon=HORIZON)
ROBOT = Robot(
    name="made",
    cameras={"top": "top"},
    state=("time",),
    actions=("x", "y", "gripper"),
    fps=FPS,
    image_size=(2, 2),
    semantics=("absolute", "absolute", "gripper"),
)


def forward(sample):
    prompt = np.array([[TASKS.index(task)] for task in sample["prompt"]])
    return sample | {"prompt": prompt, "prompt_mask": np.ones(prompt.shape, bool)}


TRANSFORM = Transform(forward, lambda sample: sample)


def chunks(tasks: list[str] | None = None) -> Chunks:
    """The instruction says where x is; the picture, of another brightness in each frame, where y is; and the state has
    the time, at which the gripper closes."""
    rng = np.random.default_rng(0)
    episode, step = (x.ravel() for x in np.mgrid[:EPISODES, : LENGTH // EVERY])
    step = step * EVERY
    task = episode % 2
    light = rng.integers(0, 256, (EPISODES, LENGTH + HORIZON))
    closes = CLOSES + rng.integers(-1, 2, EPISODES)
    times = step[:, None] + np.arange(HORIZON)
    expert = np.stack(
        [
            np.broadcast_to(2.0 * task[:, None] - 1, times.shape),
            np.broadcast_to(light[episode, step][:, None] / 128.0 - 1, times.shape),
            np.where(times >= closes[episode][:, None], 1.0, -1.0),
        ],
        axis=-1,
    ).astype(np.float32)
    pictures = np.broadcast_to(light[episode, step][:, None, None, None], (len(step), 2, 2, 3)).astype(np.uint8)
    prompts = np.array(TASKS if tasks is None else tasks, object)[task]
    state = (step - closes[episode] + CLOSES).astype(np.float32)[:, None]
    observation = Observation(
        {"top": pictures}, {"top": np.ones(len(step), bool)}, state, task[:, None], np.ones((len(step), 1), bool)
    )
    return Chunks(
        observation=observation,
        state=state,
        prompts=prompts,
        anchors={},
        expert=expert,
        valid=times < LENGTH,
        episode=episode,
        step=step,
        lengths=np.full(EPISODES, LENGTH),
        names=[f"episode {e}" for e in range(EPISODES)],
        every=EVERY,
    )


def policy(*, listens: bool = True, looks: bool = True, late: int = 0, learned: bool = True):
    """A policy that does what the demonstrations do, but for what is left out, and some noise."""

    def sample(observation: Observation, noise: np.ndarray, title: str) -> np.ndarray:
        count = len(noise)
        x = 2.0 * observation.prompt[:, 0] - 1 if listens else np.zeros(count)
        y = observation.images["top"].mean((1, 2, 3)) / 128 - 1 if looks else np.zeros(count)
        times = observation.state[:, :1] + np.arange(HORIZON)
        gripper = np.where(times >= CLOSES + late, 1.0, -1.0)
        both = np.stack([np.broadcast_to(v[:, None], times.shape) for v in (x, y)], -1)
        actions = np.concatenate([both, gripper[..., None]], -1) * (1.0 if learned else 0.0)
        return (actions + 0.05 * noise).astype(np.float32)

    return Subject(sample, TRANSFORM, MODEL, ROBOT, ROBOT.semantics, EVERY, sees_state=True)
