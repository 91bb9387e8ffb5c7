"""Random changes to a training batch, on the device: keyed, pure, and part of the jitted step.

Images differ from openpi's recipe in this: colours come first, and crop, scale and rotation are one bilinear warp
instead of three; each image draws for itself, where openpi shares the draw among the cameras of a sample; and every
image changes in brightness, contrast and saturation, where openpi changes half of the images, shifts the hue too, and
leaves the saturation alone by a defect of its library.

The symmetries of the square act on everything at once: what the cameras see, where the robot is, where it goes.
Convention: the cameras look straight down, image right is +x and image up is +y.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from pi0_jax.batch import Batch
from pi0_jax.config import AugmentConfig
from pi0_jax.data.normalization import Mode, NormStats, Stats, affine
from pi0_jax.data.robots import Planar, Robot
from pi0_jax.errors import UserError

Images = Float[Array, "b h w 3"]

SYMMETRIES = 8
"""Element g of the group mirrors x if g ≥ 4, then turns by g % 4 quarters counter-clockwise. 0 changes nothing."""

LUMA = (0.299, 0.587, 0.114)
"""Share of red, green and blue in the brightness of a colour (ITU-R BT.601)."""


def make_augment(
    config: AugmentConfig, robot: Robot, stats: Stats, mode: Mode, cameras: Collection[str]
) -> Callable[[PRNGKeyArray, Batch], Batch]:
    """A function that changes a batch at random as `config` says, and makes its images float in [-1, 1].

    The same key gives the same changes. The function expects uint8 images, and state and actions normalised and padded;
    it may be jitted. With the default config images are converted and nothing else happens. `stats` and `mode` are
    those that state and actions were normalised with. `fixed_cameras` has to be among `cameras`, the model's; a batch
    may lack some.

    Raises:
        UserError: a setting is out of range, or symmetries are asked for where they make no sense.
    """
    _check(config, cameras)
    if config.square_symmetries:
        planar = _check_symmetries(robot, stats, mode)
        turn_state = _make_turn(planar.state, stats["state"], mode)
        turn_actions = _make_turn(planar.actions, stats["actions"], mode)

    def augment(key: PRNGKeyArray, batch: Batch) -> Batch:
        observation = batch.observation
        symmetry_key, warp_key, colour_key = jax.random.split(key, 3)
        images, state, actions = dict(observation.images), observation.state, batch.actions
        if config.square_symmetries:
            element = jax.random.randint(symmetry_key, state.shape[:1], 0, SYMMETRIES)
            images = {camera: turn_images(image, element) for camera, image in images.items()}
            state, actions = turn_state(state[:, None], element)[:, 0], turn_actions(actions, element)
        for number, camera in enumerate(sorted(images)):
            image = images[camera].astype(jnp.float32) / 255.0
            image = _jitter(jax.random.fold_in(colour_key, number), image, config)
            if camera not in config.fixed_cameras and (config.crop < 1 or config.rotate_degrees > 0):
                image = _warp(jax.random.fold_in(warp_key, number), image, config)
            images[camera] = image * 2.0 - 1.0
        return batch._replace(observation=observation._replace(images=images, state=state), actions=actions)

    return augment


def turn_images(images: UInt8[Array, "b h w 3"], element: Int[Array, "b"]) -> UInt8[Array, "b h w 3"]:
    """Each image under its own symmetry: pixels are moved by a lookup table, so that all cost the same.

    Raises:
        UserError: the images are not square.
    """
    size = images.shape[1]
    if images.shape[2] != size:
        raise UserError(f"`augment.square_symmetries` needs square images; these are {images.shape[1:3]}.")
    pixels = np.arange(size * size).reshape(size, size)
    sources = np.stack([np.rot90(pixels[:, ::-1] if g >= 4 else pixels, g % 4).ravel() for g in range(SYMMETRIES)])
    flat = images.reshape(images.shape[0], size * size, 3)
    return jax.vmap(jnp.take, (0, 0, None))(flat, jnp.asarray(sources)[element], 0).reshape(images.shape)


def symmetry_matrices() -> Float[np.ndarray, "8 2 2"]:
    """What each symmetry does to a vector (x, y)."""
    quarter, mirror = np.array([[0.0, -1.0], [1.0, 0.0]]), np.diag([-1.0, 1.0])
    powers = [np.linalg.matrix_power(quarter, turns) for turns in range(4)]
    return np.stack(powers + [power @ mirror for power in powers])


def _make_turn(
    pairs: tuple[tuple[int, int], ...], stats: NormStats, mode: Mode
) -> Callable[[Float[Array, "b t ad"], Int[Array, "b"]], Float[Array, "b t ad"]]:
    """A function that turns normalised vectors as their symmetries turn them in the robot's units.

    With raw = scale * y + offset and P the turn, y becomes (P (scale * y + offset) - offset) / scale.
    """
    dims = len(stats.mean)
    turn = np.tile(np.eye(dims), (SYMMETRIES, 1, 1))
    for pair in pairs:
        turn[np.ix_(range(SYMMETRIES), pair, pair)] = symmetry_matrices()
    scale, offset = affine(stats, mode)
    divisor = np.where(scale == 0, 1.0, scale)  # constant dimensions are in no pair, and P leaves them alone

    def apply(values: Float[Array, "b t ad"], element: Int[Array, "b"]) -> Float[Array, "b t ad"]:
        padded = values.shape[-1]
        matrix = np.tile(np.eye(padded), (SYMMETRIES, 1, 1))
        matrix[:, :dims, :dims] = turn * divisor / divisor[:, None]
        shift = np.zeros((SYMMETRIES, padded))
        shift[:, :dims] = (turn @ offset - offset) / divisor
        turned = jnp.einsum(
            "BTD,BED->BTE", values, jnp.asarray(matrix, jnp.float32)[element], precision=jax.lax.Precision.HIGHEST
        )
        return turned + jnp.asarray(shift, jnp.float32)[element][:, None]

    return apply


def _warp(key: PRNGKeyArray, images: Images, config: AugmentConfig) -> Images:
    """A random crop, scaled back to full size, and a rotation, as one bilinear resampling; black outside."""
    count, height, width, _ = images.shape
    angle_key, offset_key = jax.random.split(key)
    angle = jnp.deg2rad(config.rotate_degrees) * jax.random.uniform(angle_key, (count, 1), minval=-1.0)
    centre = jnp.array([[height - 1, width - 1]]) / 2
    room = (1 - config.crop) * centre
    offset = centre + room * jax.random.uniform(offset_key, (count, 2), minval=-1.0)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij")
    rows, columns = (config.crop * (x.reshape(1, -1) - centre[:, i : i + 1]) for i, x in enumerate((rows, columns)))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    row = offset[:, :1] + cos * rows + sin * columns
    column = offset[:, 1:] - sin * rows + cos * columns
    return _sample(images, row, column).reshape(images.shape)


def _sample(images: Images, row: Float[Array, "b n"], column: Float[Array, "b n"]) -> Float[Array, "b n 3"]:
    """Bilinear values at fractional pixels; 0 outside the image."""
    count, height, width, _ = images.shape
    flat = images.reshape(count, height * width, 3)
    top, left = jnp.floor(row), jnp.floor(column)

    def add(total: Float[Array, "b n 3"], corner: Float[Array, "2"]) -> tuple[Float[Array, "b n 3"], None]:
        r, c = top + corner[0], left + corner[1]
        inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
        weight = jnp.where(inside, (1 - jnp.abs(row - r)) * (1 - jnp.abs(column - c)), 0.0)
        index = (jnp.clip(r, 0, height - 1) * width + jnp.clip(c, 0, width - 1)).astype(jnp.int32)
        return total + weight[..., None] * jax.vmap(lambda pixels, at: pixels[at])(flat, index), None

    # A loop, because XLA on CPU would otherwise compute what `images` came from once for each corner.
    corners = jnp.array([(0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0)])
    return jax.lax.scan(add, jnp.zeros((*row.shape, 3)), corners)[0]


def _jitter(key: PRNGKeyArray, images: Images, config: AugmentConfig) -> Images:
    """Brightness, then contrast about the image's mean grey, then saturation, in [0, 1] and kept there.

    The three are one linear map of the colours, x → A x + a.
    """
    strengths = (config.brightness, config.contrast, config.saturation)
    if not any(strengths):
        return images
    count, height, width, _ = images.shape
    draws = jax.random.uniform(key, (3, count, 1, 1), minval=-1.0)
    brightness, contrast, saturation = 1 + jnp.array(strengths)[:, None, None, None] * draws
    luma = jnp.array(LUMA).reshape(1, 1, 3)
    grey = jnp.ones((1, 3, 1)) * luma
    matrix = brightness * contrast * (saturation * jnp.eye(3)[None] + (1 - saturation) * grey)
    flat = images.reshape(count, height * width, 3)
    shift = (1 - contrast) * brightness * (flat.mean(1, keepdims=True) * luma).sum(-1, keepdims=True)
    mixed = sum(flat[..., c : c + 1] * matrix[:, None, :, c] for c in range(3))
    return jnp.clip(mixed + shift, 0.0, 1.0).reshape(images.shape)


def _check(config: AugmentConfig, cameras: Collection[str]) -> None:
    if not 0 < config.crop <= 1:
        raise UserError(f"`augment.crop` is {config.crop}; expected a share of the image's side, above 0 and up to 1.")
    for name in ("brightness", "contrast", "saturation"):
        if not 0 <= getattr(config, name) <= 1:
            raise UserError(f"`augment.{name}` is {getattr(config, name)}; expected a relative change of 0 to 1.")
    if unknown := sorted(set(config.fixed_cameras) - set(cameras)):
        raise UserError(f"`augment.fixed_cameras` names {unknown}; the cameras are {sorted(cameras)}.")


def _check_symmetries(robot: Robot, stats: Stats, mode: Mode) -> Planar:
    if robot.planar is None:
        raise UserError(f"`augment.square_symmetries` needs a robot with planar axes; {robot.name} names none.")
    for key, names, pairs in (
        ("state", robot.state, robot.planar.state),
        ("actions", robot.actions, robot.planar.actions),
    ):
        scale = affine(stats[key], mode).scale
        if constant := [names[i] for pair in pairs for i in pair if scale[i] == 0]:
            raise UserError(
                f"`augment.square_symmetries` turns {key} {constant}, which never change in the demonstrations. "
                "Their normalisation has no scale: record demonstrations in all directions."
            )
    return robot.planar
