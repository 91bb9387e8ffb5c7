"""Checkpoints elsewhere: gs://, s3://, hf:// and whatever else fsspec reads, copied file by file into a cache.

The cache is the user's (`data.files.user_cache`). A copy that was interrupted goes on where it
stopped; files that are whole are known by their size. What the source listed lies beside the copy as `.listing.json`,
which is how an offline call knows whether the copy is whole.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from tqdm import tqdm

from pi0_jax.data.files import user_cache
from pi0_jax.errors import UserError, require_package

LISTING = ".listing.json"
"""Names and sizes of the files of a copy, as the source listed them."""
PARTIAL = ".part"
"""Ends the name of a file that is not whole yet."""

_PIECE_BYTES = 2**24
_LEFT_OUT = {"train_state", "data_state", ".git"}
"""Folders of a checkpoint that only resuming its training needs."""
_PACKAGES = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "s3": "s3fs",
    "hf": "huggingface-hub",
    "http": "aiohttp",
    "https": "aiohttp",
}


def is_remote(path: str | Path) -> bool:
    """Whether a path is a URL."""
    return "://" in str(path)


def fetch(url: str, offline: bool = False) -> Path:
    """Copies a checkpoint into the cache, as far as it is not there yet, and returns its path there.

    Args:
        url: of a checkpoint's folder or file (`.npz` with `:subtree` if wanted). Of a run, the newest step is taken; a
            `.safetensors` comes with the folder that it is in, which says what it is.
        offline: open no connection; only what is in the cache is used.

    Raises:
        FileNotFoundError: there is nothing at the URL, or, offline, a file is not in the cache; the message names it.
        UserError: fsspec, or its part for this kind of URL, is not installed.
        OSError: the connection failed; the next call goes on where it did.
    """
    file, mark, subtree = url.rstrip("/").partition(".npz:")
    url, ending = (f"{file}.npz", f":{subtree}") if mark else (file, "")
    root = url.rpartition("/")[0] if url.endswith(".safetensors") else url
    folder = user_cache() / re.sub("[^A-Za-z0-9._/@=+-]", "_", root.replace("://", "/"))
    sizes = _known_listing(root, folder) if offline else _copy(root, folder)
    missing = {name: size for name, size in sizes.items() if not _is_whole(folder / name, size)}
    if missing:
        first = ", ".join(f"{name} ({size / 1e6:.1f} MB)" for name, size in list(missing.items())[:5])
        raise FileNotFoundError(
            f"{len(missing)} of {len(sizes)} files of {root} are not in the cache {folder}: {first}"
            f"{' …' if len(missing) > 5 else ''}. Run once without --offline; the copy goes on where it stopped."
        )
    name = root.rpartition("/")[2]
    return Path(str(folder / name if list(sizes) == [name] and url == root else folder) + ending)


def wanted(names: dict[str, int]) -> dict[str, int]:
    """Of all files of a folder (path to size), those of a checkpoint's weights and assets, of the newest step."""
    kept = {name: size for name, size in names.items() if not _LEFT_OUT & set(name.split("/")[:-1])}
    steps = {match[1] for name in kept if (match := re.match(r"((?:checkpoints/)?\d+)/params/", name))}
    if steps:
        newest = max(steps, key=lambda step: int(step.rpartition("/")[2]))
        kept = {name: size for name, size in kept.items() if name.startswith(f"{newest}/")}
    return kept


def _copy(root: str, folder: Path) -> dict[str, int]:
    """Copies what is missing; returns the names and sizes that the source lists."""
    system, path = _open(root)
    path = path.rstrip("/")
    try:
        listed = system.find(path, detail=True)
    except FileNotFoundError:
        listed = {}
    if not listed:
        raise FileNotFoundError(f"there is nothing at {root}.")
    name_of = {full: full.removeprefix(path).strip("/") or path.rpartition("/")[2] for full in listed}
    if outside := [full for full, name in name_of.items() if ".." in name.split("/")]:
        raise UserError(f"{root} has names that lead out of it: {outside[:3]}; it is not copied.")
    sizes = wanted({name_of[full]: int(entry["size"]) for full, entry in listed.items()})
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LISTING).write_text(json.dumps({"url": root, "files": sizes}, indent=2))
    have = sum(_bytes_here(folder / name, size) for name, size in sizes.items())
    with tqdm(total=sum(sizes.values()), initial=have, unit="B", unit_scale=True, desc=root, leave=False) as bar:
        for full, name in name_of.items():
            if name in sizes and not _is_whole(folder / name, sizes[name]):
                _copy_file(system, full, folder / name, sizes[name], bar)
    return sizes


def _copy_file(system, source: str, target: Path, size: int, bar: tqdm) -> None:
    """Copies one file from where a partial copy ends, under a name of its own until it is whole."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(target.name + PARTIAL)
    if partial.exists() and partial.stat().st_size > size:
        partial.unlink()
    with partial.open("ab") as out:
        start = out.tell()
        while start < size:
            piece = system.cat_file(source, start=start, end=min(size, start + _PIECE_BYTES))
            if not piece:
                raise OSError(f"{source} ends after {start} of {size} bytes; try again.")
            out.write(piece)
            start += len(piece)
            bar.update(len(piece))
    if start != size:
        partial.unlink()
        raise OSError(f"{source} has {start} bytes and not the {size} that were listed: it was changed; try again.")
    partial.replace(target)


def _known_listing(root: str, folder: Path) -> dict[str, int]:
    path = folder / LISTING
    if not path.is_file():
        raise FileNotFoundError(
            f"{root} is not in the cache {user_cache()}. Run once without --offline, or set PI0_CACHE to the cache it "
            "is in."
        )
    return json.loads(path.read_text())["files"]


def _bytes_here(path: Path, size: int) -> int:
    partial = path.with_name(path.name + PARTIAL)
    if _is_whole(path, size):
        return size
    return partial.stat().st_size if partial.is_file() else 0


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _open(url: str) -> tuple[Any, str]:
    """The file system of a URL, and the path in it."""
    scheme = url.partition("://")[0]
    fsspec: Any = require_package("fsspec", "remote", url)
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        package = _PACKAGES.get(scheme, "a package of its own")
        raise UserError(f"{url} needs {package}, which is not installed: pip install -e '.[remote]'.") from error
    except ValueError as error:
        raise UserError(f"{url} cannot be read: {error}. Known are gs://, s3://, hf:// and local paths.") from error
