"""Draws cameras by casting rays on the CPU: no GL, no display, no driver.

`mujoco.mj_multiRay` finds what each pixel sees; numpy shades it with one lamp. The lamp of the policy's straight-down
cameras hangs overhead and nothing casts a shadow, so turning or mirroring the scene turns or mirrors the image.
"""

# pyright: reportAttributeAccessIssue=false
# (the checker does not see MuJoCo's compiled functions)

from __future__ import annotations

import functools

import mujoco
import numpy as np

AMBIENT = 0.35
"""Share of the light that reaches every surface; the rest falls with the cosine of the angle to the lamp."""
BACKGROUND = (0.82, 0.85, 0.90)
OVERHEAD = (0.0, 0.0, 1.0)
DRAWN = (0, 1)
"""Geom groups."""


@functools.lru_cache(maxsize=32)
def _rays(size: int, fovy: float) -> np.ndarray:
    """Unit directions through the pixels' centres in the camera's frame (x right, y up, looking along -z)."""
    half = np.tan(np.radians(fovy) / 2)
    steps = half * (2 * np.arange(size) + 1 - size) / size
    x, y = np.meshgrid(steps, -steps)
    rays = np.stack([x, y, np.full_like(x, -1.0)], axis=-1).reshape(-1, 3)
    rays /= np.linalg.norm(rays, axis=-1, keepdims=True)
    rays.setflags(write=False)
    return rays


def draw(
    model: mujoco.MjModel,
    data: mujoco.MjData,
    camera: str,
    size: int,
    *,
    lamp: tuple[float, float, float] = OVERHEAD,
    oversample: int = 1,
) -> np.ndarray:
    """What `camera` sees, uint8[size, size, 3]. Row 0 is the camera's up (+y for the straight-down ones).

    `data` must have been through `mj_forward`, or at least its kinematics and cameras. `lamp` is the direction towards
    the lamp, in the world; `oversample` the rays per pixel along each side, averaged.
    """
    cam = model.camera(camera).id
    num = size * oversample
    rays = np.ascontiguousarray(_rays(num, float(model.cam_fovy[cam])) @ data.cam_xmat[cam].reshape(3, 3).T)
    geoms = np.empty(len(rays), np.int32)
    distances = np.empty(len(rays))
    normals = np.empty((len(rays), 3))
    shown = np.zeros(6, np.uint8)
    shown[list(DRAWN)] = 1
    # The arguments after `shown`: static geoms too, no body left out, the results, and a cut-off no ray reaches.
    eye, flat = data.cam_xpos[cam], normals.reshape(-1)
    mujoco.mj_multiRay(model, data, eye, rays.reshape(-1), shown, True, -1, geoms, distances, flat, len(rays), 1e3)
    direction = np.asarray(lamp) / np.linalg.norm(lamp)
    light = AMBIENT + (1 - AMBIENT) * np.clip(normals @ direction, 0, 1)
    colors = np.where(geoms[:, None] >= 0, model.geom_rgba[geoms, :3] * light[:, None], BACKGROUND)
    image = colors.reshape(size, oversample, size, oversample, 3).mean((1, 3))
    return np.round(255 * image).astype(np.uint8)
