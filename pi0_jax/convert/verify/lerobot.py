"""Runs a policy folder in LeRobot itself, where it is installed.

LeRobot 0.6 needs Python 3.12. Models of other sizes than the released ones run too: LeRobot's constants are replaced
for the time of the call.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from pi0_jax.config import ModelConfig
from pi0_jax.convert.verify import Inputs, Runner, Stages
from pi0_jax.convert.verify.openpi_torch import resized, trace
from pi0_jax.errors import UserError


def check_installed() -> None:
    """Raises UserError, with what to install, where LeRobot or torch is not there."""
    if importlib.util.find_spec("lerobot") is None or importlib.util.find_spec("torch") is None:
        raise UserError(
            "--verify-with lerobot runs LeRobot itself, which is not installed here. In an environment with Python "
            "3.12 or newer: pip install . 'lerobot[pi]==0.6.1', and run the same command there."
        )


def uniform_times(steps: int) -> tuple[float, ...]:
    """Flow times at which LeRobot evaluates the velocity: 1 + i·dt, where ours and openpi accumulate dt."""
    return tuple(1.0 + i * (-1.0 / steps) for i in range(steps))


def run(folder: Path, model: ModelConfig, inputs: Inputs, steps: int) -> tuple[np.ndarray, Stages]:
    """As of `Runner`; the processors unnormalise an action first."""
    check_processors(folder)
    network = load(folder, model).model

    def sample(images, image_masks, tokens, token_mask, state, noise):
        observation = [images, image_masks, tokens, token_mask, *([state] if model.variant == "pi0" else [])]
        return network.sample_actions(*observation, noise=noise, num_steps=steps)

    return trace(network, sample, model, inputs)


def load(folder: Path, model: ModelConfig) -> Any:
    """LeRobot's policy of a folder, in float32 on the CPU, after a load that left no key over and none out."""
    config_class = importlib.import_module("lerobot.configs.policies").PreTrainedConfig
    name, kind = {"pi0": ("pi0", "PI0Policy"), "pi05": ("pi05", "PI05Policy")}[model.variant]
    module = importlib.import_module(f"lerobot.policies.{name}.modeling_{name}")
    config = config_class.from_pretrained(folder)
    config.dtype, config.device, config.compile_model = "float32", "cpu", False
    output = io.StringIO()
    with _resized(module, model), contextlib.redirect_stdout(output):
        policy = getattr(module, kind).from_pretrained(folder, config=config, strict=True)
    # Where keys are missing it prints a warning and goes on.
    if "All keys loaded successfully!" not in output.getvalue():
        raise UserError(f"LeRobot did not load everything of {folder}:\n{output.getvalue()}")
    return policy.float().eval()


def check_processors(folder: Path) -> None:
    """Loads both processors in LeRobot; UserError if the one that unnormalises contradicts the statistics."""
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
    before = pipeline.from_pretrained(
        folder, config_filename="policy_preprocessor.json", overrides={"tokenizer_processor": tokenizer}
    )
    relative = next((step for step in before.steps if hasattr(step, "get_cached_state")), None)
    for step in after.steps:
        if hasattr(step, "relative_step"):  # which is told of its partner after loading
            step.relative_step = relative
    stats = json.loads((folder / "norm_stats.json").read_text())["norm_stats"]["actions"]
    mode = json.loads((folder / "config.json").read_text())["normalization_mapping"]["ACTION"]
    expected = stats["mean"] if mode == "MEAN_STD" else (np.add(stats["q01"], stats["q99"]) / 2).tolist()
    if relative is not None:
        relative._last_state = torch.zeros(1, len(expected))
    found = after(torch.zeros(1, len(expected))).numpy()[0]
    if not np.allclose(found, expected, rtol=1e-5, atol=1e-6):
        raise UserError(f"LeRobot's processor of {folder} turns 0 into {found}, and the statistics say {expected}.")


@contextlib.contextmanager
def _resized(module: Any, model: ModelConfig) -> Iterator[None]:
    """Makes LeRobot's module build a model of these sizes; it has those of the released ones as constants."""

    def gemma(variant: str):
        expert = model.language if variant == "gemma_2b" else model.action
        heads = (model.num_heads, model.num_kv_heads, model.head_dim)
        return module.GemmaConfig(expert.width, model.depth, expert.mlp_dim, *heads)

    paligemma, expert = resized(module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM, model)
    with (
        mock.patch.object(module, "get_gemma_config", gemma),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", paligemma),
        mock.patch.object(module, "PiGemmaForCausalLM", expert),
    ):
        yield


RUNNER = Runner("LeRobot", check_installed, uniform_times, run)
