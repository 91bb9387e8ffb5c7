"""`pi0 data`: statistics without pictures, problems by name, a page, a cache, conversion that goes on, a robot file."""

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pi0_jax import cli
from pi0_jax.data.cache import CachedFrames, build_cache
from pi0_jax.data.lerobot import LeRobotDataset, LeRobotWriter
from pi0_jax.data.lerobot.merge import convert
from pi0_jax.data.normalization import read_stats_file, semantics_from_json, stats_from_json
from pi0_jax.data.robots import get_robot
from pi0_jax.data.sketch import summarise
from pi0_jax.data.source import BadEpisode, Renamed
from pi0_jax.data.tools.check import _check_outside, _check_ranges
from pi0_jax.data.tools.show import _log_to_rerun
from pi0_jax.data.tools.stats import stats_of
from tests.data.conftest import FEATURES, episode, write
from tests.data.formats import CAMERAS, RLDS_KEYS, write_rlds, write_v2
from tests.data.stats import compute_stats
from tests.data.test_loader import opened

CONFIG = """
from pi0_jax.config import *
config = TrainConfig(
    policy=PolicyConfig(
        robot="tabletop",
        model=ModelConfig(vision=VisionConfig(image_size=32), cameras=("top", "tool"), action_dim=8),
    ),
    data=DataConfig({path!r}),
)
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a subcommand on a dataset, and gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(subcommand, path, *arguments):
        (tmp_path / "config.py").write_text(CONFIG.format(path=str(path)))
        code = cli.main(["data", subcommand, "config.py", *arguments])
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return run


@pytest.fixture
def copy(dataset, tmp_path):
    return shutil.copytree(dataset.root, tmp_path / "copy", ignore=shutil.ignore_patterns(".cache"))


def test_stats_never_open_a_video_and_equal_those_of_training(dataset, run, monkeypatch, tmp_path):
    for name in ("_OpenVideo.__init__", "_list_frames"):
        monkeypatch.setattr(f"pi0_jax.data.video.{name}", lambda *_: pytest.fail("opened a video"))
    code, printed, _ = run("stats", dataset.root, "--workers", "1")
    assert code == 0
    assert "tabletop actions" in printed
    written, expected = stats_from_json(read_stats_file(tmp_path / "norm_stats.json")), compute_stats(dataset)
    for key in ("state", "actions"):
        for ours, theirs in zip(written[key], expected[key], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    content = json.loads((tmp_path / "norm_stats.json").read_text())
    assert semantics_from_json(content) == {"tabletop": ("absolute",) * 3}


def test_a_good_dataset_passes_the_check(tmp_path, run, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # another process takes seconds to start
    with LeRobotWriter(tmp_path / "data", 5, "tabletop", FEATURES) as writer:
        for number in range(5):
            writer.add_episode(episode(number) | {"valid": np.ones((len(episode(number)["action"]), 1))}, "push")
    code, printed, err = run("check", tmp_path / "data", "--decode")
    assert code == 0, err
    assert "no problem in 1 dataset, 5 episodes, 34 frames" in printed


def test_statistics_just_written_pass_the_check_whatever_the_held_out_episodes_are(tmp_path, run):
    with LeRobotWriter(tmp_path / "data", 5, "tabletop", FEATURES) as writer:
        for number, scale in ((1, 1), (2, 500)):
            columns = episode(number)
            writer.add_episode(columns | {"action": scale * columns["action"]}, "push")
    near, far = LeRobotDataset(tmp_path / "data").episode_keys()
    assert far < near, "the episode of much larger actions is the one to hold out"
    share = ("--data.validation-share", str((near + far) / 2 / 2**64))
    assert run("stats", tmp_path / "data", "--workers", "1", *share)[0] == 0
    given = ("--data.norm-stats", "norm_stats.json")
    assert run("check", tmp_path / "data", *given, *share)[0] == 0
    code, _, err = run("check", tmp_path / "data", *given)
    assert (code, "norm_stats.json is far off" in err) == (1, True)
    code, _, err = run("check", tmp_path / "data", "--data.validation-share", "0.99")
    assert (code, "data has no episode to train on: all are held out" in err) == (1, True)


def spoil(root, name, change):
    path = root / "data/chunk-000/file-000.parquet"
    table = pq.read_table(path)
    at = table.column_names.index(name)
    values = np.array(table[name].to_pylist())
    field = table.schema.field(at)
    import pyarrow as pa

    pq.write_table(table.set_column(at, field, pa.array(change(values).tolist(), field.type)), path)


def constant(values):
    values[:, 1] = 2.5
    return values


def late(values):
    values[10] += 0.3
    return values


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("timestamp", late, r"1 timestamps are off 5 frames per second, in episode 1"),
        ("observation.state", lambda v: np.where(np.arange(34)[:, None] == 12, np.nan, v), r"NaN.*in episode 1"),
    ],
)
def test_the_check_names_what_is_wrong(copy, run, column, change, message):
    import re

    spoil(copy, column, change)
    code, _, err = run("check", copy)
    assert code == 1
    assert re.search(message, err), err


def test_a_constant_dimension_is_listed_and_no_problem(copy, run):
    spoil(copy, "action", constant)
    code, out, err = run("check", copy)
    assert code == 0, err
    assert "note: " in out
    assert "actions that are constant, of which nothing is learnt: dy 2.5" in out


def test_an_outlier_that_makes_a_dimension_nearly_constant_is_found(dataset):
    actions = np.random.default_rng(0).normal(size=(5000, 1))
    assert _check_ranges(summarised(actions), ("dx",)) == []
    actions[7] = 1e4
    assert "dx is nearly constant" in _check_ranges(summarised(actions), ("dx",))[0]
    assert _check_outside(actions, summarised(actions), ("dx",), "actions", 0.05) == []
    actions = np.where(np.random.default_rng(1).random((5000, 1)) < 0.008, 40.0, 0.001 * actions)  # q99 is below
    assert (
        "actions dx: 0.8% of the frames" in _check_outside(actions, summarised(actions), ("dx",), "actions", 0.005)[0]
    )


def summarised(values):
    return stats_of(summarise(values, np.arange(len(values), dtype=np.uint64)))


def test_the_check_finds_missing_frames_and_tasks_without_text(copy, run):
    tasks = pq.read_table(copy / "meta/tasks.parquet").to_pylist()
    import pyarrow as pa

    tasks[0]["task"] = " "
    pq.write_table(pa.Table.from_pylist(tasks), copy / "meta/tasks.parquet")
    short = write(copy.parent / "short", [0, 1])
    name = f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"
    shutil.copy(short / name, copy / name)
    code, _, err = run("check", copy)
    assert code == 1
    assert "tasks [0] have no text; they are those of episode 0" in err
    assert "episode 2, " in err


def test_fields_of_the_config_can_be_set_behind_it(dataset, run, capsys):
    flags = ("--data.path", str(dataset.root))
    assert run("check", "nowhere", *flags)[0] == run("check", dataset.root)[0]
    code, printed, _ = run("stats", "nowhere", "--workers", "1", *flags, "--output", "s.json")
    assert (code, printed.count("wrote s.json")) == (0, 1)
    for wrong in ("--decod", "--data.pth"):
        with pytest.raises(SystemExit, match="2"):
            run("check", dataset.root, wrong, "x")
        assert wrong in capsys.readouterr().err


def test_the_check_finds_what_training_would_refuse(copy, run):
    info = json.loads((copy / "meta/info.json").read_text())
    info["features"][CAMERAS[0]]["shape"] = [96, 96, 3]
    info["total_frames"] += 1
    (copy / "meta/info.json").write_text(json.dumps(info))
    code, _, err = run("check", copy)
    assert code == 1
    assert "holds images of shape (48, 48, 3); meta/info.json says (96, 96, 3)" in err
    assert "counts 35 frames" in err
    config = copy.parent / "config.py"
    config.write_text(config.read_text().replace('"top", "tool"', '"front"'))
    assert cli.main(["data", "check", "config.py"]) == 1


def test_the_check_lists_all_episodes_that_cannot_be_read(tmp_path, run):
    root = write_v2(tmp_path / "data")
    (root / "data/chunk-000/episode_000001.parquet").unlink()
    video = root / f"videos/chunk-001/{CAMERAS[1]}/episode_000003.mp4"
    video.write_bytes(video.read_bytes()[:200])
    code, _, err = run("check", root)
    assert code == 1
    assert "episode 1: " in err
    assert "episode 3: " in err
    assert err.count("episode_000003.mp4") == 1


def test_the_page_holds_pictures_histograms_and_curves(dataset, run, tmp_path):
    code, printed, _ = run("show", dataset.root, "--episodes", "1")
    assert (code, printed) == (0, "wrote data.html\n")
    page = (tmp_path / "data.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 1
    assert page.count("data:image/png;base64,") == 3
    assert "push the blue ball" in page
    assert 'src="http' not in page


def test_a_recording_for_rerun_gets_every_frame(dataset, monkeypatch):
    logged = []
    fake = types.SimpleNamespace(
        init=lambda _: None,
        save=logged.append,
        set_time=lambda *_, **__: None,
        log=lambda path, _: logged.append(path),
        Image=lambda _: None,
        Scalars=lambda _: None,
        disconnect=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "rerun", fake)
    _log_to_rerun([opened(dataset)], 1, Path("out.rrd"))
    assert logged[0] == "out.rrd"
    assert len(logged) == 1 + 9 * (2 + 6 + 3)
    monkeypatch.setitem(sys.modules, "rerun", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[viz\]'"):
        _log_to_rerun([opened(dataset)], 1, Path("out.rrd"))


@pytest.mark.parametrize("quality", [None, 95])
def test_cached_frames_are_the_resized_frames(dataset, tmp_path, quality):
    from pi0_jax.data.transform import resize_with_pad

    size = build_cache(dataset, tmp_path, list(CAMERAS), 32, quality, workers=1)
    cached = CachedFrames(dataset, tmp_path, list(CAMERAS), 32)
    rows = np.random.default_rng(0).permutation(34).reshape(2, 17)
    for camera in CAMERAS:
        truth = resize_with_pad(dataset.images(camera, rows), 32)
        error = np.abs(cached.images(camera, rows).astype(int) - truth)
        assert error.max() == 0 if quality is None else error.mean() < 3
    blocks = 2 * 2 * 2**16  # of which every file has a last and a first one
    assert (size - blocks) / 68 < (1.1 if quality is None else 0.9) * 32 * 32 * 3


def test_a_stopped_cache_goes_on_and_a_changed_video_makes_it_invalid(copy, tmp_path, monkeypatch):
    monkeypatch.setattr("pi0_jax.data.cache.FRAMES_PER_SHARD", 10)
    dataset = LeRobotDataset(copy)
    calls = []
    images = dataset.images

    def stop_at_the_third(camera, rows):
        calls.append(rows[0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return images(camera, rows)

    monkeypatch.setattr(dataset, "images", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build_cache(dataset, tmp_path / "cache", [CAMERAS[0]], 32, workers=1)
    with pytest.raises(ValueError, match="or not all of it"):
        CachedFrames(dataset, tmp_path / "cache", [CAMERAS[0]], 32)
    build_cache(dataset, tmp_path / "cache", [CAMERAS[0]], 32, workers=1)
    assert calls == [0, 10, 20, 20, 30]
    video = copy / f"videos/{CAMERAS[0]}/chunk-000/file-000.mp4"
    video.touch()  # another time of change, the same content
    CachedFrames(dataset, tmp_path / "cache", [CAMERAS[0]], 32)
    shutil.copy(copy / f"videos/{CAMERAS[1]}/chunk-000/file-000.mp4", video)
    with pytest.raises(ValueError, match="made of other files"):
        CachedFrames(dataset, tmp_path / "cache", [CAMERAS[0]], 32)
    again = LeRobotDataset(copy)
    build_cache(again, tmp_path / "cache", [CAMERAS[0]], 48, workers=1)
    cached = CachedFrames(again, tmp_path / "cache", [CAMERAS[0]], 48)
    np.testing.assert_array_equal(cached.image(33, CAMERAS[0]), again.image(33, CAMERAS[0]))


def test_a_cache_that_does_not_fit_is_not_begun(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=1000))
    with pytest.raises(ValueError, match=r"caching 34 frames takes 0\.1 MB; .* has 0\.0 MB left\. With --jpeg 95"):
        build_cache(dataset, tmp_path, [CAMERAS[0]], 32)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_damage_ends_the_cache_command_with_its_message(copy, run, workers):
    for video in copy.glob("videos/*/*/*.mp4"):
        video.write_bytes(video.read_bytes()[:2000])
    code, _, err = run("cache", copy, "--workers", workers)
    assert code == 1
    assert "file-000.mp4 cannot be decoded" in err


def test_the_page_and_the_cache_leave_out_what_cannot_be_read_and_say_so(run, tmp_path, caplog):
    root = write_v2(tmp_path / "v2")
    video = root / f"videos/chunk-000/{CAMERAS[0]}/episode_000001.mp4"
    video.write_bytes(video.read_bytes()[:2000])
    for subcommand, *arguments in (("show", "--episodes", "1"), ("cache", "--workers", "1")):
        caplog.clear()
        code, _, err = run(subcommand, root, "--skip-bad-episodes", *arguments)
        assert code == 0, err
        assert "skipped 1 of 5 episodes" in caplog.text
        assert f"episode 1: {video} cannot be decoded" in caplog.text


def test_damage_in_a_cache_is_an_error(dataset, tmp_path):
    build_cache(dataset, tmp_path, [CAMERAS[0]], 48, workers=1)
    (shard,) = tmp_path.glob("*/*.array_record")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 255
    shard.write_bytes(content)
    cached = CachedFrames(dataset, tmp_path, [CAMERAS[0]], 48)
    with pytest.raises(BadEpisode, match=r"shard-00000\.array_record is damaged"):
        cached.images(CAMERAS[0], np.arange(34))


def test_the_cache_command_says_what_a_frame_takes(dataset, run, tmp_path):
    code, printed, _ = run("cache", dataset.root, "--workers", "1")
    assert code == 0
    assert "68 frames of 32 px" in printed
    assert len(list((tmp_path / "cache").glob("*/*.array_record"))) == 2


def sources(tmp_path):
    yield LeRobotDataset(write_v2(tmp_path / "v2")), (0, 1, 2, 3, 4)
    pytest.importorskip("tensorflow_datasets")
    from pi0_jax.data.rlds.reader import RldsDataset

    yield Renamed(RldsDataset(write_rlds(tmp_path / "rlds"), 5), RLDS_KEYS), (0, 2, 4, 1, 3)


def test_older_lerobot_and_rlds_become_lerobot_3(tmp_path):
    for number, (source, order) in enumerate(sources(tmp_path)):
        output = tmp_path / f"out{number}"
        convert(source, output, "tabletop", crf=6, workers=1, episodes_per_piece=2)
        made = LeRobotDataset(output)
        assert made.version == "v3.0"
        for name in ("observation.state", "action", "valid"):
            np.testing.assert_array_equal(made.columns(name), np.concatenate([episode(n)[name] for n in order]))
        assert [made.task(i) for i in range(34)] == [source.task(i) for i in range(34)]
        np.testing.assert_array_equal(made.columns("index")[:, 0], np.arange(34))
        for camera in CAMERAS:
            truth = np.concatenate([episode(n)[camera] for n in order]).astype(float)
            decoded = made.images(camera, np.arange(34)).astype(float)
            assert (np.square(decoded[:, None] - truth[None]).mean((2, 3, 4)).argmin(1) == np.arange(34)).all()
        assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []
        stats = json.loads((output / "meta/stats.json").read_text())
        pixels = truth / 255
        np.testing.assert_allclose(np.ravel(stats[CAMERAS[1]]["mean"]), pixels.mean((0, 1, 2)), atol=0.02)
        assert stats[CAMERAS[1]]["count"] == [34]


def test_a_stopped_conversion_goes_on(dataset, tmp_path, monkeypatch):
    source = LeRobotDataset(dataset.root)
    seen = []
    add = LeRobotWriter.add_episode

    def stop_at_the_fourth(self, frames, task):
        seen.append(len(frames["action"]))
        if len(seen) == 4:
            raise KeyboardInterrupt
        add(self, frames, task)

    monkeypatch.setattr(LeRobotWriter, "add_episode", stop_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "out", "tabletop", workers=1, episodes_per_piece=2)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match="pieces of another conversion"):
        convert(source, tmp_path / "out", "tabletop", crf=30, workers=1, episodes_per_piece=2)
    convert(source, tmp_path / "out", "tabletop", workers=1, episodes_per_piece=2)
    assert seen == [9, 5, 12, 1, 12, 1, 7]
    np.testing.assert_array_equal(LeRobotDataset(tmp_path / "out").columns("action"), dataset.columns("action"))
    with pytest.raises(FileExistsError):
        convert(source, tmp_path / "out", "tabletop")


def test_a_robot_file_made_from_a_dataset_can_be_trained_with(dataset, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["data", "robot", str(dataset.root)]) == 0
    robot = get_robot(str(tmp_path / "my_robot.py"))
    assert robot.name == "tabletop"  # as the dataset says
    assert robot.cameras == {CAMERAS[0]: "base_0_rgb", CAMERAS[1]: "left_wrist_0_rgb"}
    assert robot.actions == ("dx", "dy", "dz")
    assert (robot.fps, robot.image_size) == (5, (48, 48))
    assert cli.main(["data", "robot", str(dataset.root)]) == 1
    assert "exists" in capsys.readouterr().err
    assert cli.main(["data", "robot", str(dataset.root), "--output", "arm"]) == 1
    assert "such as arm.py" in capsys.readouterr().err


def test_an_unknown_subcommand_gets_a_suggestion(capsys):
    assert cli.main(["data", "stat"]) == 2
    assert "Did you mean 'stats'?" in capsys.readouterr().err
    assert cli.main(["data", "--help"]) == 0
    assert "convert" in capsys.readouterr().out
