"""A scripted expert that sees the true state. It is a function of the present moment alone, so it can be imitated."""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop.scene import COMMAND_LOW, MAX_ACTION
from pi0_jax.evaluate.simulators.tabletop.tasks import Snapshot, Task

TRAVEL_HEIGHT = 0.075
"""Height at which the ring passes over every object with room to spare, metres."""
LOW_HEIGHT = float(COMMAND_LOW[2])
CAGE_RADIUS, CAGE_HEIGHT = 0.04, 0.03
"""An object this near the axis of a ring this low cannot leave it, metres."""


def _ramp(value: float, start: float, end: float) -> float:
    """0 up to `start`, 1 from `end` on, straight between."""
    return float(np.clip((value - start) / (end - start), 0, 1))


def expert_action(task: Task, snapshot: Snapshot) -> np.ndarray:
    """The next change of the commanded position, metres, float32[3], each within `MAX_ACTION`.

    The ring travels high, comes down as it arrives above the object, and for a push drags the caged object straight to
    the circle, or the centre. A ring that is low anywhere else first goes up, and moves aside only as fast as it clears
    the objects.
    """
    position = snapshot.objects[task.object]
    distance = float(np.linalg.norm(position - snapshot.tool[:2]))
    height = float(snapshot.tool[2])
    if task.kind != "reach" and distance < CAGE_RADIUS and height < CAGE_HEIGHT:
        goal = snapshot.goal if task.kind == "push" else np.zeros(2)
        move, target_height = goal - position, LOW_HEIGHT
    else:
        move = position - snapshot.command[:2]
        target_height = LOW_HEIGHT + (TRAVEL_HEIGHT - LOW_HEIGHT) * _ramp(distance, 0.015, 0.045)
        if distance > CAGE_RADIUS:
            move = move * _ramp(height, 0.03, 0.06)
    # Shorten the horizontal move as a whole: clipping each axis by itself would bend the path.
    move = move * min(1.0, MAX_ACTION / max(float(np.abs(move).max()), 1e-9))
    lift = np.clip(target_height - snapshot.command[2], -MAX_ACTION, MAX_ACTION)
    return np.array([*move, lift], np.float32)
