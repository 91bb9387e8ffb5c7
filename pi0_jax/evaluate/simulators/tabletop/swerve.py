"""Two right answers and a late decision: the ring approaches the pillar slowly, and swerves at the last moment.

Until then nothing that is seen tells which side it will be; only the chunk in execution does. A new chunk that is drawn
without regard to it goes to the other side half of the time, and where it replaces the old one in the middle of the
swerve, the ring hits the pillar.
"""

from __future__ import annotations

import numpy as np

from pi0_jax.evaluate.simulators.tabletop.detour import AHEAD, DetourEnv

APPROACH = 0.015
"""Length of a control step of the expert while it approaches, metres."""
SWERVE_DISTANCE = 0.13
"""From the pillar's axis to the ring's where the expert swerves, metres."""


class SwerveEnv(DetourEnv):
    """The detour with an expert that decides late."""

    name = "swerve"

    def expert(self) -> np.ndarray:
        """Goes slowly straight at the pillar, and swerves before it to the side that was drawn."""
        action = super().expert()
        command = self._data.ctrl[:2]
        distance = float(np.linalg.norm(command - self.pillar))
        if abs(self._angle(command)) > np.pi - AHEAD and distance > SWERVE_DISTANCE:
            action[:2] = APPROACH * (self.pillar - command) / distance
        return action
