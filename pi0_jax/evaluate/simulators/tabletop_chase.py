"""The tabletop with a moving target: to keep the ring over a circle that wanders about."""

from pi0_jax.evaluate.simulators import tabletop
from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = tabletop.ROBOT


def make(*, image_size: int = 48) -> Simulator:
    """The simulator; `image_size` is the side of the observed images, pixels."""
    tabletop.check_installed()
    from pi0_jax.evaluate.simulators.tabletop.chase import ChaseEnv

    return tabletop.single_task(ChaseEnv, image_size)
