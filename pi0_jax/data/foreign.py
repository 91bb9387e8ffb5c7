"""What a path that is no dataset is instead, and what helps."""

from __future__ import annotations

import itertools
import shlex
from pathlib import Path

HDF5 = (".hdf5", ".h5", ".hdf")
ARCHIVES = {".zip": "unzip", ".tar": "tar -xf", ".tgz": "tar -xf", ".gz": "tar -xf", ".zst": "tar -xf", ".7z": "7z x"}
"""Suffix → the command that unpacks it."""
OTHERS = {
    ".zarr": "a Zarr store, as diffusion policy and UMI have them",
    ".bag": "a ROS bag",
    ".db3": "a ROS 2 bag",
    ".mcap": "a ROS 2 bag (MCAP)",
    ".npz": "NumPy arrays",
    ".npy": "NumPy arrays",
    ".pkl": "pickles",
    ".pt": "PyTorch tensors",
    ".pth": "PyTorch tensors",
    ".arrow": "a table of Hugging Face's `datasets`",
    ".parquet": "a table without LeRobot's meta/",
}
ZARR_FILES = (".zgroup", ".zarray", "zarr.json")
INSIDE = ("*/meta/info.json", "*/*/meta/info.json", "*/*/features.json")
WRITE = "Write it as a LeRobot dataset once: docs/data.md, Other formats."
MOST_ENTRIES = 10_000
"""Files of a folder that are looked at."""
V1 = (
    "LeRobot 0.3 brings datasets of the hub from version 1 to 2.0, which is read here: python -m "
    "lerobot.datasets.v2.convert_dataset_v1_to_v2 --repo-id OWNER/NAME --single-task TEXT --local-dir data"
)
"""What helps with LeRobot datasets of version 1."""


def explain(root: Path) -> str:
    """Why a path is no LeRobot or RLDS dataset, and what to do."""
    return (root.is_dir() and _folder(root)) or _by_suffix(root)


def _folder(root: Path) -> str | None:
    """What a folder is by its structure."""
    if (root / "snapshots").is_dir():
        return _hub(root)
    inside = [path.parent.parent for name in INSIDE for path in sorted(root.glob(name))]
    if inside or (inside := [path for path in root.parents if (path / "meta/info.json").is_file()]):
        return f"{root} is no dataset; did you mean {' or '.join(str(path) for path in inside[:3])}?"
    if (root / "meta_data").is_dir():
        return f"{root} is a LeRobot dataset of version 1, by its meta_data/. {V1}"
    if (root / "meta").is_dir():
        return f"{root} has a meta/ without info.json: the copy of the dataset is incomplete. Copy it again."
    if root.suffix == ".zarr" or any((root / name).is_file() for name in ZARR_FILES):
        return f"{root} is {OTHERS['.zarr']}, which is not read as it is. {WRITE}"
    return None


def _hub(root: Path) -> str:
    """The cache folder of the hub, in which datasets are by the hash of their version."""
    versions = [path for path in (root / "snapshots").iterdir() if (path / "meta/info.json").is_file()]
    main = root / "refs/main"
    newest = main.read_text().strip() if main.is_file() else ""
    versions.sort(key=lambda path: (path.name != newest, path.name))
    if versions:
        return f"{root} is a cache folder of the Hugging Face hub; did you mean {versions[0]}?"
    name = root.name.removeprefix("datasets--").replace("--", "/")
    return f"{root} is a cache folder of the Hugging Face hub, without meta/info.json in any version: name hf://{name}."


def _by_suffix(root: Path) -> str:
    """What a path is by the names of files."""
    found: dict[str, Path] = {}
    for path in [root] if root.is_file() else itertools.islice(root.rglob("*"), MOST_ENTRIES):
        for suffix in {path.suffix, path.suffix.split("-")[0]}:
            found.setdefault(suffix, path)

    def said(suffix: str) -> str:
        return f"{root} is" if root.is_file() else f"{root} holds {found[suffix].relative_to(root)}, which is"

    if suffix := next((each for each in HDF5 if each in found), None):
        line = f"pi0 data convert {shlex.quote(str(root))} {shlex.quote(root.resolve().stem + '-v3')}"
        return f"{said(suffix)} HDF5 and not read as it is. Convert it once: {line}"
    if suffix := next((each for each in ARCHIVES if each in found), None):
        line = f"{ARCHIVES[suffix]} {shlex.quote(str(found[suffix]))}"
        return f"{said(suffix)} an archive: unpack it with `{line}`, and name the folder that has meta/info.json."
    if ".tfrecord" in found:
        return f"{root} has tfrecord files, and no features.json and dataset_info.json, which say what is in them."
    if suffix := next((each for each in OTHERS if each in found), None):
        return f"{said(suffix)} {OTHERS[suffix]} and not read as it is. {WRITE}"
    if root.is_file():
        return f"{root} is a file; expected the folder of a LeRobot or RLDS dataset (docs/data.md)."
    return f"{root} is neither a LeRobot dataset, which has meta/info.json, nor an RLDS one, which has features.json."
