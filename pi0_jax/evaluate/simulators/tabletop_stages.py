"""The tabletop with tasks whose instruction does not say what to do next: to take two objects."""

import dataclasses

from pi0_jax.evaluate.simulators import MAX_DEMONSTRATIONS, tabletop
from pi0_jax.evaluate.simulators.gym import Simulator, Start
from pi0_jax.evaluate.simulators.tabletop.tasks import episode_seed

ROBOT = tabletop.ROBOT


def make(*, image_size: int = 48) -> Simulator:
    """The simulator; `image_size` is the side of the observed images, pixels."""
    tabletop.check_installed()
    from pi0_jax.evaluate.simulators.tabletop.stages import TASKS, StagesEnv

    names = tuple(TASKS)

    def layout(index: int, seed: int, split: str, attempt: int) -> Start:
        name = names[index % len(names)]
        return Start(name, episode_seed(split, attempt * MAX_DEMONSTRATIONS + index, seed), {"task": name})

    return dataclasses.replace(
        tabletop.single_task(StagesEnv, image_size),
        tasks=names,
        per_task=50,
        layout=layout,
        subtask=lambda env: env.subtask,
        questions=lambda env: ("tool", env.questions()),
    )
