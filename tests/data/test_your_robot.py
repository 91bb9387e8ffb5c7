"""docs/your_robot.md, followed word for word on a dataset with its robot's cameras."""

import re
from pathlib import Path

import numpy as np

from pi0_jax import cli
from pi0_jax.data.lerobot import LeRobotWriter
from pi0_jax.data.robots import get_robot
from pi0_jax.evaluate.simulators import get_simulator

PAGE = (Path(__file__).parents[2] / "docs/your_robot.md").read_text()
NAMES = ["shoulder", "elbow", "wrist", "gripper"]


def record(root):
    vector = {"dtype": "float32", "shape": (4,), "names": NAMES}
    camera = {"dtype": "video", "shape": (48, 64, 3)}
    features = {"observation.images.front": camera, "observation.images.wrist": camera}
    random = np.random.default_rng(0)
    with LeRobotWriter(root, 30, "my_robot", features | {"observation.state": vector, "action": vector}) as writer:
        for _ in range(20):
            pictures = {name: random.integers(0, 255, (6, 48, 64, 3), np.uint8) for name in features}
            state = np.cumsum(random.normal(size=(6, 4)), axis=0).astype(np.float32)
            numbers = {"observation.state": state, "action": state + np.float32(0.05)}
            writer.add_episode(pictures | numbers, "fold it")


def test_the_page_leads_from_a_dataset_to_a_policy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    record(tmp_path / "data/mine")
    robot, config, small, run, simulator = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/mine.py").write_text(config)
    (tmp_path / "configs/mine_small.py").write_text(small)

    def command(line):
        code = cli.main(line.split("#")[0].split()[1:])
        assert code == 0, capsys.readouterr().err

    command("pi0 data robot data/mine")
    made = get_robot("my_robot.py")
    (tmp_path / "my_robot.py").write_text(robot)
    shown = get_robot("my_robot.py")
    assert (made.name, made.cameras, made.state, made.fps) == (shown.name, shown.cameras, shown.state, shown.fps)
    assert made.semantics == ("relative",) * 3 + ("gripper",)
    lines = re.findall(r"^pi0 data (?!robot).*", PAGE, re.MULTILINE)
    assert len(lines) == 4
    for line in lines:
        command(line.replace("mine.py", "mine_small.py"))  # a cache of the small model's size is quicker made
    assert {"norm_stats.json", "data.html", "cache"} <= {path.name for path in tmp_path.iterdir()}
    command("pi0 train configs/mine_small.py --num-steps 4")
    namespace: dict = {}
    exec(compile(run, "docs/your_robot.md", "exec"), namespace)
    assert namespace["actions"].shape == (10, 4)
    assert np.isfinite(namespace["actions"]).all()
    (tmp_path / "fold.py").write_text(simulator)
    assert get_simulator("fold.py").tasks == ("fold", "unfold")
