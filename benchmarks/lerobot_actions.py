"""Loads a converted policy folder in LeRobot itself and writes the actions it samples; `--compare` compares with ours.

LeRobot 0.6.1 needs Python 3.12 and torch, so this runs in an environment of its own (docs/checkpoints.md):

    lerobot-env/bin/python benchmarks/lerobot_actions.py FOLDER inputs.npz actions.npz
    python benchmarks/lerobot_actions.py FOLDER inputs.npz actions.npz --compare

`inputs.npz` has images/<camera> `[b h w 3]` in [-1, 1], image_masks/<camera>, tokens, token_mask, state and noise.
Models of other sizes than the released ones load too: LeRobot's constants are replaced by what `conversion.json` says.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
from pathlib import Path

import numpy as np

STEPS = 10


def main() -> None:
    """Reads the arguments and writes, or compares."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "inputs", "actions"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--compare", action="store_true")
    arguments = parser.parse_args()
    inputs = dict(np.load(arguments.inputs))
    model = json.loads((arguments.folder / "conversion.json").read_text())["policy"]["model"]
    if arguments.compare:
        difference = np.max(np.abs(ours(arguments.folder, inputs) - np.load(arguments.actions)["actions"]))
        print(f"largest difference of {STEPS}-step actions: {difference:.3g}")
        raise SystemExit(int(difference > 1e-4))
    np.savez(arguments.actions, actions=theirs(arguments.folder, inputs, model))


def theirs(folder: Path, inputs: dict[str, np.ndarray], model: dict) -> np.ndarray:
    """Actions of LeRobot's policy, after a load that left no key over and none out."""
    import torch

    name = {"pi0": ("pi0", "PI0Policy"), "pi05": ("pi05", "PI05Policy")}[model["variant"]]
    module = importlib.import_module(f"lerobot.policies.{name[0]}.modeling_{name[0]}")
    resize(module, model)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        policy = getattr(module, name[1]).from_pretrained(folder, strict=True)
    if "All keys loaded successfully!" not in said.getvalue():
        raise SystemExit(f"LeRobot did not load everything:\n{said.getvalue()}")
    print("All keys loaded successfully!")
    check_processors(folder)
    tensor = {key: torch.from_numpy(np.asarray(value)) for key, value in inputs.items() if value.dtype.kind in "fib"}
    cameras = model["cameras"]
    observation = [
        [tensor[f"images/{camera}"].permute(0, 3, 1, 2) for camera in cameras],
        [tensor[f"image_masks/{camera}"] for camera in cameras],
        tensor["tokens"],
        tensor["token_mask"],
    ]
    if model["variant"] == "pi0":
        observation.append(tensor["state"])
    policy.eval()
    with torch.no_grad():
        return policy.model.sample_actions(*observation, noise=tensor["noise"], num_steps=STEPS).numpy()


def check_processors(folder: Path) -> None:
    """Loads both pipelines in LeRobot and passes an action through the unnormaliser."""
    import torch
    from lerobot.policies.pi0 import processor_pi0  # noqa: F401
    from lerobot.policies.pi05 import processor_pi05  # noqa: F401 - registers the steps
    from lerobot.processor import PolicyProcessorPipeline
    from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

    after = PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_postprocessor.json",
        to_transition=policy_action_to_transition,
        to_output=transition_to_policy_action,
    )
    PolicyProcessorPipeline.from_pretrained(
        folder,
        config_filename="policy_preprocessor.json",
        overrides={"tokenizer_processor": {"tokenizer": lambda *_, **__: None, "tokenizer_name": None}},
    )
    stats = json.loads((folder / "norm_stats.json").read_text())["norm_stats"]["actions"]
    mode = json.loads((folder / "config.json").read_text())["normalization_mapping"]["ACTION"]
    expected = stats["mean"] if mode == "MEAN_STD" else (np.add(stats["q01"], stats["q99"]) / 2).tolist()
    found = after(torch.zeros(1, len(expected))).numpy()[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    print("both processors load, and zero unnormalises to the middle of the statistics")


def resize(module, model: dict) -> None:
    """Makes LeRobot's module build a model of these sizes; it has those of the released ones as constants."""

    def gemma(variant: str):
        expert = model["language" if variant == "gemma_2b" else "action"]
        shared = (model["num_heads"], model["num_kv_heads"], model["head_dim"])
        return module.GemmaConfig(expert["width"], model["depth"], expert["mlp_dim"], *shared)

    paligemma, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM
    vision = model["vision"]

    def make_paligemma(config):
        config.text_config.vocab_size = config._vocab_size = model["vocab_size"]
        config.image_token_index = config.image_token_id = model["vocab_size"] - 1
        ours = {
            "hidden_size": vision["width"],
            "num_hidden_layers": vision["depth"],
            "intermediate_size": vision["mlp_dim"],
            "num_attention_heads": vision["num_heads"],
            "patch_size": vision["patch_size"],
            "image_size": vision["image_size"],
            "projection_dim": model["language"]["width"],
        }
        for key, value in ours.items():
            setattr(config.vision_config, key, value)
        return paligemma(config=config)

    def make_expert(config):
        config.vocab_size = model["vocab_size"]
        return expert(config=config)

    module.get_gemma_config = gemma
    module.PaliGemmaForConditionalGenerationWithPiGemma = make_paligemma
    module.PiGemmaForCausalLM = make_expert


def ours(folder: Path, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Actions of the same folder in this package."""
    import dataclasses

    import jax
    import jax.numpy as jnp

    from pi0_jax.batch import Observation
    from pi0_jax.convert.formats import open_checkpoint, params_of
    from pi0_jax.model.velocity import VelocityNetwork
    from pi0_jax.pi0 import sample_actions

    weights = open_checkpoint(folder)
    model = dataclasses.replace(weights.policy.model, dtype="float32", remat="none")
    observation = Observation(
        {camera: jnp.asarray(inputs[f"images/{camera}"]) for camera in model.cameras},
        {camera: jnp.asarray(inputs[f"image_masks/{camera}"]) for camera in model.cameras},
        jnp.asarray(inputs["state"]),
        jnp.asarray(inputs["tokens"]),
        jnp.asarray(inputs["token_mask"]),
    )
    params = jax.tree.map(jnp.asarray, params_of(weights))
    with jax.default_matmul_precision("highest"):
        run = jax.jit(lambda p, o, n: sample_actions(VelocityNetwork(model), p, o, n, num_steps=STEPS))
        return np.asarray(run(params, observation, jnp.asarray(inputs["noise"])))


if __name__ == "__main__":
    main()
