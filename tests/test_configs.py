"""The ready configurations for released weights: each trains on a dataset of its layout, and plans at full size."""

import dataclasses
from pathlib import Path

import jax
import numpy as np
import pytest

from pi0_jax import cli
from pi0_jax.config import DatasetConfig, ExpertConfig, MeshConfig, TrainConfig, TuneConfig, VisionConfig
from pi0_jax.config_file import load_config
from pi0_jax.data.lerobot import LeRobotWriter
from pi0_jax.data.robots import get_robot
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import tokenize
from pi0_jax.inference.policy import Policy
from pi0_jax.training import loop
from pi0_jax.training.inputs import load_inputs
from pi0_jax.training.resolve import batch_shapes, resolve

CONFIGS = Path(__file__).parents[1] / "configs"
LIBERO = {"image": 3, "wrist_image": 3, "state": 8, "actions": 7}
DROID = {"exterior_image_1_left": 3, "exterior_image_2_left": 3, "wrist_image_left": 3}
DROID |= {"joint_position": 7, "gripper_position": 1, "actions": 8}
ALOHA = {f"observation.images.cam_{name}": 3 for name in ("high", "low", "left_wrist", "right_wrist")}
LAYOUTS = {
    "pi0_libero": LIBERO,
    "pi05_libero": LIBERO,
    "pi0_aloha": ALOHA | {"observation.state": 14, "action": 14},
    "pi0_aloha_sim": {"observation.images.top": 3, "observation.state": 14, "action": 14},
    "pi0_droid": DROID,
    "pi05_droid": DROID,
    "pi05_droid_full": DROID,
    "pi05_so101": {"observation.images.front": 3, "observation.images.wrist": 3, "observation.state": 6, "action": 6},
}
"""Features of the datasets that people have for each, by openpi's converters and LeRobot's robots: name → width, or
channels of a camera."""


def read(name: str) -> TrainConfig:
    return load_config(CONFIGS / f"{name}.py", TrainConfig)


def record(root: Path, widths: dict[str, int], fps: int) -> Path:
    cameras = [name for name in widths if "image" in name]
    features = {
        name: {"dtype": "video", "shape": (32, 40, 3)} if name in cameras else {"dtype": "float32", "shape": (width,)}
        for name, width in widths.items()
    }
    rng = np.random.default_rng(0)
    with LeRobotWriter(root, fps, "made", features) as writer:
        for length in (7, 9, 8):
            pictures = {name: rng.integers(0, 255, (length, 32, 40, 3), np.uint8) for name in cameras}
            numbers = {
                name: rng.uniform(-0.5, 0.5, (length, width)).astype(np.float32)
                for name, width in widths.items()
                if name not in cameras
            }
            writer.add_episode(pictures | numbers, "put the bowl on the plate")
    return root


def tiny(config: TrainConfig, dataset: Path, run_dir: Path) -> TrainConfig:
    """The same at a size that trains here, from random weights."""
    small = ExpertConfig(width=16, mlp_dim=32)
    model = dataclasses.replace(
        config.policy.model,
        vision=VisionConfig(width=16, depth=1, mlp_dim=16, num_heads=2, image_size=16, patch_size=8),
        language=small,
        action=small,
        depth=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        vocab_size=512,
        dtype="float32",
        remat="none",
    )
    data = dataclasses.replace(config.data, path=str(dataset), datasets=(DatasetConfig(str(dataset)),))
    return dataclasses.replace(
        config,
        policy=dataclasses.replace(config.policy, model=model),
        optim=dataclasses.replace(config.optim, warmup_steps=1, decay_steps=None),
        tune=TuneConfig(),
        data=data,
        mesh=MeshConfig(),
        init_from=None,
        run_dir=str(run_dir),
        batch_size=8,
        num_steps=2,
    )


def small(name: str, folder: Path) -> TrainConfig:
    """The configuration on a made dataset, at a size that trains here."""
    fps = get_robot(read(name).policy.robot).fps or 10
    return tiny(read(name), record(folder / "data", LAYOUTS[name], int(fps)), folder / "run")


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dataset_of_the_layout_gives_the_batches_that_updates_are_compiled_for(name, tmp_path):
    config = small(name, tmp_path)
    run = resolve(dataclasses.replace(config, data=dataclasses.replace(config.data, prompt_buckets=())))
    loader = load_inputs(run).loader
    batch = next(loader)
    loader.close()
    expected = batch_shapes(run.policy.model, run.policy.objective, 8)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
    assert np.isfinite(batch.actions).all()


@pytest.mark.parametrize("name", ["pi0_aloha", "pi05_droid", "pi05_libero"])
def test_two_steps_and_a_chunk_on_a_dataset_of_the_layout(name, tmp_path):
    loop.run(small(name, tmp_path))
    policy = Policy.load(tmp_path / "run")
    actions = policy.infer({**policy.robot.example()})
    assert actions.shape == (read(name).policy.model.action_horizon, len(policy.robot.actions))
    assert np.isfinite(actions).all()


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_is_accepted_as_it_is(name):
    resolved = resolve(dataclasses.replace(read(name), mesh=MeshConfig()))
    assert set(resolved.policy.model.cameras) == set(resolved.robot.cameras.values())


@pytest.mark.parametrize("name", LAYOUTS)
def test_help_begins_with_what_the_file_says(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["train", str(CONFIGS / f"{name}.py"), "--help"])
    assert "--optim.peak-lr" in capsys.readouterr().out


def test_there_is_a_layout_for_each_configuration_of_released_weights():
    ready = {path.stem for path in CONFIGS.glob("pi0*.py")}
    assert ready == set(LAYOUTS)


def test_without_the_state_a_prompt_is_that_of_pi0():
    tokenizer = Tokenizer.train(["put the bowl on the plate"], 512)
    config = read("pi05_libero").policy
    assert not config.state_in_prompt
    sample = {"prompt": "put the bowl", "state": np.zeros(len(get_robot("libero").state))}
    ids = tokenize(tokenizer, config).forward(sample)["prompt"]
    np.testing.assert_array_equal(ids, tokenizer.encode_prompt("put the bowl", 200)[0])
