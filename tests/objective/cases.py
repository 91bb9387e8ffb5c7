"""The objectives and heads whose numbers, as version 1 of this package gave them, `tests/goldens` holds."""

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.config import (
    Beta,
    Compact,
    ConditionDropout,
    Cosine,
    ExpertConfig,
    Gaussian,
    LogitNormal,
    OptimalTransport,
    Shortcut,
    Sinkhorn,
    Tokens,
    Uniform,
    VisionConfig,
)
from pi0_jax.pi0 import init_params

COMPACT = Compact(width=32, depth=2, time_width=16)
STEM = VisionConfig(
    width=16, depth=2, mlp_dim=32, num_heads=2, image_size=16, patch_size=8, stem_width=4, stem_stride=2,
    position="sincos2d",
)  # fmt: skip
LORA = {
    "language": ExpertConfig(24, 48, lora_attn_rank=2, lora_mlp_rank=3, lora_scale=2.0),
    "action": ExpertConfig(16, 32, lora_attn_rank=2),
}
DIFFUSION = {"path": Cosine(), "time": Uniform()}

CASES = {
    "gaussian": ({}, Gaussian()),
    "pi05": ({"variant": "pi05"}, Gaussian()),
    "lora": (LORA, Gaussian()),
    "draws_regression": ({}, Gaussian(draws=3, regression_draw=True, time=Beta(2.5))),
    "uniform_dropout": ({}, Gaussian(time=Uniform(), dropout=ConditionDropout(0.2, 0.2, 0.1))),
    "logit_normal_masks": ({}, Gaussian(time=LogitNormal(), mask_padded_dims=True, mask_padded_steps=False)),
    "optimal": ({}, Gaussian(coupling=OptimalTransport(0.02))),
    "sinkhorn": ({}, Gaussian(coupling=Sinkhorn(0.02))),
    "max_delay": ({}, Gaussian(max_delay=3, draws=2)),
    "noise": ({}, Gaussian(predicts="noise", **DIFFUSION)),
    "v": ({}, Gaussian(predicts="v", **DIFFUSION)),
    "shortcut": ({}, Shortcut()),
    "compact": ({"head": COMPACT}, Gaussian()),
    "compact_adaln": ({"head": Compact(32, 2, 16, "attention", "adaln")}, Gaussian()),
    "compact_shortcut": ({"head": COMPACT}, Shortcut()),
    "bins": ({}, Tokens(bins=8, dims=3)),
    "bin_sequence": ({}, Tokens(bins=8, dims=3, order="autoregressive")),
    "stem_sincos": ({"vision": STEM}, Gaussian()),
}
"""Name to changes of the tiny model, and the objective."""


def weights(objective):
    """Small random parameters; a random initialisation would take long to compile."""
    random = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda key: init_params(objective, key), jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(0.2 * random.standard_normal(x.shape, np.float32)), shapes)
