"""SO-101: an SO-100 of other motors and the same joints."""

from __future__ import annotations

import dataclasses

from pi0_jax.data.robots import so100

ROBOT = dataclasses.replace(so100.ROBOT, name="so101")
