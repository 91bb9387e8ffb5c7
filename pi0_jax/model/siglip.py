"""SigLIP image encoder: a plain ViT without class token or pooling head (arXiv 2010.11929, 2303.15343)."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pi0_jax.config import VisionConfig
from pi0_jax.model import layers
from pi0_jax.model.attention import Kernel
from pi0_jax.model.declare import Leaf, Spec, Stack, linear
from pi0_jax.model.layers import Record
from pi0_jax.model.remat import Remat, rematerialised

xavier = nn.initializers.xavier_uniform()


def spec(config: VisionConfig) -> Spec:
    """Parameters of the encoder."""
    d, stem, patch = config.width, config.stem_width, config.patch_size
    heads = (config.num_heads, d // config.num_heads)
    project = linear(d, heads, ("embed", "heads", "head_dim"), xavier)
    block: Spec = {"attn_norm": layer_norm_spec(d)}
    block |= {"query": project, "key": project, "value": project}
    block |= {"out": linear(heads, d, ("heads", "head_dim", "embed"), xavier), "mlp_norm": layer_norm_spec(d)}
    block |= {
        "mlp_in": linear(d, config.mlp_dim, ("embed", "mlp")),
        "mlp_out": linear(config.mlp_dim, d, ("mlp", "embed")),
    }
    encoder: Spec = {}
    if stem:
        encoder = {"stem": _convolution(config.stem_stride, 3, stem), "stem_norm": layer_norm_spec(stem)}
        patch //= config.stem_stride
    encoder["patch_embedding"] = _convolution(patch, stem or 3, d)
    if config.position == "learned":
        shape = (1, (config.image_size // config.patch_size) ** 2, d)
        encoder["position_embedding"] = Leaf(shape, (None, "patch", "embed"), nn.initializers.normal(d**-0.5))
    return encoder | {"layers": Stack(config.depth, block), "norm": layer_norm_spec(d)}


def layer_norm_spec(width: int) -> Spec:
    """Scale and bias of a LayerNorm."""
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    return {"scale": Leaf((width,), ("embed",), ones), "bias": Leaf((width,), ("embed",), zeros)}


def _convolution(size: int, channels: int, width: int) -> Spec:
    axes = (None, None, None, "embed")
    return {
        "kernel": Leaf((size, size, channels, width), axes, nn.initializers.lecun_normal()),
        "bias": Leaf((width,), ("embed",), nn.initializers.zeros_init()),
    }


def encode(
    config: VisionConfig,
    w: Spec,
    images: Float[Array, "b y x 3"],
    dtype: jnp.dtype,
    kernel: Kernel = "xla",
    remat: Remat = "none",
    record: Record | None = None,
) -> Float[Array, "b s d"]:
    """Images in [-1, 1] to tokens, row by row from the top left; `image_projector` follows.

    Patch embedding and position embedding are float32, the blocks `dtype`.
    """
    x = images.astype(jnp.float32)
    patch = config.patch_size
    if config.stem_width:
        # Normalised, since objects on a plain table are a faint signal beside the position embedding.
        x = jax.nn.gelu(layers.layer_norm(patches(x, config.stem_stride, w["stem"]), w["stem_norm"]))
        patch //= config.stem_stride
    x = patches(x, patch, w["patch_embedding"])
    b, rows, columns, d = x.shape
    learned = config.position == "learned"
    x = x.reshape(b, rows * columns, d) + (w["position_embedding"] if learned else sincos2d(rows, columns, d)[None])
    block = rematerialised(functools.partial(layers.encoder_block, num_heads=config.num_heads, kernel=kernel), remat)
    stack = layers.cast_matrices(w["layers"], dtype)
    x, residuals = layers.through(lambda x, w: (y := block(x, w), y if record else None), x.astype(dtype), stack)
    if record:
        record("image_encoder/layers", layers.stacked(residuals))
    return layers.layer_norm(x, w["norm"])


def patches(x: Float[Array, "b y x c"], size: int, w: Spec) -> Float[Array, "b rows columns d"]:
    """A convolution over patches that do not overlap; with a flattened kernel, one matrix product."""
    if w["kernel"].ndim == 4:
        numbers = ("NHWC", "HWIO", "NHWC")
        y = jax.lax.conv_general_dilated(x, w["kernel"], (size, size), "VALID", dimension_numbers=numbers)
        return layers.add(y, w["bias"])
    b, rows, columns, channels = x.shape[0], x.shape[1] // size, x.shape[2] // size, x.shape[3]
    x = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, channels)
    return layers.linear(x.transpose(0, 1, 3, 2, 4, 5).reshape(b, rows, columns, -1), w)


def sincos2d(rows: int, columns: int, width: int, longest: float = 10_000.0) -> Float[Array, "s d"]:
    """Fixed position embedding: sine and cosine of row and column, a quarter of the width each (arXiv 2205.01580)."""
    y, x = jnp.mgrid[:rows, :columns].astype(jnp.float32).reshape(2, -1, 1)
    frequency = longest ** -jnp.linspace(0.0, 1.0, width // 4)
    return jnp.concatenate([f(p * frequency[None]) for p in (x, y) for f in (jnp.sin, jnp.cos)], axis=-1)
