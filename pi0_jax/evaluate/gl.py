"""Drawing without a display: which of MuJoCo's two ways is there, chosen before a simulator is imported."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from typing import Any

LIBRARIES = {
    "egl": (("libEGL.so.1",), ("libEGL_mesa.so.0", "libEGL_nvidia.so.0")),
    "osmesa": (("libOSMesa.so.8", "libOSMesa.so.6", "libOSMesa.so"),),
}
"""Value of MUJOCO_GL to the libraries that it needs: one of each group."""
GL_WORDS = re.compile(r"egl|osmesa|glfw|opengl|glGetError|gladLoad", re.IGNORECASE)


def choose_gl() -> None:
    """Sets MUJOCO_GL to what can draw here, EGL before OSMesa, unless it is set. Elsewhere than on Linux MuJoCo needs
    neither."""
    if sys.platform == "linux" and not os.environ.get("MUJOCO_GL"):
        for name, groups in LIBRARIES.items():
            if all(any(map(_loads, group)) for group in groups):
                os.environ["MUJOCO_GL"] = name
                return


def make_current(env: Any) -> None:
    """Makes the GL context of one of Gymnasium's MuJoCo environments the current one.

    They draw into whichever is current, that of another environment or, after that has been closed, none.
    """
    renderer = getattr(getattr(env, "unwrapped", env), "mujoco_renderer", None)
    if viewer := getattr(renderer, "viewer", None):
        viewer.make_context_current()


def gl_advice(trace: str) -> str:
    """What to do about an error, by its traceback; "" where that does not speak of drawing."""
    if sys.platform != "linux" or not GL_WORDS.search(trace):
        return ""
    chosen = os.environ.get("MUJOCO_GL") or "not set, since neither was found"
    return (
        " Drawing without a display needs EGL or OSMesa. On Debian and Ubuntu: apt install libegl1 libegl-mesa0 "
        f"libgl1-mesa-dri (MUJOCO_GL=egl), or apt install libosmesa6 (MUJOCO_GL=osmesa). MUJOCO_GL is {chosen}."
    )


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True
