"""Runs a folder in openpi's PyTorch model itself, where it is installed.

Only that model is imported: openpi's JAX half, which its files import too, pins versions that go with no current JAX.
Models of other sizes than the released ones run too.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.config import ModelConfig
from pi0_jax.convert.verify import torch_policy


def check_installed() -> None:
    """Raises ValueError, with what to install, where openpi, torch or the patched transformers are not there."""
    missing = [name for name in ("torch", "transformers", "openpi") if importlib.util.find_spec(name) is None]
    if not missing and importlib.util.find_spec("transformers.models.siglip.check") is None:
        missing = ["openpi's patch of transformers"]
    if missing:
        raise ValueError(
            f"--verify-with openpi-torch runs openpi's PyTorch model itself, and {', '.join(missing)} is not installed "
            "here. In an environment of its own, with Python 3.11: pip install . torch transformers==4.53.2; "
            "pip install --no-deps git+https://github.com/Physical-Intelligence/openpi; and copy openpi's "
            "src/openpi/models_pytorch/transformers_replace/* over the installed transformers."
        )


def times(steps: int) -> tuple[float, ...]:
    """When openpi evaluates the velocity: dt is added up in single precision."""
    found = [np.float32(1)]
    for _ in range(steps - 1):
        found.append(found[-1] + np.float32(-1 / steps))
    return tuple(float(time) for time in found)


def run(folder: Path, model: ModelConfig, inputs: dict[str, np.ndarray], steps: int) -> tuple[np.ndarray, dict]:
    """Loads a folder strictly and samples from the noise; float32.

    Args:
        folder: with a `model.safetensors` in openpi's names.
        model: its sizes.
        inputs: as in `agree`.
        steps: Euler steps.

    Returns:
        Actions `[b ah ad]`, and what `agree.valid_stages` takes.

    Raises:
        ValueError: openpi does not find every tensor, or finds tensors that it does not know.
    """
    network = load(folder, model)

    def sample(images, image_masks, tokens, token_mask, state, noise):
        observation = (images, image_masks, tokens, token_mask, state)
        network._preprocess_observation = lambda *_, **__: observation  # it resizes to 224 px
        return network.sample_actions("cpu", types.SimpleNamespace(state=state), noise=noise, num_steps=steps)

    return torch_policy.trace(network, sample, model, inputs)


def load(folder: Path, model: ModelConfig):
    """openpi's network of a folder, in float32 on the CPU, after a load that left no key over and none out."""
    torch: Any = importlib.import_module("torch")
    read: Any = importlib.import_module("safetensors.torch")
    precision = torch.get_float32_matmul_precision()
    config = types.SimpleNamespace(
        pi05=model.variant == "pi05",
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        action_dim=model.action_dim,
        action_horizon=model.action_horizon,
        dtype="float32",
        pytorch_compile_mode=None,
    )
    with _resized(model) as module:
        network = module.PI0Pytorch(config)
    torch.set_float32_matmul_precision(precision)  # which openpi lowers
    try:
        read.load_model(network, folder / "model.safetensors", strict=True)
    except RuntimeError as error:
        raise ValueError(f"openpi did not load everything of {folder}:\n{error}") from error
    return network.float().eval()


@contextlib.contextmanager
def _resized(model: ModelConfig):
    """openpi's module, made to build a model of these sizes; it has those of the released ones as constants.

    It is imported anew, with stand-ins for the two files that need openpi's JAX half, and forgotten afterwards.
    """

    def gemma(variant: str):
        expert = model.language if variant == "gemma_2b" else model.action
        return types.SimpleNamespace(
            width=expert.width,
            mlp_dim=expert.mlp_dim,
            depth=model.depth,
            num_heads=model.num_heads,
            num_kv_heads=model.num_kv_heads,
            head_dim=model.head_dim,
        )

    stand_ins: dict[str, Any] = {
        "openpi.models.gemma": types.SimpleNamespace(get_config=gemma),
        "openpi.models_pytorch.preprocessing_pytorch": types.SimpleNamespace(),
    }
    names = ("openpi.models_pytorch.gemma_pytorch", "openpi.models_pytorch.pi0_pytorch")
    for package in ("openpi.models", "openpi.models_pytorch"):
        importlib.import_module(package)
    before = {name: sys.modules.pop(name, None) for name in (*stand_ins, *names)}
    sys.modules.update(stand_ins)
    try:
        parts: Any = importlib.import_module(names[0])
        module = importlib.import_module(names[1])
        paligemma, expert = parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM

        def make_paligemma(config):
            torch_policy.resize(config, model)
            return paligemma(config=config)

        def make_expert(config):
            config.vocab_size = model.vocab_size
            return expert(config=config)

        parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM = make_paligemma, make_expert
        yield module
    finally:
        for name, found in before.items():
            sys.modules.pop(name, None)
            if found is not None:
                sys.modules[name] = found
