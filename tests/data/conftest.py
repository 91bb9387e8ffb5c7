"""A small recorded dataset of the tabletop robot, shared by the tests of this folder."""

from pathlib import Path

import numpy as np
import pytest

from pi0_jax.config import ModelConfig, PolicyConfig, TrainConfig, VisionConfig
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter

FEATURES = {
    "observation.images.top": {"dtype": "video", "shape": (48, 48, 3), "names": ["height", "width", "channels"]},
    "observation.images.tool": {"dtype": "video", "shape": (48, 48, 3), "names": None},
    "observation.state": {"dtype": "float32", "shape": (6,), "names": ["x", "y", "z", "cx", "cy", "cz"]},
    "action": {"dtype": "float32", "shape": (3,), "names": ["dx", "dy", "dz"]},
    "valid": {"dtype": "float32", "shape": (1,), "names": ["valid"]},
}
LENGTHS = (9, 5, 12, 1, 7)
TASKS = ("reach the red block", "push the blue ball", "reach the red block", "reach the puck", "push the blue ball")


def scene(seed: int, size: int = 48) -> np.ndarray:
    """A table with shading, three small coloured discs, and a little noise; `[size, size, 3]`."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size]
    image = np.array([196.0, 180.0, 150.0]) * (0.9 + 0.2 * x[..., None] / size) + rng.normal(0, 1.5, (size, size, 1))
    for colour in ((210, 30, 30), (30, 170, 50), (40, 60, 210)):
        column, row = rng.uniform(5, size - 5, 2)
        cover = np.clip(3.5 - np.hypot(x - column, y - row), 0, 1)[..., None]
        image = image * (1 - cover) + np.array(colour) * cover
    return image.clip(0, 255).astype(np.uint8)


def episode(number: int) -> dict[str, np.ndarray]:
    """Values of all features in one episode; each number of an episode and frame gives other ones."""
    rng, length = np.random.default_rng(number), LENGTHS[number % len(LENGTHS)]
    return {
        "observation.images.top": np.stack([scene(100 * number + i) for i in range(length)]),
        "observation.images.tool": np.stack([scene(100 * number + i)[:, ::-1] for i in range(length)]),
        "observation.state": rng.normal(size=(length, 6)).astype(np.float32),
        "action": rng.normal(size=(length, 3)).astype(np.float32),
        "valid": (rng.random((length, 1)) < 0.8).astype(np.float32),
    }


def write(root: Path, episodes=(0, 1, 2, 3, 4), **options) -> Path:
    with LeRobotWriter(root, fps=5, robot_type="tabletop", features=FEATURES, **options) as writer:
        for number in episodes:
            writer.add_episode(episode(number), TASKS[number % len(TASKS)])
    return root


def all_frames(dataset: LeRobotDataset, camera: str) -> np.ndarray:
    """All frames of a camera in order, RGB."""
    return dataset.images(camera, np.arange(dataset.num_frames))


@pytest.fixture(scope="session")
def dataset(tmp_path_factory) -> LeRobotDataset:
    """Five episodes, 34 frames. Nobody changes it."""
    return LeRobotDataset(write(tmp_path_factory.mktemp("data") / "tabletop"))


@pytest.fixture
def config() -> TrainConfig:
    model = ModelConfig(
        vision=VisionConfig(image_size=48),
        cameras=("top", "tool"),
        action_dim=8,
        action_horizon=4,
        prompt_length=16,
        vocab_size=512,
    )
    return TrainConfig(policy=PolicyConfig(model=model, robot="tabletop"), batch_size=6)
