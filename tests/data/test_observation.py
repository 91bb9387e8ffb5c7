"""Raw observations: good ones pass in all forms, bad ones are refused and say why."""

import numpy as np
import pytest

from pi0_jax.data.observation import check_observation
from pi0_jax.data.robots import get_robot

ROBOT = get_robot("tabletop")


def test_valid_observation_passes_in_all_accepted_forms():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for camera in ("top", "tool")}
    raw = {"images": images, "state": rng.normal(size=6).astype(np.float32), "prompt": "reach the red block"}
    floats = {camera: image / 255 for camera, image in raw["images"].items()}
    checked = check_observation(
        {"images": floats, "state": raw["state"].astype(np.float64).tolist(), "prompt": np.array(raw["prompt"])}, ROBOT
    )
    for camera, image in raw["images"].items():
        np.testing.assert_array_equal(checked["images"][camera], (255 * (image / 255)).astype(np.uint8))
    np.testing.assert_array_equal(checked["state"], raw["state"])
    assert checked["prompt"] == raw["prompt"]
    same = check_observation(raw, ROBOT)
    assert same["images"]["top"] is raw["images"]["top"]


def changed(**changes):
    example = ROBOT.example()
    images = example["images"] | changes.pop("images", {})
    images = {name: image for name, image in images.items() if image is not None}
    return example | {"images": images} | changes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"image": 0}, r"lacks \['images', 'prompt', 'state'\]; it has \['image'\]"),
        (changed(images={"top": None}), r"lacks cameras \['top'\]; it has \['tool'\]"),
        (changed(images={"top": None, "topp": 0}), "Did you mean 'top'"),
        (changed(images={"side": 0}), r"has cameras \['side'\] that tabletop has not"),
        (changed() | {"images": np.zeros((48, 48, 3))}, "expected a dict by camera"),
        (changed(images={"top": np.zeros((3, 48, 48), np.uint8)}), r"np\.moveaxis"),
        (changed(images={"top": np.zeros((1, 48, 48, 3), np.uint8)}), r"expected \(height, width, 3\)"),
        (changed(images={"top": np.zeros((48, 48, 3), np.int64)}), "of type int64; expected uint8"),
        (changed(images={"top": np.full((48, 48, 3), 200.0)}), "Send uint8 for values up to 255"),
        (changed(images={"top": np.full((48, 48, 3), np.nan)}), r"floats are expected in \[0, 1\]"),
        (changed(state=np.zeros(5)), r"shape \(5,\); expected \(6,\): tool_x, tool_y"),
        (changed(state=np.zeros((1, 6))), r"shape \(1, 6\)"),
        (changed(state=np.array([0, np.nan, 0, 0, 0, np.inf])), r"NaN or infinite in \['tool_y', 'command_z'\]"),
        (changed(state="here"), "expected 6 numbers"),
        (changed(prompt="  "), "expected the instruction"),
        (changed(prompt=None), "came as None"),
    ],
)
def test_broken_observation_is_refused_and_says_why(raw, message):
    with pytest.raises(ValueError, match=message):
        check_observation(raw, ROBOT)
