"""LeRobot datasets, read and written."""

from pi0_jax.data.lerobot.reader import LeRobotDataset as LeRobotDataset
from pi0_jax.data.lerobot.writer import LeRobotWriter as LeRobotWriter
