"""Sentences follow from figures and thresholds, and nothing else."""

import dataclasses

import pytest

from pi0_jax.diagnose.figures import Dimension, Figures, Interval, Nearness, Roughness, Switches, Use
from pi0_jax.diagnose.findings import THRESHOLDS, findings


def use(kind: str, name: str, value: float, low: float, high: float, how: str = "black") -> Use:
    return Use(kind, name, how, 0.2 * (1 + value), Interval(value, low, high), change=value)


GOOD = Figures(
    episodes=20,
    chunks=200,
    every=4,
    execute_steps=4,
    fps=10.0,
    error=0.2,
    average_error=1.0,
    training_error=0.19,
    dimensions=[Dimension("x", 0.1, 0.96), Dimension("locked", 0.0, None)],
    horizon=[0.15, 0.16, 0.18, 0.2, 0.25, 0.4],
    phases=[0.2, 0.2, 0.21],
    roughness=Roughness(1.1, 1.2),
    switches=[Switches("gripper", "closes", 20, 20, 20, Interval(0.0, -1.0, 1.0))],
    uses=[
        use("instruction", "instruction", 0.8, 0.5, 1.1),
        use("camera", "wrist", 0.01, -0.01, 0.1),
        use("camera", "wrist", 0.5, 0.3, 0.7, "frozen"),
        use("state", "state", 0.4, 0.2, 0.6),
    ],
    not_tried={},
    nearness=Nearness(1000, 1.1, 0.1),
    attention=None,
)


def told(kind: str | None = None, **changes) -> list[str]:
    found = findings(dataclasses.replace(GOOD, **changes))
    assert all(x.figure for x in found)
    assert all(x.advice for x in found if x.kind == "act")
    return [x.sentence for x in found if kind in (None, x.kind)]


def test_good_figures_give_good_sentences_alone():
    assert told("act") == told("unclear") == []
    assert told("good") == [
        "Explains 96% of the variance of held-out actions.",
        "Listens to the instruction.",
        "Looks at the camera wrist.",
        "Uses the robot's state.",
        "Gripper closes in time.",
        "Moves as smoothly as the demonstrations.",
    ]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"error": 0.97}, "Predicts no better than the average action."),
        ({"training_error": 0.1}, "Memorises the training episodes: 2.0 times the error elsewhere."),
        (
            {"dimensions": [Dimension("x", 1.0, 0.9), Dimension("y", 1.0, 0.0), Dimension("z", 1.0, -1.0)]},
            "Does not predict y and z.",
        ),
        ({"uses": [use("instruction", "instruction", 0.0, -0.01, 0.02)]}, "Ignores the instruction."),
        ({"uses": [use("camera", "wrist", 0.0, -0.01, 0.02)] * 2}, "Hardly looks at the camera wrist."),
        ({"uses": [use("state", "state", 0.0, -0.01, 0.02)]}, "Ignores the robot's state."),
        (
            {"uses": [dataclasses.replace(use("camera", "wrist", 0.0, -0.01, 0.02), change=1.0)]},
            "Reacts to the camera wrist, and is no better for it.",
        ),
        (
            {"uses": [use("camera", "a", 0.0, -0.01, 0.02), use("state", "state", 1.0, 0.5, 2.0)]},
            "Acts on the state alone.",
        ),
        (
            {"switches": [Switches("gripper", "closes", 20, 18, 20, Interval(6.0, 5.0, 7.0))]},
            "Gripper closes 6 frames late (0.6 s).",
        ),
        (
            {"switches": [Switches("claw", "opens", 20, 18, 20, Interval(-3.0, -4.0, -2.0))]},
            "Gripper claw opens 3 frames early (0.3 s).",
        ),
        (
            {"switches": [Switches("left_gripper", "closes", 20, 8, 20, None)]},
            "Left_gripper often does not close when it should.",
        ),
        ({"switches": [Switches("gripper", "opens", 20, 20, 50, Interval(0.0, -1.0, 1.0))]}, "Gripper chatters."),
        ({"execute_steps": 6}, "Executes steps that are much worse than the first: 6, and 5 are good."),
        ({"phases": [0.1, 0.1, 0.4]}, "Is worst at the end of the episodes."),
        ({"phases": [0.4, None, 0.1]}, "Is worst at the start of the episodes."),
        ({"roughness": Roughness(2.0, 1.0)}, "Chunks shake."),
        ({"roughness": Roughness(None, 3.0)}, "Jumps where a new chunk begins."),
        ({"nearness": Nearness(1000, 2.0, 0.0)}, "The held-out scenes are unlike those of training."),
        ({"nearness": Nearness(1000, 1.0, 0.7)}, "Errs where pictures are unlike any training frame."),
    ],
)
def test_each_fault_has_its_sentence(changes, sentence):
    assert sentence in told("act", **changes)


def test_what_intervals_leave_open_is_said_to_be_open():
    open_ = [use("instruction", "instruction", 0.1, -0.2, 0.4)]
    assert told("unclear", uses=open_) == ["May or may not use the instruction."]
    few = told("unclear", uses=GOOD.uses, episodes=THRESHOLDS.episodes - 1)
    assert "May or may not use the camera wrist." in few


def test_one_way_in_which_a_camera_is_missed_is_enough():
    assert "Looks at the camera wrist." in told("good")
    frozen = [use("camera", "wrist", 0.0, -0.01, 0.02), use("camera", "wrist", 0.06, -0.1, 0.3, "frozen")]
    assert told("unclear", uses=frozen) == ["May or may not use the camera wrist."]


def test_a_delay_that_may_be_none_is_not_told():
    wide = [Switches("gripper", "closes", 20, 20, 20, Interval(3.0, -2.0, 8.0))]
    assert not [x for x in told(switches=wide) if "closes" in x]


def test_few_episodes_say_nothing_of_where_errors_are():
    assert not told("act", nearness=Nearness(1000, 1.0, 0.9), episodes=THRESHOLDS.episodes - 1)


def test_what_could_not_be_tried_is_said():
    assert told("unclear", not_tried={"camera": "the policy has no camera"}) == [
        "Whether it uses the camera was not tried."
    ]


def test_missing_figures_are_passed_over():
    nothing = {"training_error": None, "nearness": None, "roughness": Roughness(None, None), "switches": [], "uses": []}
    assert told(**nothing, horizon=[], phases=[None, None, None]) == [
        "Explains 96% of the variance of held-out actions."
    ]
