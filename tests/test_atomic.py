"""Under a name there is the old content or the complete new one, whatever becomes of the process that writes."""

import errno
import subprocess
import sys

import pytest

from pi0_jax.atomic import partial_path, written

KILLED = """
import os, sys
from pathlib import Path
from pi0_jax import atomic
atomic.remove = lambda path: os.kill(os.getpid(), 9)
rename = Path.rename

def first_rename_only(self, target):
    rename(self, target)
    if sys.argv[2] == "after the first rename":
        os.kill(os.getpid(), 9)

Path.rename = first_rename_only
with atomic.written(Path(sys.argv[1]), replace_folder=True) as partial:
    partial.mkdir()
    (partial / "new").touch()
    if sys.argv[2] == "while it writes":
        os.kill(os.getpid(), 9)
"""


def make_folder(path, name):
    path.mkdir()
    (path / name).touch()
    return path


def full_disk(path):
    path.write_text("new")
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_leftovers_of_killed_processes_are_removed_those_of_live_ones_stay(tmp_path):
    kill = "import os, sys\nfrom pathlib import Path\nfrom pi0_jax.atomic import partial_path\n"
    kill += "path = partial_path(Path(sys.argv[1]))\n(path / 'a').mkdir(parents=True)\nos.kill(os.getpid(), 9)"
    for name in ("data", "data.other"):
        subprocess.run([sys.executable, "-c", kill, str(tmp_path / name)], check=False)
    alive = partial_path(tmp_path / "data")
    alive.touch()
    assert len(list(tmp_path.iterdir())) == 2  # of "data" only the live one, and what was left of the other
    with written(tmp_path / "data") as partial:
        partial.write_text("complete")
    assert alive.exists()
    assert (tmp_path / "data").read_text() == "complete"


def test_after_an_error_nothing_is_left_and_the_file_is_named(tmp_path):
    (tmp_path / "data").write_text("old")
    with pytest.raises(OSError, match=r"No space left.*data'") as raised, written(tmp_path / "data") as partial:
        full_disk(partial)
    assert raised.value.filename == str(tmp_path / "data")
    assert names(tmp_path) == ["data"]
    assert (tmp_path / "data").read_text() == "old"


def test_a_folder_is_replaced_on_request_alone(tmp_path):
    make_folder(tmp_path / "out", "old")
    with pytest.raises(OSError, match="out"), written(tmp_path / "out") as partial:
        make_folder(partial, "new")
    assert names(tmp_path / "out") == ["old"]
    with written(tmp_path / "out", replace_folder=True) as partial:
        make_folder(partial, "new")
    assert names(tmp_path / "out") == ["new"]
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("moment", "content"),
    [("while it writes", "old"), ("after the first rename", "old"), ("before the old one is removed", "new")],
)
def test_a_kill_during_a_replacement_loses_no_folder(tmp_path, moment, content):
    out = make_folder(tmp_path / "out", "old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(out), moment], check=False)
    assert killed.returncode == -9
    assert len(names(tmp_path)) == 2
    partial_path(out)  # what the next process that writes there asks for first
    assert names(tmp_path) == ["out"]
    assert names(out) == [content]
