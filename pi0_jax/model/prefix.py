"""What all networks share: an observation's images and prompt as tokens, and the backbone that reads them."""

from __future__ import annotations

import dataclasses
from types import MappingProxyType
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.spmd import with_logical_constraint
from jaxtyping import Array, Bool, Float, Int, Key

from pi0_jax.batch import Observation
from pi0_jax.config import ModelConfig
from pi0_jax.errors import UserError
from pi0_jax.model import gemma, layers, siglip
from pi0_jax.model.declare import Declare, Leaf, Spec, linear
from pi0_jax.model.layers import Record
from pi0_jax.model.remat import Remat


@dataclasses.dataclass(frozen=True)
class PrefixNetwork:
    """Image encoder, token embedding and backbone; a head is a subclass. Functions of parameters, with none of its own.

    Parameters are those of training or folded ones (`fold.py`).
    """

    config: ModelConfig
    experts: ClassVar[tuple[gemma.Expert, ...]] = ("language", "action")
    writes: ClassVar[bool] = False
    """Whether the language expert's outputs are asked for, as tokens of the vocabulary (`model.writer`)."""

    @property
    def spec(self) -> Spec:
        """All parameters, the head's included."""
        c = self.config
        spec: Spec = {}
        if c.cameras:
            spec["image_encoder"] = siglip.spec(c.vision)
            spec["image_projector"] = linear(c.vision.width, c.language.width, ("embed", "embed_out"))
        shape, init = (c.vocab_size, c.language.width), nn.initializers.normal(c.language.width**-0.5)
        spec["embedding"] = Leaf(shape, ("vocab", "embed"), init)
        return spec | {"backbone": gemma.spec(c, self.experts)} | self.head_spec

    @property
    def head_spec(self) -> Spec:
        """The head's own parameters."""
        raise NotImplementedError

    def init(self, key: Key[Array, ""]) -> dict[str, Any]:
        """Random parameters in linen's boxes, which carry the logical axis names (`flax.linen.meta.unbox`)."""
        return dict(Declare(MappingProxyType(self.spec)).init(key, method="declare")["params"])

    def unrolled(self, params: Spec) -> Spec:
        """Parameters whose backbone is not scanned (`gemma.unrolled`); the same functions run them."""
        return params | {"backbone": gemma.unrolled(params["backbone"], self.dtype)}

    def module(self) -> NetworkModule:
        """The network as a linen module, for its tools: `module().apply({"params": params}, observation, ...)`."""
        return NetworkModule(MappingProxyType(self.spec), self)

    @property
    def dtype(self) -> jnp.dtype:
        """Of activations."""
        return jnp.dtype(self.config.dtype)

    def embed_prefix(
        self, params: Spec, observation: Observation, remat: Remat = "none", record: Record | None = None
    ) -> tuple[Float[Array, "b s d"], Bool[Array, "b s"]]:
        """Image tokens in the order of `config.cameras`, then prompt tokens; and which of them are valid.

        All cameras go through the encoder as one batch.

        Raises:
            UserError: the observation lacks a camera of the config.
        """
        c = self.config
        missing = [name for name in c.cameras if name not in observation.images]
        if missing:
            raise UserError(
                f"the observation lacks cameras {missing}; it has {sorted(observation.images)}. "
                "Rename them in the robot, mask them with `image_masks`, or leave them out of `ModelConfig.cameras`."
            )
        tokens, masks = [], []
        if c.cameras:
            # All of an example are neighbours: one camera after another, a divided batch would travel between devices.
            images = jnp.stack([observation.images[name] for name in c.cameras], axis=1)
            b, cameras = images.shape[:2]
            flat, encoder = images.reshape(b * cameras, *images.shape[2:]), params["image_encoder"]
            encoded = siglip.encode(c.vision, encoder, flat, self.dtype, c.attention, remat, record)
            projected = layers.linear(encoded, params["image_projector"], self.dtype)
            tokens.append(projected.reshape(b, -1, projected.shape[-1]))
            there = jnp.stack([observation.image_masks[name] for name in c.cameras], axis=1)
            masks.append(jnp.repeat(there, projected.shape[1], axis=1))
        tokens.append(self.embed_tokens(params, observation.prompt))
        masks.append(observation.prompt_mask)
        embedded = with_logical_constraint(jnp.concatenate(tokens, axis=1), ("batch", None, None))
        return embedded, jnp.concatenate(masks, axis=1)

    def embed_tokens(self, params: Spec, tokens: Int[Array, "b t"]) -> Float[Array, "b t d"]:
        """Embedded ids of the vocabulary, scaled as Gemma has it."""
        embedded = params["embedding"][tokens]
        return (embedded * jnp.sqrt(self.config.language.width).astype(embedded.dtype)).astype(self.dtype)

    def embed_state(self, params: Spec, observation: Observation) -> Float[Array, "b 1 d"] | None:
        """π0's state token; None for the other variants, which have the state in their prompts."""
        if self.config.variant != "pi0":
            return None
        return layers.linear(jnp.asarray(observation.state), params["state_in"])[:, None].astype(self.dtype)


class NetworkModule(Declare):
    """A network as a linen module: declares its parameters, calls its functions, and sows the residual streams."""

    network: Any

    def __call__(self, *args: Any, method: str = "joint") -> Any:
        """Calls a method of the network that takes `record`; residual streams go to the collection "intermediates"."""

        def record(name: str, stream: jax.Array) -> None:
            self.sow("intermediates", name, stream)

        return getattr(self.network, method)(self.declare(), *args, record=record)
