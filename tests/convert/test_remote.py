"""Copies of checkpoints elsewhere: whole, resumed, and without a connection."""

import json
import socket

import pytest

from pi0_jax import cli
from pi0_jax.convert import remote
from pi0_jax.convert.describe import differences
from pi0_jax.convert.formats import Overrides, open_checkpoint, write_checkpoint
from tests.convert.common import tiny_weights

fsspec = pytest.importorskip("fsspec")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PI0_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def store():
    """A bucket in memory."""
    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/bucket", recursive=True)


@pytest.fixture
def no_sockets(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


def upload(store, folder, target):
    store.put(str(folder), target, recursive=True)


def test_a_run_elsewhere_is_its_newest_step_without_what_only_training_needs(tmp_path, store, cache):
    for step, seed in ((9, 0), (10, 1)):
        write_checkpoint(tiny_weights("pi0", seed=seed), tmp_path / "run" / str(step), "openpi")
        (tmp_path / "run" / str(step) / "train_state").mkdir()
        (tmp_path / "run" / str(step) / "train_state" / "large").write_bytes(b"x")
    upload(store, tmp_path / "run", "/bucket/run")
    found = open_checkpoint("memory://bucket/run", Overrides(horizon=6))
    assert differences(found, open_checkpoint(tmp_path / "run" / "10", Overrides(horizon=6))) == []
    files = {path.name for path in cache.rglob("*") if path.is_file()}
    assert "large" not in files
    assert not list(cache.rglob("9"))


def test_a_broken_copy_goes_on_where_it_stopped(tmp_path, store, cache, monkeypatch):
    data = bytes(range(256)) * 40
    store.pipe({"/bucket/x/params/a": data, "/bucket/x/params/b": b"small"})
    monkeypatch.setattr(remote, "_PIECE_BYTES", 1000)
    read, asked = type(store).cat_file, []

    def flaky(self, path, start=None, end=None, **options):
        asked.append((path.rpartition("/")[2], start))
        if len(asked) == 5:
            raise OSError("connection reset")
        return read(self, path, start=start, end=end, **options)

    monkeypatch.setattr(type(store), "cat_file", flaky)
    with pytest.raises(OSError, match="connection reset"):
        remote.fetch("memory://bucket/x")
    assert not (cache / "memory/bucket/x/params/a").exists()
    folder = remote.fetch("memory://bucket/x")
    assert (folder / "params/a").read_bytes() == data
    assert [start for name, start in asked if name == "a"] == [0, 1000, 2000, 3000, 4000, *range(4000, 10_240, 1000)]
    before = len(asked)
    remote.fetch("memory://bucket/x")
    assert len(asked) == before  # all whole: nothing is read
    (folder / "params/a").write_bytes(data[:-1])
    assert (remote.fetch("memory://bucket/x") / "params/a").read_bytes() == data


def test_offline_uses_the_cache_and_opens_no_socket(tmp_path, store, no_sockets, cache, capsys):
    write_checkpoint(tiny_weights("pi05"), tmp_path / "x", "openpi")
    upload(store, tmp_path / "x", "/bucket/x")
    assert cli.main(["inspect", "memory://bucket/x", "--offline"]) == 1
    assert "not in the cache" in capsys.readouterr().err
    arguments = ["memory://bucket/x", str(tmp_path / "ours"), "--horizon", "6"]
    assert cli.main(["convert", *arguments]) == 0
    assert json.loads((tmp_path / "ours/conversion.json").read_text())["source"]["url"] == "memory://bucket/x"
    assert cli.main(["convert", *arguments, "--offline", "--overwrite"]) == 0
    capsys.readouterr()
    next(cache.rglob("norm_stats.json")).unlink()
    assert cli.main(["convert", *arguments, "--offline", "--overwrite"]) == 1
    assert "1 of" in (said := capsys.readouterr().err)
    assert "norm_stats.json" in said
    assert "--offline" in said


@pytest.mark.parametrize("scheme", ["gs", "s3", "hf"])
def test_offline_does_not_even_ask_for_the_file_system(scheme, no_sockets):
    with pytest.raises(FileNotFoundError, match="not in the cache"):
        open_checkpoint(f"{scheme}://somewhere/model", offline=True)


def test_files_and_local_urls_are_read_too(tmp_path, store):
    write_checkpoint(tiny_weights("pi0"), tmp_path / "policy", "lerobot")
    overrides = Overrides(num_heads=4, num_kv_heads=1, vision_heads=2)
    for url in (f"file://{tmp_path}/policy", f"file://{tmp_path}/policy/model.safetensors"):
        assert differences(open_checkpoint(url, overrides), open_checkpoint(tmp_path / "policy", overrides)) == []
    store.pipe("/bucket/weights.npz", b"none")
    assert remote.fetch("memory://bucket/weights.npz:params").name == "weights.npz:params"
    assert remote.fetch("memory://bucket/weights.npz").read_bytes() == b"none"


def test_what_is_not_there_or_not_known_is_said():
    with pytest.raises(FileNotFoundError, match="there is nothing at memory://bucket/none"):
        remote.fetch("memory://bucket/none")
    with pytest.raises(ValueError, match="cannot be read"):
        remote.fetch("ftq://bucket/none")
