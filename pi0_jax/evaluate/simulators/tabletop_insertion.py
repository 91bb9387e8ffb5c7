"""The tabletop with a precise task: to lower the ring over a puck with a few millimetres of play."""

from pi0_jax.evaluate.simulators import tabletop
from pi0_jax.evaluate.simulators.gym import Simulator

ROBOT = tabletop.ROBOT


def make(*, image_size: int = 48) -> Simulator:
    """The simulator; `image_size` is the side of the observed images, pixels."""
    tabletop.check_installed()
    from pi0_jax.evaluate.simulators.tabletop.insertion import InsertionEnv

    return tabletop.single_task(InsertionEnv, image_size)
