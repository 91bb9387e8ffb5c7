"""The embedded simulator: a language-conditioned tabletop that needs no GPU, no display and no GL.

Importing this package registers `pi0_jax/Tabletop-v0` with Gymnasium. `tasks` is plain numpy and always importable;
everything else needs the optional extra, `pip install -e '.[sim]'`.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import numpy as np

from pi0_jax.errors import UserError, require_package
from pi0_jax.evaluate.simulators import MAX_DEMONSTRATIONS, Simulator
from pi0_jax.evaluate.simulators.tabletop.tasks import TASK_SETS, episode_seed

if TYPE_CHECKING:
    from pi0_jax.evaluate.simulators.tabletop.single import SingleTaskEnv

with contextlib.suppress(ImportError):
    import gymnasium

    gymnasium.register(
        id="pi0_jax/Tabletop-v0", entry_point="pi0_jax.evaluate.simulators.tabletop.tabletop:TabletopEnv"
    )

ROBOT = "tabletop"


def check_installed() -> None:
    """Raises `UserError` if the optional extra is missing."""
    for package in ("gymnasium", "mujoco"):
        require_package(package, "sim", "the tabletop")


def make(*, tasks: str = "objects", counterfactual: bool = False, image_size: int = 48) -> Simulator:
    """The tabletop as a simulator.

    `tasks` is one of `TASK_SETS`. With `counterfactual` the instruction names another object than the one that is
    scored. `image_size` is the side of the observed images, pixels.
    """
    check_installed()
    from pi0_jax.evaluate.simulators.gym import Start
    from pi0_jax.evaluate.simulators.tabletop.expert import expert_action
    from pi0_jax.evaluate.simulators.tabletop.scene import CONTROL_HZ, MAX_ACTION
    from pi0_jax.evaluate.simulators.tabletop.tabletop import TabletopEnv

    if tasks not in TASK_SETS:
        raise UserError(f"tasks is {tasks!r}; expected {' or '.join(TASK_SETS)}.")
    chosen = TASK_SETS[tasks]

    def layout(index: int, seed: int, split: str, attempt: int) -> Start:
        seed = episode_seed(split, attempt * MAX_DEMONSTRATIONS + index, seed)
        task = chosen[index % len(chosen)]
        options = {"task": task.name}
        if counterfactual:
            rng = np.random.default_rng(seed)
            others = [other for other in chosen if other.kind == task.kind and other.object != task.object]
            options["prompt"] = str(rng.choice(others[rng.integers(len(others))].prompts))
        return Start(task.name, seed, options)

    return Simulator(
        make=lambda task: TabletopEnv(image_size=image_size, lazy_images=True),
        robot=ROBOT,
        fps=CONTROL_HZ,
        tasks=tuple(task.name for task in chosen),
        observe=lambda env, _: env.observe(),
        layout=layout,
        picture=lambda env: env.draw_view("view", 160),
        expert=lambda env, _: expert_action(env.task, env.snapshot()),
        threads=True,
        random_action=lambda rng: rng.uniform(-MAX_ACTION, MAX_ACTION, 3).astype(np.float32),
    )


def single_task(env: type[SingleTaskEnv], image_size: int, modes: tuple[str, ...] = (), repeats: int = 1) -> Simulator:
    """A task with a scene of its own (`single`) as a simulator; `modes` are its equally right ways, `repeats` the
    number of episodes with the same layout."""
    from pi0_jax.evaluate.simulators.gym import Start
    from pi0_jax.evaluate.simulators.tabletop.scene import CONTROL_HZ, MAX_ACTION

    def layout(index: int, seed: int, split: str, attempt: int) -> Start:
        return Start(env.name, episode_seed(split, attempt * MAX_DEMONSTRATIONS + index // repeats, seed))

    return Simulator(
        make=lambda task: env(image_size, lazy_images=True),
        robot=ROBOT,
        fps=CONTROL_HZ,
        tasks=(env.name,),
        modes=modes,
        per_task=200,
        observe=lambda env, _: env.observe(),
        layout=layout,
        picture=lambda env: env.draw_view("view", 160),
        expert=lambda env, _: env.expert(),
        threads=True,
        random_action=lambda rng: rng.uniform(-MAX_ACTION, MAX_ACTION, 3).astype(np.float32),
    )
