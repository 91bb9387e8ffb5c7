"""What LeRobot and openpi in PyTorch have in common: how their network is watched while it samples, and its sizes.

torch is imported when a function is called. Both build the same modules, under the same names, from `transformers`.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any

import numpy as np

from pi0_jax.config import ModelConfig

_STAGES = {
    "image_layers": r"vision_tower\..*encoder\.layers\.(\d+)$",
    "language": r"language_model\.layers\.(\d+)\.self_attn\.v_proj$",
    "action": r"gemma_expert\.model\.layers\.(\d+)\.self_attn\.v_proj$",
}
"""Modules whose outputs are kept, by layer."""


def trace(
    network, sample: Callable[..., Any], model: ModelConfig, inputs: dict[str, np.ndarray]
) -> tuple[np.ndarray, dict[str, Any]]:
    """Samples actions in PyTorch and keeps what is computed on the way.

    Args:
        network: with `embed_prefix` and `denoise_step`, which `sample` calls.
        sample: takes lists of images `[b c y x]` and their masks, tokens, their mask, state and noise.
        model: sizes.
        inputs: as in `agree`.

    Returns:
        Actions `[b ah ad]`, and what `agree.valid_stages` takes, of the first step.
    """
    torch: Any = importlib.import_module("torch")

    kept = _keep_outputs(network)
    embed_prefix, denoise_step = network.embed_prefix, network.denoise_step
    seen: dict[str, Any] = {}

    def embed_and_keep(*args, **kwargs):
        tokens, mask, order = embed_prefix(*args, **kwargs)
        seen.setdefault("tokens", tokens.float().numpy())
        seen.setdefault("mask", mask.numpy())
        return tokens, mask, order

    def step_and_keep(*args, **kwargs):
        velocity = denoise_step(*args, **kwargs)
        seen.setdefault("velocity", velocity.float().numpy())
        return velocity

    network.embed_prefix, network.denoise_step = embed_and_keep, step_and_keep
    given = {name: torch.from_numpy(array) for name, array in inputs.items()}
    count = len(model.cameras)
    images = [given[f"images/{i}"].permute(0, 3, 1, 2) for i in range(count)]
    masks = [given[f"image_masks/{i}"] for i in range(count)]
    rest = [given[name] for name in ("tokens", "token_mask", "state", "noise")]
    with torch.no_grad():
        actions = sample(images, masks, *rest).float().numpy()
    return actions, seen | _by_layer(kept, seen["mask"], model)


def resize(config, model: ModelConfig) -> None:
    """Gives `transformers`' configuration of a PaliGemma the sizes that both frameworks have as constants."""
    config.text_config.vocab_size = config._vocab_size = model.vocab_size
    config.image_token_index = config.image_token_id = model.vocab_size - 1
    names = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "mlp_dim",
        "num_attention_heads": "num_heads",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }
    for theirs, ours in names.items():
        setattr(config.vision_config, theirs, getattr(model.vision, ours))
    config.vision_config.projection_dim = model.language.width


def _keep_outputs(network) -> dict[str, dict[int, list]]:
    """Hooks that keep the outputs of `_STAGES`, one list of calls a layer."""
    kept: dict[str, dict[int, list]] = {stage: {} for stage in _STAGES}
    for name, module in network.named_modules():
        for stage, pattern in _STAGES.items():
            if match := re.search(pattern, name):
                calls = kept[stage].setdefault(int(match[1]), [])

                def keep(module, arguments, output, calls=calls, once=stage == "action"):
                    if not (once and calls):
                        calls.append((output[0] if isinstance(output, tuple) else output).detach().float().numpy())

                module.register_forward_hook(keep)
    return kept


def _by_layer(kept: dict[str, dict[int, list]], mask: np.ndarray, model: ModelConfig) -> dict[str, np.ndarray]:
    """Outputs of all layers: of images, one camera after another; and values of prefix, state and actions."""
    images = [np.concatenate(calls) for _, calls in sorted(kept["image_layers"].items())]
    layers = range(model.depth)
    values = [np.concatenate([kept["language"][i][0], kept["action"][i][0]], axis=1) for i in layers]
    valid = np.concatenate([mask, np.ones(kept["action"][0][0].shape[:2], bool)], axis=1)
    return {"image_layers": np.stack(images), "values": np.stack(values), "values_mask": valid}
