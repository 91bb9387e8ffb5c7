"""A simulator is one file, of any Gymnasium environment."""

from types import SimpleNamespace

import gymnasium
import numpy as np
import pytest

from pi0_jax.cli import main
from pi0_jax.evaluate import simulators
from pi0_jax.evaluate.commands import Evaluate, Record, Report, evaluate, record, report
from pi0_jax.evaluate.simulators import find_simulator, get_simulator, has_option, simulator_names
from pi0_jax.evaluate.simulators.gym import Simulator

LINE = '''
"""A point that is to be brought to one end of a line, seen by a robot of the name tabletop."""

import gymnasium
import numpy as np

ROBOT = "tabletop"


class Line(gymnasium.Env):
    action_space = gymnasium.spaces.Box(-0.5, 0.5, (3,), np.float32)
    observation_space = gymnasium.spaces.Box(-9, 9, (6,), np.float32)

    def __init__(self, task):
        self.sign = {"up": 1, "down": -1}[task]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place, self.steps = float(self.np_random.uniform(-0.5, 0.5)), 0
        return np.full(6, self.place, np.float32), {}

    def step(self, action):
        self.place, self.steps = self.place + float(action[0]), self.steps + 1
        won = self.sign * self.place > 1
        return np.full(6, self.place, np.float32), 0.0, won, self.steps == 8, {"is_success": won}

    def render(self):
        return np.full((16, 16, 3), 100 + 10 * self.steps, np.uint8)


def make(*, length: int = 2, counterfactual: bool = False, threads: bool = True, blind: bool = False):
    from pi0_jax.evaluate.simulators.gym import Simulator

    words = ("up", "down")[::-1] if counterfactual else ("up", "down")
    picture = np.zeros((48, 48, 3), np.uint8)
    picture[:24] = 0 if blind else 255
    return Simulator(
        make=Line,
        robot=ROBOT,
        fps=5,
        tasks=("up", "down")[:length],
        observe=lambda env, state: {
            "images": {"top": picture, "tool": picture}, "state": state, "prompt": words[env.sign < 0]
        },
        success=lambda info: info["is_success"],
        expert=lambda env, state: np.array([0.5 * env.sign, 0, 0], np.float32),
        per_task=3,
        threads=threads,
    )
'''


@pytest.fixture
def line(tmp_path, monkeypatch) -> str:
    """Puts the file of a made-up simulator into the folder of simulators."""
    (tmp_path / "sims").mkdir()
    (tmp_path / "sims" / "line.py").write_text(LINE)
    monkeypatch.setattr(simulators, "__path__", [*simulators.__path__, str(tmp_path / "sims")])
    return "line"


def test_one_file_is_all_that_a_simulator_needs(line, checkpoint_folder, tmp_path, capsys):
    assert "line" in simulator_names()
    evaluate(Evaluate(checkpoint_folder, env="line", episodes=4, num_steps=1, output=tmp_path / "out"))
    printed = capsys.readouterr().out
    assert "down" in printed
    assert "of 4" in printed
    assert len(list((tmp_path / "out/line_videos").glob("*.mp4"))) == 2
    options = ("length=1",)
    evaluate(Evaluate(checkpoint_folder, env="line", env_options=options, episodes=2, num_steps=1, output=tmp_path))
    assert "down" not in capsys.readouterr().out


def test_a_file_of_ones_own_is_evaluated_by_its_path(line, checkpoint_folder, tmp_path, capsys):
    path = str(tmp_path / "sims" / "line.py")
    arguments = ["--env", path, "--episodes", "2", "--num-steps", "1", "--output", str(tmp_path / "out")]
    assert main(["evaluate", str(checkpoint_folder), *arguments]) == 0
    assert "of 2" in capsys.readouterr().out
    assert main(["evaluate", str(checkpoint_folder), "--env", "mine.py"]) == 1
    assert "there is no file mine.py" in capsys.readouterr().err
    (tmp_path / "mine.py").write_text("ROBOT = 'tabletop'\n")
    with pytest.raises(ValueError, match="defines no make; see pi0_jax"):
        get_simulator(str(tmp_path / "mine.py"))


def test_demonstrations_of_any_expert_are_recorded(line, tmp_path, capsys):
    from pi0_jax.data.lerobot import LeRobotDataset

    record(Record(tmp_path / "data", "line", episodes=6))
    dataset = LeRobotDataset(tmp_path / "data")
    assert dataset.num_episodes == 6
    assert set(dataset.tasks) == {"up", "down"}
    valid = dataset.columns("valid")[:, 0] > 0
    np.testing.assert_array_equal(np.abs(dataset.columns("action")[valid, 0]), 0.5)
    assert f"{dataset.num_frames} frames" in capsys.readouterr().out


def test_the_report_runs_the_counterfactual_control_of_any_simulator(line, checkpoint_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("pi0_jax.evaluate.report.STEPS", (1,))
    how = {"env": "line", "env_options": ("length=1",), "episodes": 2}
    report(Report(checkpoint_folder, **how, output=tmp_path / "report.html"))
    page = (tmp_path / "report.html").read_text()
    assert "Counterfactual instructions" in page
    assert page.count("<video") == 1


def test_simulators_are_found_by_robot_and_refuse_unknown_options(line):
    assert find_simulator("tabletop") == "line"
    with pytest.raises(ValueError, match="no simulator of the robot 'aloha'; name one with --env"):
        find_simulator("aloha")
    assert has_option("line", "counterfactual")
    assert not has_option("line", "image_size")
    with pytest.raises(
        ValueError, match=r"no option 'lenght'; it has length, counterfactual, threads, blind\. Did you mean 'length'"
    ):
        get_simulator("line", lenght=1)


def test_layouts_differ_by_split_seed_episode_and_attempt(line):
    made = get_simulator(line)
    starts = [(0, 0), (1, 0), (0, 1), (0, 0, "train"), (0, 0, "validation"), (0, 0, "train", 1)]
    seeds = [made.start(*start).seed for start in starts]
    assert len(set(seeds)) == len(seeds)
    assert made.start(2, 0).seed == made.start(2, 0).seed
    assert [made.start(i, 0).task for i in range(3)] == ["up", "down", "up"]


def test_environments_are_used_again_and_what_is_missing_is_said():
    made = []

    def make(task):
        made.append(task)
        return gymnasium.make("CartPole-v1", render_mode="rgb_array").unwrapped

    simulator = Simulator(
        make,
        "tabletop",
        5,
        ("stand",),
        observe=lambda env, state: {"state": state},
        action=int,
        success=lambda _: False,
    )
    for seed in range(3):
        episode = simulator.start(0, seed)
        assert episode.observe()["state"].shape == (4,)
        assert episode.step(np.array(1)) == (False, False)
        with pytest.raises(ValueError, match="no scripted expert"):
            episode.expert()
        episode.close()
    assert made == ["stand"]


def test_each_environment_draws_into_its_own_gl_context():
    current = []

    class Drawing(gymnasium.Env):
        """As Gymnasium's MuJoCo environments draw: into whichever context is current."""

        def __init__(self, task):
            self.task = task
            self.mujoco_renderer = SimpleNamespace(viewer=SimpleNamespace(make_context_current=self.take))

        def take(self):
            current[:] = [self.task]

        def reset(self, *, seed=None, options=None):
            return None, {}

        def render(self):
            (task,) = current
            return np.array([[[0, 1, ord(task)]]], np.uint8)

    simulator = Simulator(Drawing, "tabletop", 5, ("a", "b"), observe=lambda env, _: {"images": {"top": env.render()}})
    episodes = [simulator.start(i, 0) for i in range(2)]
    for pictures in ([e.observe()["images"]["top"] for e in episodes], [e.picture() for e in episodes]):
        assert [chr(picture[0, 0, 2]) for picture in pictures] == ["a", "b"]
