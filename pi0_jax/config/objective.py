"""What a policy learns, as values. One class per objective; `objective/<name>.py` says what it computes."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal

from pi0_jax.flow.coupling import Coupling, Independent
from pi0_jax.flow.path import Path, Predicts, Straight
from pi0_jax.flow.time import Beta, TimeDistribution, Uniform

Condition = Literal["prompt", "images", "both"]


@dataclasses.dataclass(frozen=True)
class ConditionDropout:
    """Probabilities with which an example is trained without the prompt, the images, or both, for classifier-free
    guidance. What is dropped is masked, so that no token attends to it: that is the null condition. The state stays
    (π0.5 has it in the prompt)."""

    prompt: float = 0.0
    images: float = 0.0
    both: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Common:
    decodes: ClassVar[bool] = False
    """Whether actions are decoded token by token; else a solver integrates a flow."""
    codec: ClassVar[Fast | None] = None
    """How action chunks are written as tokens; None: they are not."""
    text_tokens: ClassVar[int] = 0
    """Room for text that is written before actions; 0: none is."""
    lowercase: ClassVar[bool] = False
    """Whether prompts are in lower case."""
    target_length: ClassVar[int] = 0
    """Room for the tokens that an example's `Batch.targets` has; 0: the objective learns none."""
    blank_cameras: ClassVar[bool] = False
    """Whether cameras that a robot lacks are seen, black; else they are left out."""
    recipe: ClassVar[str] = ""
    """What is learnt, in the field's words."""
    dropout: ConditionDropout = ConditionDropout()
    mask_padded_steps: bool = True
    """Leave steps after the episode's end out of the loss. openpi counts them: set False to match it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Regression(_Common):
    time: TimeDistribution = Beta()
    """Distribution of the flow time."""
    draws: int = 1
    """Draws of (noise, time) per observation and step; they share the prefix, so more draws cost little."""
    mask_padded_dims: bool = False
    """Leave zero-padded action dimensions out of the loss. The released weights were trained with them in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(_Regression):
    """Flow matching and diffusion: the network says, at a random point of a Gaussian path from actions to noise, which
    way the path goes. The defaults are π0's (Lipman et al. 2022, arXiv 2210.02747; arXiv 2410.24164)."""

    path: Path = Straight()
    predicts: Predicts = "velocity"
    """What the network's output means: velocity dx/dt, noise (Ho et al. 2020, arXiv 2006.11239), data, or
    v = alpha · noise - sigma · actions (Salimans and Ho 2022, arXiv 2202.00512). Any sampler runs any of them."""
    coupling: Coupling = Independent()
    """Which noise goes with which actions of a batch."""
    regression_draw: bool = False
    """Take one of the draws at x = 0, t = 1 instead of at random: its target is minus the conditional mean action. That
    is behaviour cloning by regression, and no noise hides from the network what the instruction means."""
    regression_warmup_steps: int = 0
    """Train on that draw alone for so many steps at first. A network that starts from random weights has to find out
    which object the instruction means, and noisy actions among its inputs hide that for long."""
    max_delay: int = 0
    """Training-time real-time chunking (arXiv 2512.05964): the network learns to go on from a prefix of up to so many
    clean actions, whose number is drawn uniformly from 0 to this per draw. 0: no such training."""

    @property
    def recipe(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is learnt."""
        return "flow matching" if self.predicts == "velocity" else f"diffusion, predicts {self.predicts}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shortcut(_Regression):
    """Average velocities over spans of time, for few steps (Frans et al. 2024, arXiv 2410.12557)."""

    recipe: ClassVar[str] = "shortcut model"
    bootstrap_fraction: float = 0.25
    """Fraction of the examples trained on the self-consistency target: one step of d equals two steps of d / 2. The
    others learn the velocity itself."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reflow(_Regression):
    """Rectified flow: straight lines from noise to the actions that a teacher's flow makes of it (Liu et al. 2022,
    arXiv 2209.03003)."""

    recipe: ClassVar[str] = "rectified flow of a teacher"
    teacher: str
    """Checkpoint of the teacher, a flow of the same network."""
    teacher_steps: int = 20
    """Euler steps in which the teacher makes actions from noise."""
    time: TimeDistribution = Uniform()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tokens(_Common):
    """Discretised actions: cross-entropy over uniform bins, after RT-2 (arXiv 2307.15818)."""

    decodes: ClassVar[bool] = True
    recipe: ClassVar[str] = "actions in uniform bins, by cross-entropy"
    bins: int = 256
    """Bins per action dimension, uniform between its 1st and 99th percentile: needs quantile normalisation."""
    dims: int | None = None
    """Action dimensions that are predicted, the first ones; None: all, padding included."""
    order: Literal["parallel", "autoregressive"] = "parallel"
    """parallel: all bins at once. autoregressive: each given those before it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fast:
    """Action tokens of the FAST codec (arXiv 2501.09747) in the language expert's vocabulary."""

    skip: int = 128
    """Ids at the vocabulary's end that stay free: code t is id vocab_size - 1 - skip - t. π0-FAST's 128 are PaliGemma's
    `<seg>` tokens; 1152 leaves its `<loc>` tokens free, too."""
    max_tokens: int = 256
    """Room for action tokens: marker, codes, `|` and EOS."""
    bos: bool = False
    """Begin action tokens with a BOS, as LeRobot's π0-FAST does; it is given, not learnt."""
    own_table: int = 0
    """Codes with an embedding table and a linear head of their own beside the vocabulary, as in OpenTau's π0.5, and at
    least as many as the codec has; only codes are learnt then, without `|` and EOS. 0: codes are ids of the
    vocabulary, as everywhere else. Objective `Joint`."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Autoregressive(_Common):
    """π0-FAST (arXiv 2501.09747): the language expert writes action tokens, and there is no other expert."""

    decodes: ClassVar[bool] = True
    recipe: ClassVar[str] = "π0-FAST: action tokens alone, by cross-entropy"
    codec: Fast = Fast()  # pyright: ignore[reportIncompatibleVariableOverride]
    lowercase: bool = True  # pyright: ignore[reportIncompatibleVariableOverride]
    """Instructions are read in lower case, as openpi's π0-FAST does and LeRobot's does not."""
    blank_cameras: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]
    """Cameras that a robot lacks are seen, black, as openpi trained its π0-FAST; else they are left out."""
    reduction: Literal["example", "token"] = "example"
    """example: the mean over an example's tokens, then over examples, as in openpi. token: over all tokens of the
    batch, as in LeRobot."""

    @property
    def target_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Room for action tokens."""
        return self.codec.max_tokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class Joint(_Common):
    """π0.5's own recipe: the language expert writes text and action tokens, and the action expert learns a flow beside
    it (arXiv 2504.16054), whose gradient stays out of the language expert (arXiv 2505.23705)."""

    flow: Gaussian = Gaussian()
    codec: Fast | None = Fast(skip=1152)  # pyright: ignore[reportIncompatibleVariableOverride]
    """Action tokens; None: only text is written."""
    text_tokens: int = 48  # pyright: ignore[reportIncompatibleVariableOverride]
    """Room for text."""
    text_weight: float = 1.0
    """Of the cross-entropy of text."""
    token_weight: float = 1.0
    """Of the cross-entropy of action tokens."""
    flow_weight: float = 1.0
    """Of the flow's loss. π0.5 without insulation: 0, and 10 later on."""
    insulate: bool = True
    """Stop the flow's gradient at the keys and values of the language expert (knowledge insulation)."""
    reduction: Literal["example", "token", "place"] = "example"
    """As of `Autoregressive`, for text and action tokens apart. place: over all places that there is room for, empty
    ones too, as in OpenTau: what is longer counts for more."""

    @property
    def recipe(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What is learnt, with or without insulation."""
        tokens = " and ".join(["text"] * (self.text_tokens > 0) + ["action tokens"] * (self.codec is not None))
        tokens += " of a table of their own" if self.codec and self.codec.own_table else ""
        how = "insulated" if self.insulate else "whose gradient reaches the language expert"
        return f"π0.5 joint: {tokens} by cross-entropy, beside a flow, {how}"

    @property
    def max_delay(self) -> int:
        """Of the flow."""
        return self.flow.max_delay

    @property
    def target_length(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Room for text and action tokens."""
        return self.text_tokens + (self.codec.max_tokens if self.codec else 0)


ObjectiveConfig = Gaussian | Shortcut | Reflow | Tokens | Autoregressive | Joint
