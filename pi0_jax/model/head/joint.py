"""π0.5 as it was published: the language expert writes text and action tokens, beside an action expert's flow.

    [ images, prompt ]   language expert   both ways among themselves
    [ text ]             language expert   causal
    [ action tokens ]    language expert   causal; seen by nothing after them
    [ actions ]          action expert     see images, prompt and text, not the action tokens

So the flow learns without knowing its answer, and acts without action tokens. With insulation no gradient goes from
the action expert into the keys and values that it reads (arXiv 2505.23705).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pi0_jax.batch import Observation
from pi0_jax.config import Expert, ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import gemma
from pi0_jax.model.declare import Spec
from pi0_jax.model.gemma import Prefix
from pi0_jax.model.head.expert import ExpertNetwork
from pi0_jax.model.layers import Record
from pi0_jax.model.writer import Block, Writer


@dataclasses.dataclass(frozen=True)
class JointNetwork(Writer, ExpertNetwork):
    """The network of π0.5 whose language expert writes; its parameters are the same."""

    insulate: bool = True

    def write_and_flow(
        self,
        params: Spec,
        observation: Observation,
        blocks: Sequence[Block],
        x: Float[Array, "b s ah ad"],
        time: Float[Array, "b *s_or_ah"],
        *,
        unseen: int = 0,
    ) -> tuple[list[Float[Array, "b _ d"]], Float[Array, "b s ah ad"]]:
        """One pass over everything, for training.

        Args:
            params: of this network.
            observation: images in [-1, 1].
            blocks: tokens after the prompt.
            x: noisy chunks of s draws.
            time: flow time, one per draw or per action.
            unseen: how many of the blocks, the last ones, the actions do not see.

        Returns:
            Outputs that predict the tokens of each block, and the velocity.
        """
        remat, b = self.config.remat, len(x)
        language, before = self.segment(params, observation, blocks, remat, unseen=unseen)
        actions, condition = self._embed_draws(params, x, time)
        suffix = self._suffix(self.embed_state(params, observation), actions, condition, x.shape[1])
        assert suffix.group is not None
        group = np.where(suffix.group > 0, suffix.group + unseen, 0)
        suffix = suffix._replace(group=group, reads_with_gradient=not self.insulate)
        (written, outputs), _ = gemma.forward(self.config, params["backbone"], [language, suffix], remat=remat)
        assert written is not None
        assert outputs is not None
        hidden = [jnp.take_along_axis(written, places[..., None], axis=1) for places in before]
        return hidden, self._project(params, outputs[:, -actions.shape[1] :]).reshape(b, *x.shape[1:])

    def prefill(
        self, params: Spec, observation: Observation, record: Record | None = None, text: Block | None = None
    ) -> Prefix:
        """As of `ExpertNetwork`, with text that was written after the prompt."""
        segment, _ = self.segment(params, observation, [] if text is None else [text], record=record)
        _, keys_values = gemma.forward(self.config, params["backbone"], [segment], record=record)
        return self.against(params, observation, gemma.prefix_of(segment, keys_values))

    def against(self, params: Spec, observation: Observation, prefix: Prefix) -> Prefix:
        """What was read and written, as a prefix that `velocity` takes."""
        return self.placed(prefix._replace(state=self.embed_state(params, observation)))


def network(config: ModelConfig, insulate: bool) -> JointNetwork:
    """The network of a model with an action expert.

    Raises:
        UserError: it has none.
    """
    if not isinstance(config.head, Expert):
        raise UserError(f"objective Joint needs the head Expert; policy.model.head is {type(config.head).__name__}.")
    return JointNetwork(config, insulate=insulate)
