"""The scripted expert solves every task, and what it does is a function of the moment."""

import numpy as np
import pytest

from pi0_jax.evaluate.simulators.tabletop.expert import expert_action
from pi0_jax.evaluate.simulators.tabletop.scene import MAX_ACTION
from pi0_jax.evaluate.simulators.tabletop.tabletop import TabletopEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import TASK_SETS, TASKS, Snapshot, episode_seed


@pytest.fixture(scope="module")
def env() -> TabletopEnv:
    return TabletopEnv(lazy_images=True)


def finish(env: TabletopEnv) -> bool:
    terminated = truncated = False
    while not (terminated or truncated):
        _, _, terminated, truncated, _ = env.step(expert_action(env.task, env.snapshot()))
    return terminated


@pytest.mark.parametrize("task", sum(TASK_SETS.values(), ()), ids=lambda task: task.name)
def test_expert_solves_every_task_on_fresh_layouts(env, task):
    successes = []
    for index in range(10):
        env.reset(seed=episode_seed("evaluation", index, seed=2024), options={"task": task})
        successes.append(finish(env))
    assert all(successes)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_expert_recovers_from_wherever_random_motion_leads(env, task):
    rng = np.random.default_rng(0)
    successes = []
    for index in range(5):
        env.reset(seed=episode_seed("evaluation", index, seed=2025), options={"task": task})
        for action in rng.uniform(-MAX_ACTION, MAX_ACTION, (6, 3)):
            env.step(action)
        successes.append(finish(env))
    assert sum(successes) >= 4


def test_expert_reaches_without_moving_the_other_objects(env):
    for index in range(12):
        env.reset(seed=episode_seed("evaluation", index, seed=2026), options={"task": TASKS[index % 3]})
        before = env.snapshot().objects
        assert finish(env)
        after = env.snapshot().objects
        moved = {name: np.linalg.norm(after[name] - before[name]) for name in before if name != env.task.object}
        assert max(moved.values()) < 1e-3


def test_expert_never_exceeds_the_action_limits_and_keeps_its_direction():
    rng = np.random.default_rng(0)
    for _ in range(200):
        tool = np.array([*rng.uniform(-0.2, 0.2, 2), rng.uniform(0.06, 0.1)])
        objects = dict.fromkeys(("red block", "green puck", "blue ball"), rng.uniform(-0.17, 0.17, 2))
        now = Snapshot(tool, tool, objects, goal=rng.uniform(-0.17, 0.17, 2))
        for task in TASKS:
            action = expert_action(task, now)
            assert np.abs(action).max() <= np.float32(MAX_ACTION)
            wanted = objects[task.object] - tool[:2]
            cosine = action[:2] @ wanted / (np.linalg.norm(action[:2]) * np.linalg.norm(wanted))
            assert cosine > 0.999
