"""Tasks of two stages: the expert solves them, what is not asked for fails, and recordings have subtasks."""

import json

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig
from pi0_jax.data.mixture import open_dataset
from pi0_jax.data.pairs import PairsDataset
from pi0_jax.data.robots import get_robot
from pi0_jax.data.source import text_of
from pi0_jax.errors import UserError
from pi0_jax.evaluate.record import Source, record, record_questions
from pi0_jax.evaluate.simulators import get_simulator
from pi0_jax.evaluate.simulators.tabletop.stages import TASKS, StagesEnv
from pi0_jax.evaluate.simulators.tabletop.tasks import episode_seed
from tests.conftest import tiny_config


def run(env: StagesEnv, index: int, act) -> dict:
    """The last `info` of an episode of a task, in turn, in which `act(env)` acts."""
    seed = episode_seed("evaluation", index, seed=2024)
    env.reset(seed=seed, options={"task": [*TASKS][index % len(TASKS)]})
    while True:
        _, _, terminated, truncated, info = env.step(act(env))
        if terminated or truncated:
            return info


def test_the_expert_succeeds_in_every_task():
    env = StagesEnv(lazy_images=True)
    ends = [run(env, index, StagesEnv.expert) for index in range(60)]
    assert all(end["success"] for end in ends)
    assert {end["task"] for end in ends} == set(TASKS)


def test_who_ignores_the_instruction_succeeds_in_a_third():
    def nearest(env):
        asked, env.wanted = env.wanted, [*env.objects]
        action = env.expert()
        env.wanted = asked
        return action

    env = StagesEnv(lazy_images=True)
    ends = [run(env, index, nearest) for index in range(60)]
    assert 8 <= sum(end["success"] for end in ends) <= 32
    assert all(end["success"] or end["failed"] for end in ends)


def test_objects_are_taken_at_rest_alone_and_are_gone():
    env = StagesEnv(image_size=24)
    env.reset(seed=3, options={"task": "take_green_puck_and_blue_ball"})
    ball = env.objects["blue ball"]
    env._before, env._data.qpos[:2] = ball - [0.03, 0], ball
    env._judge()
    assert "blue ball" in env.objects  # it was passed
    assert (env.observe()["images"]["tool"][..., 2] > 150).any()
    env._judge()
    assert (sorted(env.objects), env.wanted, env.failed) == (["green puck", "red block"], ["green puck"], False)
    assert env.subtask == "take the green puck"
    assert not (env.observe()["images"]["tool"][..., 2] > 150).any()
    env._before = env._data.qpos[:2] = env.objects["red block"]
    env._judge()
    assert (env.failed, env.success) == (True, False)


def test_gymnasium_finds_no_fault_and_unknown_tasks_are_refused():
    check_env(StagesEnv(image_size=8), skip_render_check=True)
    with pytest.raises(
        UserError, match=r"no task is named 'fly'; the tasks are take_red_block, .*take_green_puck_and_blue_ball"
    ):
        StagesEnv(image_size=8).reset(options={"task": "fly"})


def test_recordings_have_subtasks_to_write(tmp_path):
    record(tmp_path / "demos", Source("tabletop_stages", options=(("image_size", 8),)), 6, workers=1)
    policy = PolicyConfig(robot="tabletop", model=tiny_config())
    source = open_dataset(DatasetConfig(str(tmp_path / "demos"), prompt_from="predict"), DataConfig(), policy).source
    for episode, wanted in enumerate(TASKS.values()):
        begin, end = source.episode_range(episode)
        texts = list(dict.fromkeys(text_of(source.task(row)) for row in range(begin, end)))
        assert sorted(texts) == sorted(f"take the {name}" for name in wanted)
        assert all(name in source.task(begin) for name in wanted)


def test_questions_are_pairs_whose_answers_are_places_in_the_picture(tmp_path):
    asked = Source("tabletop_stages", seed=5, options=(("image_size", 40),))
    assert record_questions(tmp_path / "questions", asked, 4) == 12
    pairs = PairsDataset(tmp_path / "questions", get_robot("tabletop"), 40)
    assert pairs.num_frames == 12
    for row in range(12):
        color = ("red block", "green puck", "blue ball").index(pairs.task(row).removeprefix("where is the ")[:-1])
        across, down = (int(0.4 * int(number)) for number in text_of(pairs.task(row)).split())
        pixel = pairs.images("image", np.array([row]))[0, down, across].astype(int)
        assert pixel.argmax() == color
    with pytest.raises(UserError, match="asks no questions"):
        record_questions(tmp_path / "none", Source("tabletop_detour"), 2)
    with pytest.raises(FileExistsError):
        record_questions(tmp_path / "questions", asked, 2)
    assert len(json.loads((tmp_path / "questions" / "questions.jsonl").read_text().splitlines()[0])) == 3


def test_episodes_tell_their_subtask_where_there_are_some():
    simulator = get_simulator("tabletop_stages", image_size=8)
    assert simulator.start(3, 0).subtask() in {"take the green puck", "take the blue ball"}
    assert get_simulator("tabletop_detour", image_size=8).start(0, 0).subtask() is None
