"""Asks a DROID-shaped policy for a chunk as inspect-robots-franka does: python franka.py PORT ANSWER.npy

Its interpreter has `inspect-robots-franka` and `openpi-client`, and nothing of ours.
"""

import sys

import numpy as np
from inspect_robots.scene import Scene
from inspect_robots.types import Observation
from inspect_robots_franka.policy import OpenpiPolicy

port, answer = sys.argv[1:]
policy = OpenpiPolicy(host="127.0.0.1", port=int(port))
policy.reset(Scene(id="a", instruction="put the marker into the cup"))
rng = np.random.default_rng(0)
images = {name: rng.integers(0, 256, (180, 320, 3), np.uint8) for name in ("exterior_cam", "wrist_cam")}
chunk = policy.act(Observation(images=images, state={"joint_pos": np.linspace(-0.5, 0.5, 8)}))
np.save(answer, np.stack([action.data for action in chunk.actions]))
