"""ALOHA's expert: its inverse kinematics, and the whole where gym-aloha is installed."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest

import pi0_jax
from tests.evaluate.simulators.opened import python_of

mujoco = pytest.importorskip("mujoco", reason="the simulator is not installed: pip install -e '.[sim]'")
LINKS = (
    ("shoulder_link", "0 0 0.1", "waist", "0 0 1"),
    ("upper_arm_link", "0 0 0.05", "shoulder", "0 1 0"),
    ("upper_forearm_link", "0.06 0 0.3", "elbow", "0 1 0"),
    ("lower_forearm_link", "0.2 0 0", "forearm_roll", "1 0 0"),
    ("wrist_link", "0.1 0 0", "wrist_angle", "0 1 0"),
    ("gripper_link", "0.07 0 0", "wrist_rotate", "1 0 0"),
)
"""Body, its place in the one before, joint, axis."""
EPISODES = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pi0_jax.evaluate.simulators import get_simulator
simulator, steps = get_simulator("aloha", tasks="transfer_cube,insertion"), {}
for index in range(2):
    episode, over, success, count = simulator.start(index, 1, "train"), False, False, 0
    while not over:
        over, success = episode.step(episode.expert())
        count += 1
    steps[episode.task] = count if success else None
print(json.dumps(steps))
"""


def test_inverse_kinematics_reaches_a_pose_of_a_six_joint_arm():
    from pi0_jax.evaluate.simulators.aloha.expert import REST, TIP, Arm

    links = "".join(
        f"<body name='vx300s_left/{body}' pos='{place}'><joint name='vx300s_left/{joint}' axis='{axis}' "
        "range='-3 3'/><geom size='0.01'/>"
        for body, place, joint, axis in LINKS
    )
    xml = f"<mujoco><compiler angle='radian'/><worldbody>{links}{'</body>' * 6}</worldbody></mujoco>"
    model = mujoco.MjModel.from_xml_string(xml)
    arm, data = Arm(model, "left", pitch=0.3, roll=0.5), mujoco.MjData(model)
    place = np.array([0.35, 0.04, 0.2])
    arm.reset(place - [0.02, 0, 0])
    np.testing.assert_array_equal(arm.approach(0.0), REST)
    for _ in range(20):
        data.qpos[:] = arm.solve(place)
    mujoco.mj_forward(model, data)
    hand = data.body("vx300s_left/gripper_link")
    axes = hand.xmat.reshape(3, 3)
    np.testing.assert_allclose(hand.xpos + TIP * axes[:, 0], place, atol=1e-4)
    np.testing.assert_allclose(axes[:, 0], [np.cos(0.3), 0, -np.sin(0.3)], atol=1e-3)
    assert axes[1, 1] == pytest.approx(np.cos(0.5), abs=1e-3)


def test_the_expert_transfers_the_cube_and_inserts_the_peg():
    python = python_of("aloha")
    if python is None:
        pytest.skip("gym-aloha's environment is not in the folder PI0_ENVS.")
    command = [python, "-c", EPISODES, str(Path(pi0_jax.__file__).parents[1])]
    steps = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert 150 < steps["transfer_cube"] < 220
    assert 150 < steps["insertion"] < 270
