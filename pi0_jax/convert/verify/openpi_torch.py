"""Runs a folder in openpi's PyTorch model, where it is installed; and what LeRobot has in common with it.

Only that model is imported: openpi's JAX half, which its files import too, pins versions that go with no current JAX.
Models of other sizes than the released ones run too. torch is imported when a function is called. Both frameworks build
the same modules, under the same names, from `transformers`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pi0_jax.config import ModelConfig
from pi0_jax.convert.verify import Inputs, Runner, Stages
from pi0_jax.errors import UserError
from pi0_jax.sampler.grid import euler_grid


def check_installed() -> None:
    """Raises UserError, with what to install, where openpi, torch or the patched transformers are not there."""
    missing = [name for name in ("torch", "transformers", "openpi") if importlib.util.find_spec(name) is None]
    if not missing and importlib.util.find_spec("transformers.models.siglip.check") is None:
        missing = ["openpi's patch of transformers"]
    if missing:
        raise UserError(
            f"--verify-with openpi-torch runs openpi's PyTorch model itself, and {', '.join(missing)} is not installed "
            "here. In an environment of its own, with Python 3.11: pip install . torch transformers==4.53.2; "
            "pip install --no-deps git+https://github.com/Physical-Intelligence/openpi; and copy openpi's "
            "src/openpi/models_pytorch/transformers_replace/* over the installed transformers."
        )


def euler_times(steps: int) -> tuple[float, ...]:
    """Flow times at which openpi evaluates the velocity: ours, with dt accumulated in single precision."""
    return tuple(float(time) for time in euler_grid(steps).times[:-1])


def run(folder: Path, model: ModelConfig, inputs: Inputs, steps: int) -> tuple[np.ndarray, Stages]:
    """As of `Runner`."""
    network = load(folder, model)

    def sample(images, image_masks, tokens, token_mask, state, noise):
        observation = (images, image_masks, tokens, token_mask, state)
        network._preprocess_observation = lambda *_, **__: observation  # it resizes to 224 px
        return network.sample_actions("cpu", types.SimpleNamespace(state=state), noise=noise, num_steps=steps)

    return trace(network, sample, model, inputs)


def load(folder: Path, model: ModelConfig) -> Any:
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
        raise UserError(f"openpi did not load everything of {folder}:\n{error}") from error
    return network.float().eval()


@contextlib.contextmanager
def _resized(model: ModelConfig) -> Iterator[Any]:
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
        classes = parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM
        parts.PaliGemmaForConditionalGeneration, parts.GemmaForCausalLM = resized(*classes, model)
        yield module
    finally:
        for name, found in before.items():
            sys.modules.pop(name, None)
            if found is not None:
                sys.modules[name] = found


_STAGES = {
    "image_layers": r"vision_tower\..*encoder\.layers\.(\d+)$",
    "language": r"language_model\.layers\.(\d+)\.self_attn\.v_proj$",
    "action": r"gemma_expert\.model\.layers\.(\d+)\.self_attn\.v_proj$",
}
"""Modules whose outputs are kept, by layer."""


def trace(network, sample: Callable[..., Any], model: ModelConfig, inputs: Inputs) -> tuple[np.ndarray, Stages]:
    """Samples actions `[b ah ad]` in PyTorch and keeps what is computed on the way, the stages of the first step.

    `network` has `embed_prefix` and `denoise_step`, which `sample` calls; that takes lists of images `[b c y x]` and
    their masks, tokens, their mask, state and noise.
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
    arrays = {name: torch.from_numpy(array) for name, array in inputs.items()}
    count = len(model.cameras)
    images = [arrays[f"images/{i}"].permute(0, 3, 1, 2) for i in range(count)]
    masks = [arrays[f"image_masks/{i}"] for i in range(count)]
    others = [arrays[name] for name in ("tokens", "token_mask", "state", "noise")]
    with torch.no_grad():
        actions = sample(images, masks, *others).float().numpy()
    return actions, seen | _by_layer(kept, seen["mask"], model)


def resized(paligemma: Any, expert: Any, model: ModelConfig) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Both of `transformers`' classes, called with a configuration that gets the sizes which are constants there."""

    def make_paligemma(config):
        _resize(config, model)
        return paligemma(config=config)

    def make_expert(config):
        config.vocab_size = model.vocab_size
        return expert(config=config)

    return make_paligemma, make_expert


def _resize(config, model: ModelConfig) -> None:
    config.text_config.vocab_size = config._vocab_size = model.vocab_size
    config.image_token_index = config.image_token_id = model.vocab_size - 1
    theirs, ours = config.vision_config, model.vision
    theirs.hidden_size, theirs.num_hidden_layers, theirs.intermediate_size = ours.width, ours.depth, ours.mlp_dim
    theirs.num_attention_heads, theirs.patch_size, theirs.image_size = ours.num_heads, ours.patch_size, ours.image_size
    theirs.projection_dim = model.language.width


def _keep_outputs(network) -> dict[str, dict[int, list]]:
    """Hooks that keep the outputs of `_STAGES`, one list of calls per layer."""
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


RUNNER = Runner("openpi's PyTorch", check_installed, euler_times, run)
