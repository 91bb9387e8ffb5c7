"""Augmentation: nothing when off, and symmetries that move image, state and actions together."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import AugmentConfig
from pi0_jax.data import augment as module
from pi0_jax.data.augment import SYMMETRIES, make_augment, symmetry_matrices, turn_images
from pi0_jax.data.normalization import NormStats, normalize_values, unnormalize_values
from pi0_jax.data.robots import get_robot
from pi0_jax.errors import UserError

ROBOT = get_robot("tabletop")
SIZE, AHEAD = 21, 4
MODES = ("zscore", "quantile")


def uneven(dims, seed):
    """Statistics of which no two dimensions share scale or offset."""
    rng = np.random.default_rng(seed)
    mean, std = rng.normal(size=dims), rng.uniform(0.5, 2, dims)
    return NormStats(mean, std, mean - 2.5 * std, mean + 2 * std, mean - 4 * std, mean + 4 * std)


STATS = {"state": uneven(6, 0), "actions": uneven(3, 1)}


def make_batch(count=SYMMETRIES, mode="zscore", seed=0, size=SIZE):
    """Each image is dark but for one pixel, where the first action points from the image's centre."""
    rng = np.random.default_rng(seed)
    state, actions = rng.normal(size=(count, 6)), rng.normal(size=(count, AHEAD, 3))
    target = rng.integers(-(size // 2), size // 2 + 1, (count, 2))
    state[:, :2], actions[:, 0, :2] = target, target
    images = np.zeros((count, size, size, 3), np.uint8)
    images[np.arange(count), size // 2 - target[:, 1], size // 2 + target[:, 0]] = 255

    def pad(x, stats):
        y = normalize_values(x, stats, mode).astype(np.float32)
        return np.concatenate([y, np.zeros((*y.shape[:-1], 2), np.float32)], -1)

    observation = Observation(
        images={"top": images, "tool": images.copy()},
        image_masks={camera: np.ones(count, bool) for camera in ("top", "tool")},
        state=np.pad(normalize_values(state, STATS["state"], mode).astype(np.float32), ((0, 0), (0, 2))),
        prompt=np.zeros((count, 4), np.int32),
        prompt_mask=np.ones((count, 4), bool),
    )
    dims = np.tile(np.arange(8) < 3, (count, 1))
    actions = np.pad(pad(actions, STATS["actions"]), ((0, 0), (0, 0), (0, 3)))
    return Batch(observation, actions, np.ones((count, AHEAD), bool), dims)


def run(batch, config, key=0, mode="zscore", robot=ROBOT, stats=STATS):
    step = jax.jit(make_augment(config, robot, stats, mode, ("tool", "top")))
    return jax.tree.map(np.asarray, step(jax.random.key(key), batch))


def noise_batch(count=16, size=32):
    rng = np.random.default_rng(0)
    batch = make_batch(count, size=size + 1 - size % 2)
    images = {camera: rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8) for camera in ("top", "tool")}
    return batch._replace(observation=batch.observation._replace(images=images))


def test_everything_off_only_converts_the_images():
    batch = noise_batch()
    out = run(batch, AugmentConfig())
    for camera, image in batch.observation.images.items():
        expected = image.astype(np.float32) / 255.0 * 2.0 - 1.0
        np.testing.assert_allclose(out.observation.images[camera], expected, atol=1e-6)
    for field in ("state", "prompt", "prompt_mask", "image_masks"):
        jax.tree.map(np.testing.assert_array_equal, getattr(out.observation, field), getattr(batch.observation, field))
    for field in ("actions", "step_mask", "dim_mask"):
        np.testing.assert_array_equal(getattr(out, field), getattr(batch, field))


EVERYTHING = AugmentConfig(0.9, 10.0, 0.3, 0.4, 0.5, ("tool",), True)


def test_same_key_same_result_other_key_other_result():
    batch = noise_batch()
    once, again, other = (run(batch, EVERYTHING, key) for key in (0, 0, 1))
    jax.tree.map(np.testing.assert_array_equal, once, again)
    assert not np.allclose(once.observation.images["top"], other.observation.images["top"])
    assert once.observation.images["top"].min() >= -1
    assert once.observation.images["top"].max() <= 1


def test_symmetries_form_the_group_of_the_square():
    matrices = symmetry_matrices()
    assert len({tuple(matrix.ravel()) for matrix in matrices}) == SYMMETRIES
    for a in matrices:
        np.testing.assert_array_equal(a @ a.T, np.eye(2))
        for b in matrices:
            assert any(np.array_equal(a @ b, c) for c in matrices)


def test_images_turn_as_vectors_do_for_every_pair_of_symmetries():
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 3), dtype=np.uint8)
    matrices = symmetry_matrices()
    elements = [jnp.array([g]) for g in range(SYMMETRIES)]
    np.testing.assert_array_equal(turn_images(jnp.asarray(images), elements[0]), images)
    for a in range(SYMMETRIES):
        turned = turn_images(jnp.asarray(images), elements[a])
        for b in range(SYMMETRIES):
            (product,) = (g for g in range(SYMMETRIES) if np.array_equal(matrices[g], matrices[b] @ matrices[a]))
            np.testing.assert_array_equal(
                turn_images(turned, elements[b]), turn_images(jnp.asarray(images), elements[product])
            )


@pytest.mark.parametrize("mode", MODES)
def test_action_and_state_keep_pointing_at_the_bright_pixel(mode, monkeypatch):
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.arange(low, high))
    batch = make_batch(mode=mode)
    out = run(batch, AugmentConfig(square_symmetries=True), mode=mode)
    state = unnormalize_values(out.observation.state[:, :6], STATS["state"], mode)
    actions = unnormalize_values(out.actions[..., :3], STATS["actions"], mode)
    before = unnormalize_values(batch.actions[..., :3], STATS["actions"], mode)
    moved = 0
    for row in range(SYMMETRIES):
        for camera in ("top", "tool"):
            ((y, x, _), *_) = np.argwhere(out.observation.images[camera][row] == 1)
            pointed = [x - SIZE // 2, SIZE // 2 - y]
            np.testing.assert_allclose(actions[row, 0, :2], pointed, atol=1e-4)
            np.testing.assert_allclose(state[row, :2], pointed, atol=1e-4)
        np.testing.assert_allclose(actions[row, :, :2], before[row, :, :2] @ symmetry_matrices()[row].T, atol=1e-4)
        moved += not np.allclose(actions[row], before[row], atol=1e-3)
    assert moved == SYMMETRIES - 1
    np.testing.assert_array_equal(out.observation.state[:, [2, 5]], batch.observation.state[:, [2, 5]])
    np.testing.assert_array_equal(out.actions[..., 2], batch.actions[..., 2])


def test_symmetry_that_changes_nothing_changes_nothing_exactly(monkeypatch):
    monkeypatch.setattr(jax.random, "randint", lambda key, shape, low, high: jnp.zeros(shape, int))
    batch = make_batch()
    out = run(batch, AugmentConfig(square_symmetries=True))
    np.testing.assert_array_equal(out.actions, batch.actions)
    np.testing.assert_array_equal(out.observation.state, batch.observation.state)


def test_padded_dimensions_stay_zero_and_all_symmetries_are_drawn():
    batch = make_batch(count=200)
    out = run(batch, AugmentConfig(square_symmetries=True))
    np.testing.assert_array_equal(out.actions[..., 3:], 0)
    np.testing.assert_array_equal(out.observation.state[..., 6:], 0)
    before, after = (unnormalize_values(b.actions[:, 0, :3], STATS["actions"], "zscore")[:, :2] for b in (batch, out))
    errors = np.abs(np.einsum("gij,bj->bgi", symmetry_matrices(), before) - after[:, None]).max(-1)
    assert (errors.min(1) < 1e-4).all()
    counts = (errors < 1e-4)[(errors < 1e-4).sum(1) == 1].sum(0)
    assert (counts > 5).all()


def test_crop_reads_a_window_of_the_image_scaled_up():
    """Images that tell their own coordinates: the warp must be straight, of the right scale, and inside the image."""
    size = 32
    y, x = np.mgrid[:size, :size]
    images = jnp.asarray(np.stack([y, x, 0 * x], -1)[None].repeat(64, 0).astype(np.float32))
    out = np.asarray(module._warp(jax.random.key(0), images, AugmentConfig(crop=0.5)))
    np.testing.assert_allclose(np.diff(out[:, :, :, 0], axis=1), 0.5, atol=1e-4)
    np.testing.assert_allclose(np.diff(out[:, :, :, 1], axis=2), 0.5, atol=1e-4)
    np.testing.assert_allclose(np.diff(out[:, :, :, 0], axis=2), 0, atol=1e-4)
    assert np.ptp(out[:, 0, 0, 0]) > 12
    assert out[..., :2].min() >= 0
    assert out[..., :2].max() <= size - 1


def test_rotation_keeps_distances_and_stays_within_its_limit():
    size = 33
    y, x = np.mgrid[:size, :size]
    images = jnp.asarray(np.stack([y, x, 0 * x], -1)[None].repeat(64, 0).astype(np.float32))
    out = np.asarray(module._warp(jax.random.key(0), images, AugmentConfig(rotate_degrees=20.0)))
    centre = size // 2
    np.testing.assert_allclose(out[:, centre, centre, :2], centre, atol=1e-4)
    right = out[:, centre, centre + 8, :2] - centre
    np.testing.assert_allclose(np.hypot(*right.T), 8, atol=1e-3)
    angles = np.rad2deg(np.arctan2(right[:, 0], right[:, 1]))
    assert np.abs(angles).max() <= 20
    assert angles.min() < -15
    assert angles.max() > 15


def test_fixed_cameras_are_neither_cropped_nor_rotated():
    batch = noise_batch()
    out = run(batch, AugmentConfig(crop=0.8, rotate_degrees=10, fixed_cameras=("tool",)))
    plain = run(batch, AugmentConfig())
    np.testing.assert_array_equal(out.observation.images["tool"], plain.observation.images["tool"])
    assert not np.allclose(out.observation.images["top"], plain.observation.images["top"])


def jittered(**strengths):
    batch = noise_batch()
    out = run(batch, AugmentConfig(**strengths)).observation.images["top"]
    return batch.observation.images["top"] / 255, (out + 1) / 2


def test_brightness_scales_each_image_by_one_factor():
    before, after = jittered(brightness=0.3)
    inside = (after > 0.01) & (after < 0.99) & (before > 0.05)
    factors = [after[i][inside[i]] / before[i][inside[i]] for i in range(len(before))]
    assert all(np.ptp(factor) < 1e-4 for factor in factors)
    means = np.array([factor.mean() for factor in factors])
    assert means.min() > 0.7
    assert means.max() < 1.3
    assert np.ptp(means) > 0.3


def test_contrast_keeps_the_mean_grey_and_saturation_keeps_every_grey():
    luma = np.array(module.LUMA)
    before, after = jittered(contrast=0.0001)
    np.testing.assert_allclose((after @ luma).mean((1, 2)), (before @ luma).mean((1, 2)), atol=1e-5)
    before, after = jittered(saturation=0.5)
    inside = ((after > 0.001) & (after < 0.999)).all(-1)
    np.testing.assert_allclose((after @ luma)[inside], (before @ luma)[inside], atol=1e-5)
    assert np.abs(after - before).max() > 0.1


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (AugmentConfig(crop=0.0), r"`augment\.crop` is 0\.0"),
        (AugmentConfig(contrast=1.5), r"`augment\.contrast` is 1\.5"),
        (AugmentConfig(fixed_cameras=("wrist",)), r"names \['wrist'\]; the cameras are \['tool', 'top'\]"),
    ],
)
def test_settings_out_of_range_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        make_augment(config, ROBOT, STATS, "zscore", ("tool", "top"))


def test_symmetries_are_refused_where_they_make_no_sense():
    config, batch = AugmentConfig(square_symmetries=True), make_batch()
    with pytest.raises(UserError, match="tabletop names none"):
        make_augment(config, dataclasses.replace(ROBOT, planar=None), STATS, "zscore", ())
    oblong = {"top": np.zeros((SYMMETRIES, 4, 6, 3), np.uint8)}
    with pytest.raises(ValueError, match="square images"):
        run(batch._replace(observation=batch.observation._replace(images=oblong)), config)
    actions = STATS["actions"]
    flat = actions._replace(min=actions.min.copy(), max=actions.max.copy())
    flat.max[1] = flat.min[1]
    with pytest.raises(ValueError, match=r"turns actions \['dy'\], which never change"):
        make_augment(config, ROBOT, STATS | {"actions": flat}, "zscore", ())
