"""Policies of known behaviour are told by their chunks alone."""

import numpy as np
import pytest

from pi0_jax.data.transform import Transform, relative_actions
from pi0_jax.diagnose.findings import findings
from pi0_jax.diagnose.run import as_it_acts, examine, gripper_dims, to_robot, worst_moments
from tests.diagnose import made


def sentences(who, tasks=None, kind=None) -> list[str]:
    figures, _ = examine(who, made.chunks(tasks), tasks or made.TASKS, made.FPS)
    return [x.sentence for x in findings(figures) if kind in (None, x.kind)]


def test_a_good_policy_has_nothing_to_mend():
    found = sentences(made.policy())
    assert {"Listens to the instruction.", "Looks at the camera top.", "Uses the robot's state."} <= set(found)
    assert "Gripper closes in time." in found
    assert not sentences(made.policy(), kind="act")


def test_a_policy_that_does_not_listen_is_told():
    found = sentences(made.policy(listens=False), kind="act")
    assert "Ignores the instruction." in found
    assert "Does not predict x." in found
    assert "Hardly looks at the camera top." not in found


def test_a_policy_that_looks_at_no_camera_acts_on_the_state_alone():
    found = sentences(made.policy(looks=False), kind="act")
    assert {"Hardly looks at the camera top.", "Acts on the state alone."} <= set(found)
    assert "Ignores the instruction." not in found


@pytest.mark.parametrize(("late", "word"), [(6, "6 frames late (0.6 s)"), (-4, "4 frames early (0.4 s)")])
def test_a_gripper_that_is_not_in_time_is_told_with_frames_and_seconds(late, word):
    assert f"Gripper closes {word}." in sentences(made.policy(late=late), kind="act")


def test_a_gripper_that_never_closes_is_told():
    assert "Gripper often does not close when it should." in sentences(made.policy(late=1000), kind="act")


def test_a_policy_that_learned_nothing_uses_nothing():
    found = sentences(made.policy(learned=False), kind="act")
    assert "Predicts no better than the average action." in found
    assert {"Ignores the instruction.", "Hardly looks at the camera top.", "Ignores the robot's state."} <= set(found)


def test_a_policy_that_always_does_one_of_the_tasks_ignores_the_instruction():
    one = made.policy()

    def deaf(observation, noise, title):
        return one.sample(observation._replace(prompt=np.zeros_like(observation.prompt)), noise, title)

    found = sentences(one._replace(sample=deaf), kind="act")
    assert "Ignores the instruction." in found
    assert "Hardly looks at the camera top." not in found


def test_data_of_one_instruction_do_not_tell_whether_the_policy_listens():
    assert "Whether it uses the instruction was not tried." in sentences(made.policy(), ["left", "left"])


def test_relative_actions_come_back_from_the_states_they_refer_to():
    normalised = np.ones((2, 3, 2), np.float32)
    state = np.array([[10.0, 0.0], [20.0, 0.0]], np.float32)
    back = to_robot(relative_actions(("relative", "absolute")), normalised, {"anchor": state})
    assert back[:, :, 0].tolist() == [[11.0] * 3, [21.0] * 3]
    assert back[:, :, 1].tolist() == [[1.0] * 3] * 2


def test_worst_moments_are_of_different_episodes_and_the_worst_first():
    chunks = made.chunks()
    errors = np.random.default_rng(1).random(len(chunks.episode))
    worst = worst_moments(errors, chunks, 5)
    assert len({*chunks.episode[worst].tolist()}) == 5
    assert (np.diff(errors[worst]) <= 0).all()
    assert errors[worst[0]] == errors.max()


def test_grippers_are_known_by_meaning_or_name():
    assert gripper_dims(("a", "left_gripper", "claw"), ("absolute", "absolute", "gripper")) == [1, 2]


def test_prompts_are_those_that_the_policy_acts_by_whatever_the_demonstrations_have_written():
    seen = as_it_acts(Transform(lambda sample: sample, lambda sample: sample), True)
    assert seen.forward({"prompt": "go", "text": "first there"}) == {"prompt": "go", "asks": True}
