"""What a robot needs: it travels inside each checkpoint."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pi0_jax.config.model import PI0, ModelConfig
from pi0_jax.config.objective import Condition, Gaussian, ObjectiveConfig
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Schedule
from pi0_jax.sampler import Decoder, Euler, Sampler

Normalization = Literal["zscore", "quantile"]
RealTimeMethod = Literal["guidance", "identity", "trained"]


@dataclasses.dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598): the network is evaluated with and without a
    condition. The weights have to be trained with the objective's `dropout`."""

    scale: float = 1.5
    """0 ignores the condition, 1 follows it (and costs twice the work of no guidance), larger values exaggerate it."""
    without: Condition = "prompt"
    """Conditioning dropped in the unconditional branch."""


@dataclasses.dataclass(frozen=True)
class RealTimeConfig:
    """How a chunk is made to go on where the previous one leads, for policies that act while they compute."""

    method: RealTimeMethod = "guidance"
    """guidance: real-time chunking as in arXiv 2506.07339, by the vector-Jacobian product through the network.
    identity: LeRobot's variant without that product. trained: the network was trained for it (`Gaussian.max_delay`),
    and goes on from the actions that are certain without any guidance."""
    schedule: Schedule = "exp"
    """Weights of the previous actions that are not certain (`flow.realtime.prefix_weights`). LeRobot: linear."""
    max_guidance: float = 5.0
    """Bound of the guidance. LeRobot: 10."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """What it takes to turn a raw observation into raw actions, besides weights, statistics and tokenizer."""

    robot: str
    """Name of the robot in `pi0_jax.data.robots`, or a Python file that defines one: its cameras, its state and action
    dimensions."""
    model: ModelConfig = PI0
    objective: ObjectiveConfig = Gaussian()
    """What the network learned, and so what its output means."""
    sampler: Sampler = Euler()
    """From noise, or from the observation's tokens, to actions."""
    guidance: Guidance | None = None
    """Classifier-free guidance; None: no guidance."""
    real_time: RealTimeConfig = RealTimeConfig()
    """How a chunk goes on where the previous one leads, if it is asked for with what is left of that one."""
    normalization: Normalization = "zscore"
    """zscore: mean and standard deviation (π0). quantile: 1 % and 99 % quantiles to [-1, 1] (π0.5)."""
    action_semantics: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """Meaning of each action dimension (`data.robots.SEMANTICS`) by robot, where it is not what the robot declares. A
    checkpoint keeps the meaning that it was trained with beside its statistics."""
    state_in_prompt: bool = True
    """π0.5: the normalised state is part of the prompt, as integers (openpi: `discrete_state_input`). False: the policy
    does not see it, as in openpi's `pi05_libero`. π0 has a token for it either way."""
    subtask_every: int = 0
    """Chunks for which a subtask holds that the policy writes for itself before it acts (objective `Joint`, trained on
    subtasks). 0: it writes none. A subtask that comes with the observation is taken instead."""
    execute_steps: int = 4
    """Actions of each chunk that are executed before the policy is asked again."""

    def check(self) -> None:
        """Raises UserError for an objective, a sampler, guidance and a normalisation that do not go together."""
        decodes = self.objective.decodes
        if decodes != isinstance(self.sampler, Decoder):
            suited = "Greedy" if decodes else "a solver, such as Euler"
            raise UserError(
                f"objective {type(self.objective).__name__} is sampled by {suited}; policy.sampler is "
                f"{type(self.sampler).__name__}."
            )
        if decodes and self.guidance is not None:
            raise UserError("policy.guidance steers a flow; this network predicts action tokens.")
        if hasattr(self.objective, "bins") and self.normalization != "quantile":
            raise UserError(
                "action tokens have their bins between the 1st and the 99th percentile, which takes quantile "
                f"normalisation; it is {self.normalization!r} (--policy.normalization quantile)."
            )
        if self.subtask_every and not self.objective.text_tokens:
            raise UserError(
                f"policy.subtask_every is {self.subtask_every}, and objective {type(self.objective).__name__} writes "
                "no text: take Joint with text_tokens above 0, or 0 subtasks."
            )
        _ = getattr(self.sampler, "grid", None)  # which refuses numbers of steps below 1
