"""Against openpi's own numbers: same weights, same inputs, float32, highest matmul precision.

Every folder `openpi_pi0*`/`openpi_pi05*` of the fixtures with a plain π0 or π0.5 in it is tested; sizes come from the
folder's `config.json`. Tolerances are relative errors in the L2 norm.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from pi0_jax.batch import Observation
from pi0_jax.config import ExpertConfig, ModelConfig, VisionConfig
from pi0_jax.convert.openpi import RULES, params_from_openpi, read_params
from pi0_jax.flow.loss import squared_error
from pi0_jax.flow.path import interpolate
from pi0_jax.model.velocity import VelocityNetwork
from pi0_jax.pi0 import sample_actions
from tests.conftest import fixtures_root

FIXTURES = fixtures_root()


def reference_folders() -> list[Path]:
    """Folders of the fixtures that hold a plain π0 or π0.5 of openpi's."""
    specs = {path.parent: json.loads(path.read_text()) for path in sorted(FIXTURES.glob("openpi_*/config.json"))}
    return [folder for folder, spec in specs.items() if spec["kind"] in ("pi0", "pi05") and not spec.get("lora")]


def relative_error(ours, theirs) -> float:
    ours, theirs = np.asarray(ours, np.float64), np.asarray(theirs, np.float64)
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def config_of(spec: dict, cameras: tuple[str, ...], num_kv_heads: int) -> ModelConfig:
    vit = spec["vit"]
    return ModelConfig(
        variant=spec["kind"],
        vision=VisionConfig(
            width=vit["width"],
            depth=vit["depth"],
            mlp_dim=vit["mlp_dim"],
            num_heads=vit["num_heads"],
            image_size=vit["res"],
            patch_size=vit["patch"],
        ),
        language=ExpertConfig(spec["width"], spec["mlp"]),
        action=ExpertConfig(spec["awidth"], spec["amlp"]),
        depth=spec["depth"],
        num_heads=spec["heads"],
        num_kv_heads=num_kv_heads,
        head_dim=spec["head_dim"],
        vocab_size=spec["vocab"],
        cameras=cameras,
        action_dim=spec["action_dim"],
        action_horizon=spec["horizon"],
        prompt_length=spec["tokens"],
        dtype="float32",
    )


class Case:
    """One reference checkpoint in our network, and the reference's inputs and outputs."""

    def __init__(self, folder: Path):
        spec = json.loads((folder / "config.json").read_text())
        self.io = dict(np.load(folder / "io.npz"))
        cameras = tuple(name.removeprefix("images/") for name in self.io if name.startswith("images/"))
        tensors = read_params(folder)
        self.config = config_of(spec, cameras, tensors["PaliGemma/llm/layers/attn/kv_einsum/w"].shape[2])
        self.network = VelocityNetwork(self.config)
        self.params = jax.tree.map(jnp.asarray, params_from_openpi(tensors, self.config))
        self.observation = Observation(
            images={name: jnp.asarray(self.io[f"images/{name}"]) for name in cameras},
            image_masks={name: jnp.asarray(self.io[f"image_masks/{name}"]) for name in cameras},
            state=jnp.asarray(self.io["state"]),
            prompt=jnp.asarray(self.io["tokens"]),
            prompt_mask=jnp.asarray(self.io["token_mask"]),
        )

    def apply(self, *args, method=None):
        run = functools.partial(self.network.apply, method=method)
        return jax.jit(run)({"params": self.params}, *args)


@pytest.fixture(scope="module", params=reference_folders() or [None], ids=lambda folder: folder and folder.name)
def case(request):
    if request.param is None:
        pytest.skip(f"no openpi_* reference folders in {FIXTURES}; set PI0_FIXTURES to where they are")
    with jax.default_matmul_precision("highest"):
        yield Case(request.param)


def test_prefix_tokens(case):
    tokens, mask = case.apply(case.observation, method="embed_prefix")
    np.testing.assert_array_equal(mask, case.io["prefix_mask"])
    assert relative_error(tokens, case.io["prefix_tokens"]) <= 1e-5


def test_velocity_and_loss(case):
    io = case.io
    x, target = interpolate(io["actions"], io["noise"], io["time"])
    assert relative_error(x, io["x_t"]) <= 1e-6
    velocity = case.apply(case.observation, jnp.asarray(io["x_t"]), jnp.asarray(io["time"]))
    assert relative_error(velocity, io["velocity"]) <= 1e-5
    assert relative_error(squared_error(velocity, target), io["loss_per_step"]) <= 1e-5


def test_velocity_from_the_cached_prefix(case):
    prefix = case.apply(case.observation, method="prefill")
    velocity = case.apply(prefix, jnp.asarray(case.io["x_t"]), jnp.asarray(case.io["time"]), method="velocity")
    assert relative_error(velocity, case.io["velocity"]) <= 1e-5


def test_training_loss_at_the_reference_draws(case):
    x, target = interpolate(case.io["actions"], case.io["rng123_noise"], case.io["rng123_time"])
    velocity = case.apply(case.observation, jnp.asarray(x), jnp.asarray(case.io["rng123_time"]))
    assert relative_error(squared_error(velocity, target), case.io["loss_rng123"]) <= 1e-5


def test_gradient_norm_of_every_parameter(case):
    io = case.io
    x, target = interpolate(io["actions"], io["noise"], io["time"])

    def loss(params):
        velocity = case.network.apply({"params": params}, case.observation, jnp.asarray(x), jnp.asarray(io["time"]))
        return jnp.mean(squared_error(velocity, target))

    norms = {
        name: float(jnp.linalg.norm(leaf))
        for name, leaf in flatten_dict(jax.jit(jax.grad(loss))(case.params), sep="/").items()
    }
    ours_of = {rule.theirs: rule.ours for rule in RULES if rule.ours in norms}
    reference = {
        str(name).removesuffix("/value"): float(norm)
        for name, norm in zip(io["grad_names"], io["grad_norms"], strict=True)
    }
    assert {ours_of[name] for name in reference} == set(norms)
    # Rounding is all there is where the gradient is zero by construction, as for the bias of attention's keys.
    rounding = 1e-7 * np.linalg.norm(list(reference.values()))
    for name, norm in reference.items():
        assert norms[ours_of[name]] == pytest.approx(norm, rel=1e-4, abs=rounding), name


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_euler_samples(case, num_steps):
    noise = jnp.asarray(case.io["noise"])
    sample = jax.jit(functools.partial(sample_actions, case.network, num_steps=num_steps))
    sample = sample(case.params, case.observation, noise)
    assert relative_error(sample, case.io[f"sample_{num_steps}"]) <= 1e-4
