"""The command line teaches, refuses with suggestions, and shows a user's mistake as one message."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pi0_jax import cli
from pi0_jax.config import TrainConfig
from pi0_jax.config_file import load_config
from pi0_jax.training.interrupt import Interrupted

ROOT = Path(__file__).parents[1]
CONFIG = "from pi0_jax.config import DataConfig, DatasetConfig, PolicyConfig, TrainConfig\n"
CONFIG += "config = TrainConfig(policy=PolicyConfig(robot='tabletop'), "
GOOD = CONFIG + "batch_size=16)\n"


@pytest.fixture
def configs(tmp_path, monkeypatch) -> Path:
    """A folder `configs` in the working directory, with one config."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "good.py").write_text(GOOD)
    return folder


@pytest.fixture
def trained(monkeypatch) -> list[TrainConfig]:
    """The configs that `pi0 train` would have run."""
    import pi0_jax.training.loop

    calls: list[TrainConfig] = []
    monkeypatch.setattr(pi0_jax.training.loop, "run", calls.append)
    return calls


def test_flags_override_the_fields_of_the_file(configs, trained):
    arguments = ["--optim.peak-lr", "3e-4", "--policy.model.cameras", "a", "b", "--optim.ema-decay", "None", "--resume"]
    assert cli.main(["train", "configs/good.py", *arguments]) == 0
    (config,) = trained
    assert (config.batch_size, config.optim.peak_lr, config.resume) == (16, 3e-4, True)
    assert config.policy.model.cameras == ("a", "b")
    assert config.optim.ema_decay is None


def test_a_mistyped_flag_is_refused_with_a_suggestion_and_exit_code_2(configs, trained, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "configs/good.py", "--optim.peek-lr", "3e-4"])
    assert stopped.value.code == 2
    assert "--optim.peak-lr" in capsys.readouterr().err
    assert not trained


def test_help_shows_the_configs_own_defaults_and_an_example(configs, trained, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["train", "configs/good.py", "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert "(default: 16)" in text
    assert "usage: pi0 train configs/good.py" in text
    assert "--optim.peak-lr 3e-4" in text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["plan"], "pi0 plan configs/mine.py --topology v5e:4x4"),
        (["data"], "normalise states and actions"),
        (["data", "--help"], "normalise states and actions"),
    ],
)
def test_usage_of_a_command_shows_what_comes_next(args, text, capsys):
    assert cli.main(args) == (0 if "--help" in args else 2)
    assert text in capsys.readouterr().out


def test_flags_of_the_command_itself_go_to_it(configs, monkeypatch):
    import pi0_jax.plan.commands

    calls = []
    monkeypatch.setattr(pi0_jax.plan.commands, "plan", lambda *args, **how: calls.append((*args, how)))
    (configs / "mesh.py").write_text("from pi0_jax.config import MeshConfig\nconfig = MeshConfig(fsdp=4)\n")
    arguments = [
        "--topology",
        "v5e:4x4",
        "--sample",
        "--cameras",
        "2",
        "--chunks",
        "4",
        "--batch-size",
        "8",
        "--sharding",
        "configs/mesh.py",
        "--mesh.data",
        "-1",
    ]
    assert cli.main(["plan", "configs/good.py", *arguments]) == 0
    ((config, topology, how),) = calls
    assert (config.batch_size, config.mesh.fsdp, topology) == (8, 4, "v5e:4x4")
    assert how == {"sample": True, "cameras": 2, "chunks": 4, "largest_batch": False}
    assert cli.main(["plan", "configs/good.py", "--largest-batch", "--topology", "h100:1"]) == 0
    assert calls[-1][-1]["largest_batch"]
    assert cli.main(["plan", "configs/good.py", "--largest-batch", "--sample"]) == 1


@pytest.mark.parametrize(("args", "code"), [([], 2), (["--help"], 0), (["train"], 2), (["train", "--help"], 0)])
def test_usage_names_the_commands_with_an_example_each(args, code, capsys):
    assert cli.main(args) == code
    assert "pi0 train configs/tabletop.py" in capsys.readouterr().out


def test_a_mistyped_command_is_refused_with_a_suggestion(capsys):
    assert cli.main(["trian"]) == 2
    assert "Did you mean 'train'?" in capsys.readouterr().err
    assert cli.main(["data", "stat"]) == 2
    assert "pi0 data: there is no command 'stat'. Did you mean 'stats'?" in capsys.readouterr().err


def test_a_path_of_another_kind_is_refused_with_the_command_for_it(tmp_path, capsys):
    (tmp_path / "model.safetensors").touch()
    assert cli.main(["infer", str(tmp_path), "--write-example", "x.npz"]) == 1
    assert f"pi0 convert {tmp_path} TARGET" in capsys.readouterr().err
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "meta").mkdir()
    (tmp_path / "meta" / "info.json").touch()
    assert cli.main(["infer", str(tmp_path), "--write-example", "x.npz"]) == 1
    assert "--data.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no `config`"),
        ("config = 3\n", "of type int"),
        ("\n\nconfig = undefined\n", "line 3 of .*NameError"),
        ("config = (\n", "SyntaxError"),
        (CONFIG + "data=DataConfig(frames='randm'))", r"config\.data\.frames is 'randm';.*Did you mean 'random'\?"),
        (CONFIG + "data=DataConfig(datasets=('here',)))", r"datasets\[0\] is 'here'; expected DatasetConfig"),
        (CONFIG + "data=None)", r"config\.data is None; expected DataConfig"),
    ],
)
def test_a_file_that_is_no_config_is_refused_with_the_reason(configs, text, message):
    (configs / "bad.py").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_config("configs/bad.py", TrainConfig)


def test_a_missing_config_lists_those_that_exist_and_the_closest(configs):
    with pytest.raises(FileNotFoundError, match=r"configs has: configs/good\.py\. Did you mean configs/good\.py"):
        load_config("configs/goood.py", TrainConfig)


def test_all_shipped_configs_load():
    from pi0_jax.compare.config import CompareConfig

    for path in (ROOT / "configs").glob("*.py"):
        assert isinstance(load_config(path, object), TrainConfig | CompareConfig)


def test_a_users_mistake_is_one_message_and_a_traceback_only_on_request(configs, monkeypatch, capsys):
    cameras = ["--policy.model.cameras", "top", "tool"]
    arguments = ["train", "configs/good.py", "--data.path", "nowhere", "--run-dir", "run", *cameras]
    monkeypatch.delenv("PI0_TRACEBACK", raising=False)
    assert cli.main(arguments) == 1
    error = capsys.readouterr().err
    assert "nowhere" in error
    assert "Traceback" not in error
    assert "Errno" not in error
    monkeypatch.setenv("PI0_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        cli.main(arguments)


def test_an_error_of_ours_keeps_its_traceback(configs, monkeypatch):
    import pi0_jax.training.loop

    monkeypatch.setattr(pi0_jax.training.loop, "run", lambda config: int("a bug"))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["train", "configs/good.py"])


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            Interrupted(5, Path("run/5"), signal.SIGTERM),
            0,
            "Continue with: pi0 train configs/good.py --seed 3 --resume",
        ),
        (Interrupted(5, Path("run/5"), signal.SIGINT), 130, "Last checkpoint: run/5"),
    ],
)
def test_a_signal_gives_the_shells_exit_code_and_the_way_on(configs, monkeypatch, capsys, error, code, text):
    import pi0_jax.training.loop

    def run(config: TrainConfig):
        raise error

    monkeypatch.setattr(pi0_jax.training.loop, "run", run)
    assert cli.main(["train", "configs/good.py", "--seed", "3", "--overwrite"]) == code
    assert text in capsys.readouterr().err


def test_train_py_is_the_same_command(configs):
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "configs/absent.py"], capture_output=True, text=True, cwd=configs.parent
    )
    assert done.returncode == 1
    assert "configs/good.py" in done.stderr
    assert "Traceback" not in done.stderr
