"""The network of π0-FAST: image encoder and language expert, which writes action tokens (arXiv 2501.09747)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import gemma
from pi0_jax.model.declare import Spec
from pi0_jax.model.layers import Record
from pi0_jax.model.writer import Block, Writer


@dataclasses.dataclass(frozen=True)
class LanguageNetwork(Writer):
    """p(tokens | observation): the backbone alone, and a head tied to the embedding of its tokens."""

    experts = ("language",)

    @property
    def head_spec(self) -> Spec:
        """None: the head is the embedding."""
        return {}

    def joint(
        self, params: Spec, observation: Observation, blocks: Sequence[Block], record: Record | None = None
    ) -> list[Float[Array, "b _ d"]]:
        """Outputs of the language expert that predict the tokens of each block, in one pass.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            blocks: tokens after the prompt.
            record: takes the residual streams.
        """
        remat = self.config.remat
        segment, before = self.segment(params, observation, blocks, remat, record)
        (outputs,), _ = gemma.forward(self.config, params["backbone"], [segment], remat=remat, record=record)
        assert outputs is not None
        return [jnp.take_along_axis(outputs, places[..., None], axis=1) for places in before]


def network(config: ModelConfig) -> LanguageNetwork:
    """The network of a model without action expert.

    Raises:
        UserError: the model has one.
    """
    if config.variant != "pi0_fast":
        raise UserError(
            f"objective Autoregressive is for models of variant 'pi0_fast', which have no action expert; "
            f"policy.model.variant is {config.variant!r}. Beside an action expert, tokens are learnt by Joint."
        )
    return LanguageNetwork(config)
