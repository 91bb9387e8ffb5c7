"""SigLIP image encoder: a plain ViT without class token or pooling head (arXiv 2010.11929, 2303.15343)."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from pi0_jax.config import VisionConfig
from pi0_jax.model.attention import Kernel, attend
from pi0_jax.model.norm import named
from pi0_jax.model.remat import Remat, saveable

xavier = nn.initializers.xavier_uniform
zeros = nn.initializers.zeros_init()


class ImageEncoder(nn.Module):
    """Image to tokens: patches, transformer blocks, final norm; `image_projector` in `velocity.py` follows."""

    config: VisionConfig
    dtype: jnp.dtype
    remat: Remat = "full"
    attention: Kernel = "xla"

    @nn.compact
    def __call__(self, images: Float[Array, "b y x 3"]) -> Float[Array, "b s d"]:
        """Encodes images in [-1, 1]; tokens run row by row from the top left.

        Patch embedding and position embedding are float32, the blocks `dtype`.
        """
        c = self.config
        x = images.astype(jnp.float32)
        patch = c.patch_size
        if c.stem_width:
            # Normalised, since objects on a plain table are a faint signal beside the position embedding.
            x = nn.gelu(layer_norm(x.dtype, "stem_norm")(self._patches(c.stem_width, c.stem_stride, "stem")(x)))
            patch //= c.stem_stride
        x = self._patches(c.width, patch, "patch_embedding")(x)
        b, rows, columns, d = x.shape
        x = x.reshape(b, rows * columns, d)
        if c.position == "learned":
            init = named(nn.initializers.normal(d**-0.5), (None, "patch", "embed"))
            x += self.param("position_embedding", init, (1, rows * columns, d), jnp.float32)
        else:
            x += sincos2d(rows, columns, d)
        policy = saveable(self.remat)
        x, _ = nn.scan(
            Block if policy is None else nn.remat(Block, prevent_cse=False, policy=policy),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=c.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c, self.dtype, self.attention, name="layers")(x.astype(self.dtype), None)
        return layer_norm(self.dtype, "norm")(x)

    def _patches(self, width: int, size: int, name: str) -> nn.Conv:
        """A convolution over patches that do not overlap."""
        return nn.Conv(
            width,
            (size, size),
            (size, size),
            padding="VALID",
            kernel_init=named(nn.initializers.lecun_normal(), (None, None, None, "embed")),
            bias_init=named(zeros, ("embed",)),
            name=name,
        )


class Block(nn.Module):
    """Pre-norm transformer block: multi-head attention, then an MLP. The second value is for `nn.scan`."""

    config: VisionConfig
    dtype: jnp.dtype
    attention: Kernel = "xla"

    @nn.compact
    def __call__(self, x: Float[Array, "b s d"], _: None) -> tuple[Float[Array, "b s d"], None]:
        c = self.config
        heads = (c.num_heads, c.width // c.num_heads)

        def project(name: str) -> nn.DenseGeneral:
            return nn.DenseGeneral(
                heads,
                dtype=self.dtype,
                kernel_init=named(xavier(), ("embed", "heads", "head_dim")),
                bias_init=named(zeros, ("heads", "head_dim")),
                name=name,
            )

        def kept(y):
            return checkpoint_name(y, "vision")

        y = layer_norm(self.dtype, "attn_norm")(x)
        qkv = (kept(project(name)(y)) for name in ("query", "key", "value"))
        y = kept(attend(*qkv, kernel=self.attention))
        out = nn.DenseGeneral(
            c.width,
            axis=(-2, -1),
            dtype=self.dtype,
            kernel_init=named(xavier(), ("heads", "head_dim", "embed")),
            bias_init=named(zeros, ("embed",)),
            name="out",
        )
        x += kept(out(y))
        y = layer_norm(self.dtype, "mlp_norm")(x)
        y = nn.gelu(kept(dense(c.mlp_dim, ("embed", "mlp"), self.dtype, "mlp_in")(y)))
        return x + dense(c.width, ("mlp", "embed"), self.dtype, "mlp_out")(y), None


def dense(features: int, axes: tuple[str, str], dtype: jnp.dtype, name: str) -> nn.Dense:
    """A linear layer whose kernel and bias carry logical axis names."""
    return nn.Dense(
        features,
        dtype=dtype,
        kernel_init=named(nn.initializers.lecun_normal(), axes),
        bias_init=named(zeros, axes[1:]),
        name=name,
    )


def layer_norm(dtype: jnp.dtype, name: str) -> nn.LayerNorm:
    """LayerNorm with float32 statistics and named axes."""
    ones = nn.initializers.ones_init()
    return nn.LayerNorm(
        epsilon=1e-6, dtype=dtype, scale_init=named(ones, ("embed",)), bias_init=named(zeros, ("embed",)), name=name
    )


def sincos2d(rows: int, columns: int, width: int, longest: float = 10_000.0) -> Float[Array, "s d"]:
    """Fixed position embedding: sine and cosine of row and column, a quarter of the width each (arXiv 2205.01580)."""
    y, x = jnp.mgrid[:rows, :columns].astype(jnp.float32).reshape(2, -1, 1)
    frequency = longest ** -jnp.linspace(0.0, 1.0, width // 4)
    return jnp.concatenate([f(p * frequency) for p in (x, y) for f in (jnp.sin, jnp.cos)], axis=-1)
