"""Files of datasets: where a dataset is, a folder for what is derived from it, and reading with errors that help."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pi0_jax.errors import UserError, require_package


def find_dataset(path: str, offline: bool = False, *, videos: bool = True) -> Path:
    """Folder of a dataset that is on this machine, or is fetched from the Hugging Face hub.

    Args:
        path: a folder, or "hf://owner/name".
        offline: take the hub's datasets from its cache on this machine, without asking the network; the variable
            HF_HUB_OFFLINE=1 does the same.
        videos: False: what describes a dataset of the hub will do, and its videos are not fetched.

    Raises:
        FileNotFoundError: a dataset of the hub is not in the cache, and the network is not to be asked or out of reach.
        UserError: `huggingface_hub` is not installed, the hub refuses, or the name is none of the hub's; or the path is
            another URL.
    """
    if "://" in path and not path.startswith("hf://"):
        raise UserError(
            f"{path} is in an object store, and datasets are read from folders: mount it (gcsfuse, s3fs, rclone "
            "mount), or copy it (gcloud storage rsync -r, aws s3 sync), and name the folder."
        )
    if not path.startswith("hf://"):
        return Path(path).expanduser()
    name = path.removeprefix("hf://").removeprefix("datasets/").strip("/")
    if name.count("/") != 1:
        raise UserError(
            f"{path} names no dataset of the hub; expected hf://owner/name, as in the address of its page, "
            "huggingface.co/datasets/owner/name."
        )
    hub: Any = require_package("huggingface_hub", "hub", f"reading {path} from the Hugging Face hub")
    left_out = None if videos else ["videos/*"]
    try:
        folder = hub.snapshot_download(name, repo_type="dataset", local_files_only=offline, ignore_patterns=left_out)
    except FileNotFoundError as error:
        constants = require_package("huggingface_hub.constants", "hub")
        cache = Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}"
        raise FileNotFoundError(
            f"{path} is not in the hub's cache ({cache}), and no connection was made. With one, run it once without "
            f"offline and HF_HUB_OFFLINE, or `hf download {name} --repo-type dataset`; HF_HOME names another cache."
        ) from error
    except Exception as error:  # of the hub's own kinds, which are others in each version
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{path} cannot be fetched from the Hugging Face hub: {reason} Is the name right, hf://owner/name, and has "
            "`hf auth login` been run, for datasets that are private or gated?"
        ) from error
    return Path(folder)


def user_cache() -> Path:
    """Folder for what can be made again: PI0_CACHE, or `pi0_jax` in XDG_CACHE_HOME or ~/.cache."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "pi0_jax"
    return Path(os.environ.get("PI0_CACHE") or usual).expanduser().absolute()


def cache_folder(root: Path, chosen: Path | None) -> Path:
    """A writable folder for what is derived from a dataset: the chosen one; else in the user's cache; else a temporary
    one. Nothing is written into a dataset.

    Raises:
        UserError: none of them can be written to.
    """
    owner = os.getuid() if hasattr(os, "getuid") else "user"
    name = f"{root.name}-{hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:16]}"
    candidates = [user_cache() / "datasets" / name, Path(tempfile.gettempdir()) / f"pi0_jax-{owner}" / name]
    for folder in candidates if chosen is None else [chosen]:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    tried = ", ".join(map(str, candidates if chosen is None else [chosen]))
    raise UserError(f"what is derived from {root} can be written to none of {tried}. Set PI0_CACHE to a folder.")


def advice(path: Path) -> str:
    """What to do about a file of a dataset that cannot be read."""
    try:
        with path.open("rb") as file:
            pointer = file.read(40).startswith(b"version https://git-lfs")
    except OSError:
        pointer = False
    if pointer:
        return "It is a pointer of Git LFS, not the file: run `git lfs install` once and `git lfs pull` in the dataset."
    return "Copy the dataset again."


def read_json(path: Path, expected: str, *, of_dataset: bool = True) -> Any:
    """Content of a JSON file. Errors say that `expected` should be there, and what to do if it is `of_dataset`.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is not JSON.
    """
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no {path}; expected {expected}.") from error
    except ValueError as error:
        raise UserError(
            f"{path} is not JSON ({error}); expected {expected}. {advice(path) if of_dataset else ''}".rstrip()
        ) from error


def open_array_record(path: Path) -> Any:
    """A reader of an ArrayRecord file for random access, without threads of its own."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(str(path), "readahead_buffer_size:0,max_parallelism:0")
