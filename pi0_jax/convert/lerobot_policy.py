"""Runs a policy folder in LeRobot itself, where it is installed: the only place that imports torch, when it is called.

LeRobot 0.6 needs Python 3.12. Models of other sizes than the released ones run too: LeRobot's constants are replaced
for the time of the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib
import importlib.util
import io
import json
import re
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pi0_jax.config import ModelConfig

_STAGES = {
    "image_layers": r"vision_tower\..*encoder\.layers\.(\d+)$",
    "language": r"language_model\.layers\.(\d+)\.self_attn\.v_proj$",
    "action": r"gemma_expert\.model\.layers\.(\d+)\.self_attn\.v_proj$",
}
"""Modules whose outputs are kept, by layer."""


def check_installed() -> None:
    """Raises ValueError, with what to install, where LeRobot or torch is not there."""
    if importlib.util.find_spec("lerobot") is None or importlib.util.find_spec("torch") is None:
        raise ValueError(
            "--verify-with lerobot runs LeRobot itself, which is not installed here. In an environment with Python "
            "3.12 or newer: pip install pi0_jax 'lerobot[pi]==0.6.1', and run the same command there."
        )


def run(folder: Path, model: ModelConfig, inputs: dict[str, np.ndarray], steps: int) -> tuple[np.ndarray, dict]:
    """Loads a folder strictly, passes its processors a vector, and samples from the noise; float32.

    Args:
        folder: a LeRobot policy.
        model: its sizes.
        inputs: as in `agree`.
        steps: Euler steps.

    Returns:
        Actions `[b ah ad]`, and what `agree.valid_stages` takes.

    Raises:
        ValueError: LeRobot does not find every tensor, or finds tensors that it does not know.
    """
    torch: Any = importlib.import_module("torch")

    check_processors(folder)
    policy = load(folder, model)
    kept, handles = _keep_outputs(policy.model)
    embed_prefix, denoise_step = policy.model.embed_prefix, policy.model.denoise_step
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

    count = len(model.cameras)
    observation = [
        [torch.from_numpy(inputs[f"images/{i}"]).permute(0, 3, 1, 2) for i in range(count)],
        [torch.from_numpy(inputs[f"image_masks/{i}"]) for i in range(count)],
        torch.from_numpy(inputs["tokens"]),
        torch.from_numpy(inputs["token_mask"]),
    ]
    if model.variant == "pi0":
        observation.append(torch.from_numpy(inputs["state"]))
    policy.model.embed_prefix, policy.model.denoise_step = embed_and_keep, step_and_keep
    with torch.no_grad():
        noise = torch.from_numpy(inputs["noise"])
        actions = policy.model.sample_actions(*observation, noise=noise, num_steps=steps).float().numpy()
    for handle in handles:
        handle.remove()
    del policy, embed_prefix, denoise_step
    gc.collect()
    return actions, seen | _by_layer(kept, seen["mask"], model)


def load(folder: Path, model: ModelConfig):
    """LeRobot's policy of a folder, in float32 on the CPU, after a load that left no key over and none out."""
    config_class = importlib.import_module("lerobot.configs.policies").PreTrainedConfig
    name, kind = {"pi0": ("pi0", "PI0Policy"), "pi05": ("pi05", "PI05Policy")}[model.variant]
    module = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    config = config_class.from_pretrained(folder)
    config.dtype, config.device, config.compile_model = "float32", "cpu", False
    said = io.StringIO()
    with _resized(module, model), contextlib.redirect_stdout(said):
        policy = getattr(module, kind).from_pretrained(folder, config=config, strict=True)
    # Where keys are missing it prints a warning and goes on.
    if "All keys loaded successfully!" not in said.getvalue():
        raise ValueError(f"LeRobot did not load everything of {folder}:\n{said.getvalue()}")
    return policy.float().eval()


def check_processors(folder: Path) -> None:
    """Loads both processors in LeRobot, and passes an action through the one that unnormalises.

    Raises:
        ValueError: it comes out elsewhere than the statistics say.
    """
    torch: Any = importlib.import_module("torch")

    for name in ("pi0", "pi05"):
        importlib.import_module(f"lerobot.policies.{name}.processor_{name}")  # registers the steps
    pipeline = importlib.import_module("lerobot.processor").PolicyProcessorPipeline
    converters = importlib.import_module("lerobot.processor.converters")
    if not (folder / "policy_postprocessor.json").is_file() or not (folder / "norm_stats.json").is_file():
        return
    after = pipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=converters.policy_action_to_transition,
        to_output=converters.transition_to_policy_action,
    )
    tokenizer = {"tokenizer": lambda *_, **__: None, "tokenizer_name": None}
    pipeline.from_pretrained(
        folder, config_filename="policy_preprocessor.json", overrides={"tokenizer_processor": tokenizer}
    )
    stats = json.loads((folder / "norm_stats.json").read_text())["norm_stats"]["actions"]
    mode = json.loads((folder / "config.json").read_text())["normalization_mapping"]["ACTION"]
    expected = stats["mean"] if mode == "MEAN_STD" else (np.add(stats["q01"], stats["q99"]) / 2).tolist()
    found = after(torch.zeros(1, len(expected))).numpy()[0]
    if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
        raise ValueError(f"LeRobot's processor of {folder} turns 0 into {found}, and the statistics say {expected}.")


def _keep_outputs(network) -> tuple[dict[str, dict[int, list]], list]:
    """Hooks that keep the outputs of `_STAGES`, one list of calls a layer."""
    kept: dict[str, dict[int, list]] = {stage: {} for stage in _STAGES}
    handles = []
    for name, module in network.named_modules():
        for stage, pattern in _STAGES.items():
            if match := re.search(pattern, name):
                calls = kept[stage].setdefault(int(match[1]), [])

                def keep(module, arguments, output, calls=calls, once=stage == "action"):
                    if not (once and calls):
                        calls.append((output[0] if isinstance(output, tuple) else output).detach().float().numpy())

                handles.append(module.register_forward_hook(keep))
    return kept, handles


def _by_layer(kept: dict[str, dict[int, list]], mask: np.ndarray, model: ModelConfig) -> dict[str, np.ndarray]:
    """Outputs of all layers: of images, one camera after another; and values of prefix, state and actions."""
    images = [np.concatenate(calls) for _, calls in sorted(kept["image_layers"].items())]
    layers = range(model.depth)
    values = [np.concatenate([kept["language"][i][0], kept["action"][i][0]], axis=1) for i in layers]
    valid = np.concatenate([mask, np.ones(kept["action"][0][0].shape[:2], bool)], axis=1)
    return {"image_layers": np.stack(images), "values": np.stack(values), "values_mask": valid}


@contextlib.contextmanager
def _resized(module, model: ModelConfig):
    """Makes LeRobot's module build a model of these sizes; it has those of the released ones as constants."""

    def gemma(variant: str):
        expert = model.language if variant == "gemma_2b" else model.action
        heads = (model.num_heads, model.num_kv_heads, model.head_dim)
        return module.GemmaConfig(expert.width, model.depth, expert.mlp_dim, *heads)

    paligemma, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    vision = dataclasses.asdict(model.vision)
    names = {
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "intermediate_size": "mlp_dim",
        "num_attention_heads": "num_heads",
        "patch_size": "patch_size",
        "image_size": "image_size",
    }

    def make_paligemma(config):
        config.text_config.vocab_size = config._vocab_size = model.vocab_size
        config.image_token_index = config.image_token_id = model.vocab_size - 1
        for theirs, ours in names.items():
            setattr(config.vision_config, theirs, vision[ours])
        config.vision_config.projection_dim = model.language.width
        return paligemma(config=config)

    def make_expert(config):
        config.vocab_size = model.vocab_size
        return expert(config=config)

    with (
        mock.patch.object(module, "get_gemma_config", gemma),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", make_paligemma),
        mock.patch.object(module, "PiGemmaForCausalLM", make_expert),
    ):
        yield
