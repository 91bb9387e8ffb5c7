"""Reference folders in our network: the same weights and inputs as the reference had."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from pi0_jax.batch import Observation
from pi0_jax.config import Gaussian, ModelConfig
from pi0_jax.convert.formats import Overrides, open_checkpoint, params_of
from pi0_jax.model.gemma import Layout, Segment, forward
from pi0_jax.model.layers import rotation
from pi0_jax.objective import SampleOptions, make_objective
from pi0_jax.sampler import Euler
from tests.conftest import fixtures_root


def folders(pattern: str, *kinds: str) -> list[Path | None]:
    """Folders of the fixtures whose spec is of one of the kinds; [None] where there are none, so that tests skip."""
    found = []
    for folder in sorted(fixtures_root().glob(pattern)):
        if (folder / "io.npz").is_file() and read_spec(folder)["kind"] in kinds:
            found.append(folder)
    return found or [None]


def read_spec(folder: Path) -> dict:
    path = folder / "spec.json"
    return json.loads((path if path.is_file() else folder / "config.json").read_text())


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


class Case:
    """One reference checkpoint in our network, and the reference's inputs and outputs."""

    def __init__(self, folder: Path, file: str = ""):
        spec = read_spec(folder)
        arrays = np.load(folder / "io.npz")
        self.io = {name: jnp.asarray(a) if a.dtype.kind in "biuf" else a for name, a in arrays.items()}
        cameras = tuple(name.removeprefix("images/") for name in self.io if name.startswith("images/")) or (
            "base_0_rgb",
        )
        overrides = Overrides(
            horizon=spec["horizon"],
            vision_heads=spec["vit"]["num_heads"],
            lora_scale=spec["lora_alpha"] / spec["lora_r"] if "lora_r" in spec else None,
        )
        weights = open_checkpoint(folder / file, overrides)
        changes = {"cameras": cameras, "prompt_length": spec["tokens"], "dtype": "float32", "remat": "none"}
        self.config = dataclasses.replace(weights.policy.model, **changes)
        kind = spec["kind"].split()[0]
        assert self.config.variant == {"paligemma": "pi0_fast"}.get(kind, kind)
        if self.config.variant == "pi0_fast":  # no velocity, but the backbone is the one of pi0
            self.config = dataclasses.replace(self.config, variant="pi0")
        self.objective = make_objective(Gaussian(), self.config)
        self.network = self.objective.network
        self.params = jax.tree.map(jnp.asarray, params_of(weights))
        images = {name: self.io.get(f"images/{name}", self.io.get("image")) for name in cameras}
        tokens = self.io["tokens"] if "tokens" in self.io else self.io["prompt"]
        there = self.io.get("token_mask", self.io.get("prompt_mask", np.ones(tokens.shape, bool)))
        batch = len(tokens)
        self.observation = Observation(
            images={name: jnp.asarray(image) for name, image in images.items()},
            image_masks={n: jnp.asarray(self.io.get(f"image_masks/{n}", np.ones(batch, bool))) for n in cameras},
            state=jnp.asarray(self.io.get("state", np.zeros((batch, self.config.action_dim), np.float32))),
            prompt=jnp.asarray(tokens),
            prompt_mask=jnp.asarray(there),
        )

    def apply(self, *args, method="joint"):
        return jax.jit(getattr(self.network, method))(self.params, *args)

    def sample(self, noise, num_steps: int):
        options = SampleOptions(Euler(num_steps))
        run = jax.jit(lambda *args: self.objective.sample(*args, options))
        return run(self.params, self.observation, jnp.asarray(noise))

    def logits(self, mask_ar: np.ndarray, count_masked: bool, drop_last: int):
        """Next-token logits at the prompt, from the language expert alone.

        Args:
            mask_ar: 1 where a prompt token may not be seen by those before it.
            count_masked: whether absent tokens advance positions.
            drop_last: how many tokens at the end are left out.
        """

        @jax.jit
        def run(params, observation: Observation):
            tokens, mask = self.network.embed_prefix(params, observation)
            blocks = jnp.cumsum(
                jnp.concatenate([jnp.zeros_like(tokens[..., 0], int), jnp.asarray(mask_ar)], 1)[:, mask_ar.shape[1] :],
                axis=1,
            )
            positions = jnp.cumsum(jnp.ones_like(mask) if count_masked else mask, axis=1) - 1
            end = tokens.shape[1] - drop_last
            allowed = (blocks[:, None] <= blocks[:, :, None]) & mask[:, None] & mask[:, :, None]
            layout = Layout(rotation(positions[:, :end], self.config.head_dim), allowed[:, :end, :end])
            language = run_language(self.config, params, tokens[:, :end], layout)
            return language[:, tokens.shape[1] - mask_ar.shape[1] :] @ params["embedding"].T

        return run(self.params, self.observation)


def run_language(config: ModelConfig, params, tokens, layout: Layout):
    """Outputs of the language expert."""
    segment = Segment("language", tokens, np.zeros(tokens.shape[1], int))
    (language,), _ = forward(config, params["backbone"], [segment], layout=layout)
    return language
