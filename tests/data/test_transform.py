"""Transforms: the way back undoes the way in, prompts see the robot's own dimensions."""

import dataclasses

import numpy as np
import PIL.Image
import pytest

from pi0_jax.batch import Observation
from pi0_jax.config import Autoregressive
from pi0_jax.data.normalization import Normalization, normalize_values
from pi0_jax.data.observation import check_observation
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tokenizer import Tokenizer, discretize
from pi0_jax.data.transform import (
    chain,
    identity,
    make_transform,
    per_key,
    resize_with_pad,
    to_observation,
)
from tests.data.stats import compute_stats

ROBOT = get_robot("tabletop")
ABSOLUTE = ("absolute",) * 3


@pytest.fixture(scope="module")
def stats(dataset):
    return compute_stats(dataset)


@pytest.fixture(scope="module")
def normalization(stats):
    return Normalization(stats, ABSOLUTE)


@pytest.fixture(scope="module")
def tokenizer(dataset):
    return Tokenizer.train(dataset.tasks, 512)


@pytest.fixture
def policy(config):
    return config.policy


@pytest.fixture
def sample():
    rng = np.random.default_rng(0)
    images = {camera: rng.integers(0, 256, (48, 48, 3), dtype=np.uint8) for camera in ("top", "tool")}
    return {
        "images": images,
        "state": rng.normal(size=6).astype(np.float32),
        "prompt": "reach the red block",
        "actions": rng.normal(size=(4, 3)).astype(np.float32),
    }


def with_model(policy, **changes):
    return dataclasses.replace(policy, model=dataclasses.replace(policy.model, **changes))


def test_chain_runs_forwards_in_order_and_inverses_in_reverse():
    add = per_key({"state": lambda x: x + 1}, {"state": lambda x: x - 1})
    double = per_key({"state": lambda x: x * 2}, {"state": lambda x: x / 2})
    both = chain(add, identity, double)
    assert both.forward({"state": np.array(3)}) == {"state": np.array(8)}
    assert both.inverse({"state": np.array(8)}) == {"state": np.array(3)}


@pytest.mark.parametrize("mode", ["zscore", "quantile"])
@pytest.mark.parametrize("variant", ["pi0", "pi05"])
def test_inverse_returns_what_forward_was_given(policy, normalization, tokenizer, sample, mode, variant):
    policy = dataclasses.replace(with_model(policy, variant=variant, prompt_length=64), normalization=mode)
    transform = make_transform(policy, ROBOT, normalization, tokenizer)
    ready = transform.forward(sample)
    assert ready["actions"].shape == (4, 8)
    back = transform.inverse({"state": ready["state"], "actions": ready["actions"]})
    np.testing.assert_allclose(back["actions"], sample["actions"], atol=1e-6)
    np.testing.assert_allclose(back["state"], sample["state"], atol=1e-6)
    assert transform.inverse({"actions": ready["actions"]})["actions"].shape == (4, 3)


def test_a_camera_that_is_absent_is_left_out_or_seen_black(policy, normalization, tokenizer, sample):
    policy = with_model(policy, cameras=("top", "wrist"), variant="pi0_fast", prompt_length=64)
    for blank in (False, True):
        objective = Autoregressive(blank_cameras=blank)
        transform = make_transform(dataclasses.replace(policy, objective=objective), ROBOT, normalization, tokenizer)
        ready = transform.forward(sample)
        assert {name: bool(mask) for name, mask in ready["image_masks"].items()} == {"top": True, "wrist": blank}
        assert not ready["images"]["wrist"].any()


def test_forward_leaves_its_input_as_it_was(policy, normalization, tokenizer, sample):
    before = {key: np.copy(value) for key, value in sample.items() if key != "images"}
    make_transform(policy, ROBOT, normalization, tokenizer).forward(sample)
    for key, value in before.items():
        np.testing.assert_array_equal(sample[key], value)
    assert sorted(sample) == ["actions", "images", "prompt", "state"]


def test_observation_is_ready_for_the_model(policy, normalization, stats, tokenizer, sample):
    observation = to_observation(make_transform(policy, ROBOT, normalization, tokenizer).forward(sample))
    assert isinstance(observation, Observation)
    assert observation.state.dtype == np.float32
    np.testing.assert_array_equal(observation.state[6:], 0)
    np.testing.assert_array_equal(
        observation.state[:6], normalize_values(sample["state"], stats["state"], "zscore").astype(np.float32)
    )
    np.testing.assert_array_equal(observation.images["top"], sample["images"]["top"])
    assert observation.image_masks["tool"]
    assert observation.prompt.shape == observation.prompt_mask.shape == (16,)


def test_batch_is_transformed_as_its_samples_are(policy, normalization, tokenizer, sample):
    policy = with_model(policy, variant="pi05", prompt_length=64, cameras=("tool", "wrist"))
    transform = make_transform(policy, ROBOT, normalization, tokenizer)
    other = sample | {"state": sample["state"] + 1, "prompt": "push the blue ball"}
    batch = {key: np.stack([sample[key], other[key]]) for key in ("state", "actions")}
    batch["prompt"] = np.array([sample["prompt"], other["prompt"]], object)
    batch["images"] = {camera: np.stack([image, image]) for camera, image in sample["images"].items()}
    together = to_observation(transform.forward(batch))
    for i, one in enumerate((sample, other)):
        alone = to_observation(transform.forward(one))
        for field in ("state", "prompt", "prompt_mask"):
            np.testing.assert_array_equal(getattr(together, field)[i], getattr(alone, field))
        for camera in policy.model.cameras:
            np.testing.assert_array_equal(together.images[camera][i], alone.images[camera])
            np.testing.assert_array_equal(together.image_masks[camera][i], alone.image_masks[camera])


def test_pi05_prompt_holds_the_normalised_state_without_padding(policy, normalization, stats, tokenizer, sample):
    policy = with_model(policy, variant="pi05", prompt_length=64)
    ready = make_transform(policy, ROBOT, normalization, tokenizer).forward(sample)
    bins = discretize(normalize_values(sample["state"], stats["state"], "zscore"))
    assert len(bins) == 6
    expected, _ = tokenizer.encode_prompt(
        sample["prompt"], 64, normalize_values(sample["state"], stats["state"], "zscore")
    )
    np.testing.assert_array_equal(ready["prompt"], expected)
    changed = make_transform(policy, ROBOT, normalization, tokenizer).forward(sample | {"state": sample["state"] + 1})
    assert (changed["prompt"] != ready["prompt"]).any()


def test_camera_that_the_robot_lacks_is_black_and_masked(policy, normalization, tokenizer, sample):
    transform = make_transform(with_model(policy, cameras=("wrist", "top")), ROBOT, normalization, tokenizer)
    observation = to_observation(transform.forward(sample))
    assert list(observation.images) == ["wrist", "top"]
    assert not observation.images["wrist"].any()
    assert not observation.image_masks["wrist"]
    assert observation.image_masks["top"]


def test_image_of_the_right_size_passes_untouched():
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert resize_with_pad(image, 32) is image


@pytest.mark.parametrize(("height", "width"), [(30, 60), (61, 33), (100, 100), (7, 5)])
def test_resizing_keeps_the_aspect_and_pads_with_black(height, width):
    image = np.full((height, width, 3), 200, np.uint8)
    out = resize_with_pad(image, 32)
    ratio = max(height, width) / 32
    rows, columns = int(height / ratio), int(width / ratio)
    top, left = (32 - rows) // 2, (32 - columns) // 2
    expected = np.zeros((32, 32, 3), np.uint8)
    expected[top : top + rows, left : left + columns] = 200
    np.testing.assert_array_equal(out, expected)


def test_resizing_interpolates_as_pillow_does():
    image = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    expected = np.asarray(PIL.Image.fromarray(image[1]).resize((16, 16), PIL.Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_with_pad(image, 16)[1], expected)


@pytest.mark.parametrize(("height", "width"), [(480, 640), (180, 320), (97, 51), (20, 33)])
def test_resizing_with_padding_is_pillows_on_the_whole_image_within_a_level(height, width):
    """openpi's client fits the whole picture with Pillow's bilinear filter into the middle of a black square."""
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    scale = max(height, width) / 224
    inner = PIL.Image.fromarray(image).resize((int(width / scale), int(height / scale)), PIL.Image.Resampling.BILINEAR)
    square = PIL.Image.new("RGB", (224, 224), 0)
    square.paste(inner, ((224 - inner.width) // 2, (224 - inner.height) // 2))
    assert np.abs(resize_with_pad(image, 224).astype(int) - np.asarray(square)).max() <= 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_dim": 4}, r"Raise `model\.action_dim`"),
        ({"cameras": ("base_0_rgb",)}, r"Name at least one of the robot's in `model\.cameras`"),
        ({"vocab_size": 100}, r"Raise `model\.vocab_size`"),
    ],
)
def test_model_that_does_not_fit_the_robot_is_refused(policy, normalization, tokenizer, changes, message):
    with pytest.raises(ValueError, match=message):
        make_transform(with_model(policy, **changes), ROBOT, normalization, tokenizer)


def test_statistics_of_another_robot_are_refused(policy, stats, tokenizer):
    with pytest.raises(ValueError, match="'state' have 3 dimensions; the robot has 6"):
        make_transform(policy, ROBOT, Normalization(stats | {"state": stats["actions"]}, ABSOLUTE), tokenizer)


def test_the_chunk_in_execution_is_mapped_as_demonstrated_actions_are(policy, stats, tokenizer, sample):
    transform = make_transform(policy, ROBOT, Normalization(stats, ("relative",) * 3), tokenizer)
    demonstrated = transform.forward(sample)
    raw = {key: sample[key] for key in ("images", "state", "prompt")} | {"previous": sample["actions"], "delay": 2}
    checked = check_observation(raw, ROBOT)
    assert "actions" not in checked
    ready = transform.forward(checked)
    np.testing.assert_array_equal(ready["previous"], demonstrated["actions"])
    assert ready["delay"] == 2
    assert "previous" not in check_observation(raw | {"previous": np.zeros((0, 3))}, ROBOT)
