"""Tasks and seeds, without a simulator."""

import itertools
import subprocess
import sys

import numpy as np
import pytest

from pi0_jax.evaluate.simulators.tabletop import tasks
from pi0_jax.evaluate.simulators.tabletop.tasks import (
    OBJECTS,
    TASK_SETS,
    TASKS,
    Snapshot,
    Task,
    episode_seed,
    find_task,
    is_done,
)


def snapshot(tool=(0.0, 0.0, 0.1), block=(0.1, 0.1)) -> Snapshot:
    objects = dict.fromkeys(OBJECTS, np.array([-0.1, -0.1])) | {"red block": np.array(block)}
    return Snapshot(np.array(tool), np.array(tool), objects, goal=np.array([0.1, -0.1]))


def test_there_are_six_tasks_with_distinct_names_and_phrasings():
    assert len(TASKS) == 6
    assert len({task.name for task in TASKS}) == 6
    prompts = [prompt for task in TASKS for prompt in task.prompts]
    assert len(set(prompts)) == len(prompts)
    assert all(len(task.prompts) >= 4 for task in TASKS)


def test_no_instruction_tells_left_from_right():
    sided = {"left", "right", "above", "below", "top", "bottom", "upper", "lower-left", "clockwise", "near", "far"}
    assert not sided & {word for task in TASKS for prompt in task.prompts for word in prompt.split()}


def test_every_instruction_names_its_object():
    assert all(task.object in prompt for task in TASKS for prompt in task.prompts)


def test_tasks_are_found_by_name_and_others_are_listed():
    assert all(find_task(task.name) is task for group in TASK_SETS.values() for task in group)
    with pytest.raises(ValueError, match=r"'juggle'.*reach_red_block"):
        find_task("juggle")


def test_seed_ranges_of_the_splits_never_overlap():
    last = tasks.SEEDS_PER_SPLIT - 1, tasks.EPISODES_PER_SEED - 1
    ranges = [(episode_seed(split, 0, 0), episode_seed(split, last[1], last[0])) for split in tasks.SPLITS]
    assert all(a[1] < b[0] for a, b in itertools.pairwise(ranges))


def test_every_user_seed_gives_other_episodes():
    seeds = [episode_seed("evaluation", index, seed) for seed in (0, 1, 999_999) for index in range(1000)]
    assert len(set(seeds)) == len(seeds)


@pytest.mark.parametrize("arguments", [("test", 0, 0), ("train", -1, 0), ("train", 1_000_000, 0), ("train", 0, 10**6)])
def test_seeds_outside_the_ranges_are_refused(arguments):
    with pytest.raises(ValueError, match="expected"):
        episode_seed(*arguments)


def test_reach_needs_the_ring_down_and_around_the_object():
    reach = Task("reach", "red block")
    assert is_done(reach, snapshot(tool=(0.1, 0.13, 0.01)))
    assert not is_done(reach, snapshot(tool=(0.1, 0.13, 0.05)))
    assert not is_done(reach, snapshot(tool=(0.1, 0.15, 0.01)))


def test_push_needs_the_object_over_the_circle_wherever_the_ring_is():
    push = Task("push", "red block")
    assert is_done(push, snapshot(block=(0.1, -0.05)))
    assert not is_done(push, snapshot(block=(0.1, -0.03)))


def test_the_centre_needs_the_object_there_and_the_ring_down_around_it():
    centre = find_task("centre_red_block")
    assert is_done(centre, snapshot(tool=(0.03, 0.0, 0.01), block=(0.05, 0.02)))
    assert not is_done(centre, snapshot(tool=(0.03, 0.0, 0.06), block=(0.05, 0.02)))
    assert not is_done(centre, snapshot(tool=(0.05, 0.05, 0.01), block=(0.05, 0.05)))


def test_scoring_looks_at_the_named_object_only():
    done = {task.name for task in TASKS if is_done(task, snapshot(tool=(0.1, -0.1, 0.005), block=(0.1, -0.1)))}
    assert done == {"reach_red_block", "push_red_block"}


def test_tasks_need_neither_mujoco_nor_jax():
    code = "import sys; from pi0_jax.evaluate.simulators.tabletop.tasks import TASKS;"
    code += "print([m for m in ('mujoco', 'jax') if m in sys.modules])"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
