"""What is taken away is taken away, and nothing else."""

import numpy as np

from pi0_jax.diagnose.ablations import ablations, shuffled, swapped, why_not
from tests.diagnose import made


def of(chunks, tasks=made.TASKS, sees_state=True):
    found = ablations(chunks, made.TRANSFORM, tasks, sees_state=sees_state, rng=np.random.default_rng(0))
    return {(each.name, each.how.split()[0]): each.observation for each in found}


def test_each_thing_is_taken_alone():
    chunks = made.chunks()
    seen, found = chunks.observation, of(chunks)
    assert list(found) == [("instruction", "another"), ("top", "black"), ("top", "frozen"), ("state", "that")]
    np.testing.assert_array_equal(found["instruction", "another"].prompt, 1 - seen.prompt)
    np.testing.assert_array_equal(found["instruction", "another"].state, seen.state)
    assert found["top", "black"].images["top"].max() == 0
    frozen = found["top", "frozen"].images["top"]
    first = chunks.step == 0
    np.testing.assert_array_equal(frozen, seen.images["top"][first][chunks.episode])
    np.testing.assert_array_equal(found["top", "frozen"].prompt, seen.prompt)
    np.testing.assert_array_equal(found["state", "that"].prompt, seen.prompt)
    assert (found["state", "that"].state != seen.state).any()


def test_prompts_are_swapped_per_episode_and_never_for_their_own():
    chunks = made.chunks()
    tasks = [*made.TASKS, "up", "down", "left of it"]
    prompts = swapped(chunks, tasks, np.random.default_rng(0))
    assert not (prompts == chunks.prompts).any()
    assert all(len({*prompts[chunks.episode == e].tolist()}) == 1 for e in range(made.EPISODES))
    assert len({*prompts.tolist()}) > 2


def test_states_come_from_other_episodes():
    chunks = made.chunks()
    rows = shuffled(chunks.episode, np.random.default_rng(0))
    assert (chunks.episode[rows] != chunks.episode).all()


def test_what_is_not_there_is_not_taken_and_said():
    chunks = made.chunks()
    bare = chunks._replace(observation=chunks.observation._replace(images={}, image_masks={}))
    assert of(bare, ["", " "], sees_state=False) == {}
    reasons = why_not(bare, ["", " "], sees_state=False)
    assert set(reasons) == {"instruction", "camera", "state"}
    assert reasons["instruction"] == "the data have no instructions"
    assert why_not(chunks, ["left", "left"], sees_state=True) == {"instruction": "the data have one instruction alone"}
    assert why_not(chunks, made.TASKS, sees_state=True) == {}


def test_absent_cameras_are_not_taken():
    chunks = made.chunks()
    absent = chunks.observation._replace(image_masks={"top": np.zeros(len(chunks.episode), bool)})
    assert ("top", "black") not in of(chunks._replace(observation=absent))
