"""Draws what sees what when each recipe trains: the masks of one pass of a small network, as it builds them.

Run:     python benchmarks/recipe_masks.py docs/figures/recipe_masks.svg
"""

from __future__ import annotations

import dataclasses
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
from flax.linen import meta
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from pi0_jax.batch import example_batch
from pi0_jax.config import Autoregressive, ExpertConfig, Fast, Gaussian, Joint, ModelConfig, VisionConfig
from pi0_jax.model import gemma
from pi0_jax.model.mask import may_attend
from pi0_jax.objective import make_objective

PATCHES, WORDS, TEXT, CODES, ACTIONS = 4, 3, 3, 5, 4
"""Tokens of each kind."""
SMALL = ExpertConfig(width=8, mlp_dim=8)
MODEL = ModelConfig(
    variant="pi05", vision=VisionConfig(width=8, depth=1, mlp_dim=8, num_heads=1, image_size=28), language=SMALL,
    action=SMALL, depth=1, num_heads=1, head_dim=8, vocab_size=32, cameras=("base_0_rgb",), action_dim=2,
    action_horizon=ACTIONS, prompt_length=WORDS, dtype="float32", remat="none",
)  # fmt: skip
CODEC = Fast(skip=0, max_tokens=CODES)
PREFIX = {"images": PATCHES, "prompt": WORDS}
RECIPES: dict[str, tuple[Any, str, dict[str, int]]] = {
    "flow": (Gaussian(), "pi05", {**PREFIX, "actions": ACTIONS}),
    "tokens (π0-FAST)": (Autoregressive(codec=CODEC), "pi0_fast", {**PREFIX, "action tokens": CODES}),
    "joint (π0.5), insulated": (
        Joint(codec=CODEC, text_tokens=TEXT),
        "pi05",
        {**PREFIX, "text": TEXT, "action tokens": CODES, "actions": ACTIONS},
    ),
}


def trained_pass(objective: Any, variant: Any) -> tuple[np.ndarray, list[tuple[int, bool]]]:
    """The mask of one pass of training, and each segment's length and whether it reads those before with gradients."""
    made = make_objective(objective, dataclasses.replace(MODEL, variant=variant))
    batch, key, found = example_batch(MODEL, 1, objective.target_length), jax.random.key(0), []

    def layout_of(config, segments, prefix=None, real=gemma.layout_of):
        mask_ar = np.concatenate([segment.mask_ar for segment in segments])
        group = [np.zeros_like(s.mask_ar) if s.group is None else s.group for s in segments]
        reads = [(len(segment.mask_ar), segment.reads_with_gradient) for segment in segments]
        found.append((may_attend(mask_ar, np.concatenate(group)), reads))
        return real(config, segments, prefix)

    def trained(key):
        draws, count = made.draw(batch, key, 0)
        return made.loss(meta.unbox(made.network.init(key)), draws, count)

    with mock.patch.object(gemma, "layout_of", layout_of):
        jax.eval_shape(trained, key)  # masks do not depend on values
    return found[-1]


def panel(axes: Any, name: str, sizes: dict[str, int], mask: np.ndarray, segments: list[tuple[int, bool]]) -> None:
    """Draws one mask: blue where a row sees a column, pale where no gradient comes back from it."""
    assert sum(sizes.values()) == len(mask)
    values, start = mask.astype(int), 0
    for length, with_gradient in segments:
        if not with_gradient:
            values[start : start + length, :start] *= 2
        start += length
    axes.imshow(values, cmap=ListedColormap(["white", "#2563eb", "#93c5fd"]), vmin=0, vmax=2)
    ends = np.cumsum([0, *sizes.values()])
    for end in ends[1:-1]:
        axes.axhline(end - 0.5, color="grey", linewidth=0.6)
        axes.axvline(end - 0.5, color="grey", linewidth=0.6)
    middles = [(a + b - 1) / 2 for a, b in pairwise(ends)]
    axes.set_yticks(middles, list(sizes))
    axes.set_xticks(middles, list(sizes), rotation=35, ha="right")
    axes.tick_params(length=0)
    axes.set_title(name, fontsize=10)


def main(path: Path) -> None:
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, (name, (objective, variant, sizes)) in zip(
        figure.subplots(1, len(RECIPES)), RECIPES.items(), strict=True
    ):
        panel(axes, name, sizes, *trained_pass(objective, variant))
    figure.supxlabel("seen", fontsize=9)
    figure.supylabel("who sees", fontsize=9)
    figure.savefig(path, metadata={"Date": None})
    print(path)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures/recipe_masks.svg"))
