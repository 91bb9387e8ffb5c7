"""The tabletop with two right answers and a late decision: to swerve round a pillar at the last moment."""

from pi0_jax.evaluate.simulators import tabletop
from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = tabletop.ROBOT


def make(*, image_size: int = 48, repeats: int = 1) -> Simulator:
    """The simulator; `image_size` is the side of the observed images, pixels. `repeats` episodes in a row have the same
    layout, which shows whether a policy takes both ways from one start."""
    tabletop.check_installed()
    from pi0_jax.evaluate.simulators.tabletop.swerve import SwerveEnv

    return tabletop.single_task(SwerveEnv, image_size, ("left", "right"), repeats)
