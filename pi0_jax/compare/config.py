"""What is compared, and how: the configuration of `pi0 compare`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from pi0_jax.config import ModelConfig, ObjectiveConfig, Reflow, TrainConfig
from pi0_jax.config.replace import replace
from pi0_jax.errors import UserError, did_you_mean
from pi0_jax.sampler import Euler, Sampler


@dataclasses.dataclass(frozen=True)
class Contender:
    """One kind of policy in a comparison: what differs from the others."""

    model: ModelConfig
    objective: ObjectiveConfig
    """`Reflow.teacher` is the name of another contender here."""
    samplers: Mapping[str, Sampler] = dataclasses.field(default_factory=lambda: {"Euler": Euler()})
    """By a label; each is measured on the same weights."""
    evaluations: tuple[int, ...] = (1, 2, 4, 10, 50, 100)
    """Network evaluations per chunk to measure at."""
    ways: tuple[str, ...] = ()
    """Ways of acting (`evaluate.latency.STRATEGIES`) whose reaction to `CompareConfig.latencies` is measured."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Other fields of `CompareConfig.train` that are its own, such as its data, by their dotted names."""

    @property
    def teacher(self) -> str | None:
        """Contender whose flow this one straightens; it starts from that one's weights."""
        return self.objective.teacher if isinstance(self.objective, Reflow) else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Changes:
    """Fields of a comparison to set anew; None: as they are."""

    seeds: tuple[int, ...] | None = None
    """Training seeds."""
    contenders: tuple[str, ...] | None = None
    """Names of the contenders to compare."""
    num_steps: int | None = None
    """Updates of each contender."""
    backbone_steps: int | None = None
    """Updates of the backbone that all start from."""
    episodes: int | None = None
    """Episodes in closed loop for each measurement."""
    evaluations: tuple[int, ...] | None = None
    """Network evaluations per chunk, of those that a contender is measured at."""
    run_dir: str | None = None
    """Folder for runs, logs, compare.html and compare.json."""


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """A comparison: every contender is trained alike and measured alike, once per seed."""

    train: TrainConfig
    """What all have in common: data, optimizer, batch, steps."""
    contenders: dict[str, Contender]
    backbone: ObjectiveConfig | None
    """Objective of a run of `train.policy` before all others, which all seeds of all contenders start from; None: they
    start from random weights."""
    env: str
    """Simulator for the closed loop."""
    env_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options of the simulator."""
    latencies: tuple[int, ...] = (0, 400)
    """Milliseconds from an observation to its chunk, in simulated time."""
    backbone_subtrees: tuple[str, ...] = ("image_encoder", "image_projector", "embedding", "backbone/layers/language")
    """Parameters that each contender takes over from that run; its head starts from random weights."""
    backbone_steps: int = 2000
    seeds: tuple[int, ...] = (0, 1, 2)
    episodes: int = 66
    """Episodes for each contender, sampler and number of evaluations."""
    measure_every: int | None = None
    """Updates from one measurement in closed loop to the next while a contender learns (its first sampler, and its most
    evaluations); None: it is measured at the end alone."""
    learnt: float = 0.5
    """Success from which on such a policy counts as one that follows the instruction."""
    control: bool = True
    """Measure latency by horizon and solver steps, for the table of high-rate control."""
    run_dir: str = "runs/compare"
    quick: Changes = Changes()
    """What `pi0 compare --quick` changes."""

    def changed(self, changes: Changes) -> CompareConfig:
        """The comparison with some fields set anew.

        Raises:
            UserError: no such contender, or one without its teacher.
        """
        names = self.contenders if changes.contenders is None else changes.contenders
        for name in names:
            if name not in self.contenders:
                hint = did_you_mean(name, self.contenders)
                raise UserError(f"there is no contender {name!r}; there are {', '.join(self.contenders)}.{hint}")
        contenders = {name: contender for name, contender in self.contenders.items() if name in names}
        if lacking := {c.teacher for c in contenders.values() if c.teacher is not None} - set(contenders):
            raise UserError(f"the contender {lacking.pop()!r} is another one's teacher; name it too.")
        if few := changes.evaluations:
            contenders = {
                name: dataclasses.replace(c, evaluations=tuple(n for n in c.evaluations if n in few) or c.evaluations)
                for name, c in contenders.items()
            }
        fields = {"seeds": "seeds", "backbone_steps": "backbone_steps", "episodes": "episodes", "run_dir": "run_dir"}
        fields["num_steps"] = "train.num_steps"
        new = {path: getattr(changes, name) for name, path in fields.items() if getattr(changes, name) is not None}
        return replace(self, {"contenders": contenders, **new})
