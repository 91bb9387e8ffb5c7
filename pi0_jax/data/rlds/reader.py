"""Reads RLDS datasets, such as DROID's and Open X-Embodiment's, as tensorflow-datasets writes them; no tensorflow.

Such a dataset is a folder `<name>/<version>/` with `features.json`, `dataset_info.json` and shards; a record of a shard
is a whole episode, its pictures as JPEG or PNG. tensorflow-datasets decodes the features (the extra `rlds`); it cannot
open `tfrecord` files without tensorflow, so `index.py` takes them apart.

The first use reads every shard once and keeps an index beside it (`index.py`). After that any frame of a `tfrecord`
shard is one read of its own bytes, and a frame of an `array_record` shard one read of its episode, which such files
compress. So both have random access, and one stream of indices serves them like any other dataset. Loaders that must
not jump about a disk take `shuffle="shards"`.
"""

from __future__ import annotations

import functools
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Bool, Int, UInt8

from pi0_jax.data.files import cache_folder, open_array_record, read_json
from pi0_jax.data.rlds.index import FORMATS, METADATA, build_index, dtype_of, flatten, make_parser, step_features
from pi0_jax.data.source import BadEpisode, Rows, Source
from pi0_jax.errors import UserError

SHARDS_OPEN = 64
LOOKED_AT, BLANK = 8, 8
"""Pictures that are looked at to believe that a camera is missing; values of a blank one differ by no more."""
EPISODES_KEPT = 16
"""Parsed episodes of compressed shards that each thread keeps."""


_log = logging.getLogger(__name__)


class RldsDataset(Source):
    """Reads an RLDS dataset.

    Features are named by their path among the steps, such as "observation/image" or "action".

    Args:
        root: folder of one version, or of the dataset, whose newest version is taken.
        fps: frames per second, which the format does not store.
        split: name of the split.
        task: feature with the instruction; None: `language_instruction`, or the only text that can be it.
        only: regular expression that an episode's `episode_metadata/file_path` has to contain.
        cache: folder for the index; by default one in the user's cache (`data.files.user_cache`).
        skip_bad_episodes: leave out records that cannot be read, and log them.
        workers: processes that index a large dataset; None: one per core.

    Raises:
        FileNotFoundError: the folder, a file of it, or a shard is missing.
        UserError: no RLDS dataset, a feature is missing, or a record is damaged; the `rlds` extra is not installed.
    """

    def __init__(
        self,
        root: str | os.PathLike[str],
        fps: int | float,
        *,
        split: str = "train",
        task: str | None = None,
        only: str | None = None,
        cache: str | os.PathLike[str] | None = None,
        skip_bad_episodes: bool = False,
        workers: int | None = None,
    ):
        self.root, self.fps = _version_folder(Path(root)), fps
        self.format, self._paths, counts = _shards(self.root, split)
        self._json = read_json(self.root / "features.json", "an RLDS dataset's description")
        leaves = step_features(self._json)
        self.features = {
            name: {"dtype": dtype_of(leaf), "shape": tuple(leaf.shape), "names": None} for name, leaf in leaves.items()
        }
        task = self._find_task(task)
        folder = cache_folder(self.root, None if cache is None else Path(cache))
        name = self.root.parent.name
        self._index = build_index(name, self._paths, self.format, self._json, folder, workers)
        self.skipped = {}
        for path, shard, count in zip(self._paths, self._index, counts, strict=True):
            bad = dict(zip(shard["bad"].tolist(), shard["reasons"].tolist(), strict=True))
            found = len(shard["records"]) + len(bad)
            lost = f"is missing: the file holds {found} of {count} records."
            for number, reason in (bad | dict.fromkeys(range(found, count), lost)).items():
                message = f"{path}: record {number}, which is episode {number} of this shard, {reason}"
                if not skip_bad_episodes:
                    raise BadEpisode(f"{message} Copy the shard again, or pass skip_bad_episodes.")
                self.skipped[f"episode {number} of {path.name}"] = message
        self._choose(only)
        if task is None:
            self.tasks, self._task_index = [""], np.zeros(self.num_frames, np.int64)
            return
        texts = np.concatenate([shard[f"column/{task}"] for shard in self._index])[self._rows]
        encoded = pa.array(texts).dictionary_encode()
        self.tasks, self._task_index = encoded.dictionary.to_pylist(), encoded.indices.to_numpy().astype(np.int64)

    def _find_task(self, task: str | None) -> str | None:
        """The feature with the instruction; None where there is no text."""
        texts = [name for name, feature in self.features.items() if feature["dtype"] == "string"]
        if task in texts:
            return task
        if task is None and "language_instruction" in texts:
            return "language_instruction"
        likely = [name for name in texts if "instruction" in name.rsplit("/", 1)[-1]] or texts
        if task is not None or len(likely) > 1:
            raise UserError(
                f"{self.root} has no instruction {task or 'language_instruction'!r}; its text is {texts}. Set `task` "
                "of the dataset."
            )
        if likely:
            _log.info("%s: the instruction is %s; the dataset's `task` can say otherwise", self.root, likely[0])
        return likely[0] if likely else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "_steps"}

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        self.check_column(name)
        rows = self._rows[self.frames_of(episodes)]
        shards = self._shard_of(rows)
        values = [
            self._index[s][f"column/{name}"][rows[shards == s] - self._starts[s]] for s in np.unique(shards).tolist()
        ]
        return np.concatenate(values) if values else np.zeros((0, *self.features[name]["shape"]))

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self._task_index

    @property
    def shard_ends(self) -> Int[np.ndarray, "s"]:
        return np.unique([*np.searchsorted(self._rows, self._starts[1:]), len(self._rows)])

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        rows = np.asarray(rows)
        at = self._rows[rows.ravel()]
        shards = self._shard_of(at)
        within = at - self._starts[shards]
        pictures: list[Any] = [None] * at.size
        for i in np.lexsort((within, shards)).tolist():
            pictures[i] = self._picture(camera, int(shards[i]), int(within[i]))
        return np.stack(pictures).reshape(*rows.shape, *pictures[0].shape)

    def camera_mask(self, camera: str) -> Bool[np.ndarray, "e"]:
        self.check_camera(camera)
        kept = vars(self).setdefault("_columns", {})
        if ("mask", camera) not in kept:
            kept["mask", camera] = self._checked_mask(camera)
        return kept["mask", camera]

    def _checked_mask(self, camera: str) -> Bool[np.ndarray, "e"]:
        """Episodes with a camera by the dataset's `has_...`, if pictures of those without it are blank indeed."""
        name = f"has_{camera.rsplit('/', 1)[-1]}"
        every = np.ones(self.num_episodes, bool)
        without = np.flatnonzero(self._metadata.get(f"{METADATA}/{name}", every) == 0)
        if not len(without):
            return every
        looked = without[np.unique(np.linspace(0, len(without) - 1, LOOKED_AT).astype(int))]
        middle = np.array([sum(self.episode_range(episode)) // 2 for episode in looked])
        blank = np.ptp(self.images(camera, middle).reshape(len(looked), -1), axis=1) <= BLANK
        said = f"{self.root}: {name} is 0 in {len(without)} of {self.num_episodes} episodes"
        if not blank.all():
            there = f"{(~blank).sum()} of {len(looked)} looked at"
            _log.warning("%s, but pictures are there in %s: it is not believed", said, there)
            return every
        _log.info("%s, whose pictures are blank: this camera is masked there", said)
        every[without] = False
        return every

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        return list(self._paths)

    def _picture(self, camera: str, shard: int, step: int) -> np.ndarray:
        index, path = self._index[shard], self._paths[shard]
        episode = int(np.searchsorted(index["ends"], step, side="right"))
        if "_steps" not in self.__dict__:
            self._steps = step_features(self._json)
        try:
            if self.format == "tfrecord":
                offset, length = index[f"span/{camera}"][step].tolist()
                encoded = os.pread(self._open(path).fileno(), length, offset)
            else:
                begin = int(index["ends"][episode - 1]) if episode else 0
                encoded = self._parsed_episode(path, int(index["records"][episode]))[camera][step - begin]
            return self._steps[camera].decode_example_np(encoded)
        except (ValueError, OSError) as error:
            raise BadEpisode(
                f"{path}: a picture of {camera!r} in record {int(index['records'][episode])} cannot be decoded: {error}"
            ) from error

    def _parsed_episode(self, path: Path, number: int) -> dict[str, np.ndarray]:
        kept = self.opened().setdefault("episodes", {})
        if (path, number) not in kept:
            if len(kept) >= EPISODES_KEPT:
                kept.pop(next(iter(kept)))
            flat = flatten(
                make_parser(json.dumps(self._json)).parse_example(self._open(path).read([number])[0])["steps"]
            )
            kept[path, number] = {camera: np.atleast_1d(flat[camera]) for camera in self.cameras}
        return kept[path, number]

    def _open(self, path: Path) -> Any:
        open_it = functools.partial(open, mode="rb", buffering=0) if self.format == "tfrecord" else open_array_record
        return self.open_file(path, open_it, SHARDS_OPEN)

    def _shard_of(self, rows: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._starts, rows, side="right") - 1

    def _choose(self, only: str | None) -> None:
        """Episodes by `only`: which rows of the index are frames of the dataset."""
        lengths = [np.diff(shard["ends"], prepend=0) for shard in self._index]
        self._starts = np.cumsum([0, *(int(length.sum()) for length in lengths)])[:-1]
        every = np.concatenate(lengths)
        described = [name for name in self._index[0] if name.startswith("metadata/")]
        metadata = {name.split("/", 1)[1]: np.concatenate([s[name] for s in self._index]) for name in described}
        files = metadata.get(f"{METADATA}/file_path", np.full(len(every), ""))
        names = [
            f"episode {number} of {path.name}"
            for path, shard in zip(self._paths, self._index, strict=True)
            for number in shard["records"].tolist()
        ]
        keep = np.array([only is None or re.search(only, str(file)) is not None for file in files], bool)
        keep &= every > 0
        if not keep.any():
            raise UserError(
                f"{self.root} has no episode{'' if only is None else f' whose file_path contains {only!r}'}; it has "
                f"{len(every)} in all."
            )
        self._metadata = {name: values[keep] for name, values in metadata.items()}
        recorded = [self._metadata.get(f"{METADATA}/{name}") for name in ("recording_folderpath", "file_path")]
        if not any(names is None for names in recorded):
            self.recordings = ["--".join(names) for names in zip(*recorded, strict=True)]
        self._rows = np.flatnonzero(np.repeat(keep, every))
        self.ends = np.cumsum(every[keep])
        self.episodes = [name for name, kept in zip(names, keep, strict=True) if kept]


def feature_names(root: Path) -> list[str]:
    """Names of the features of a step; errors as of `RldsDataset`."""
    return list(step_features(read_json(_version_folder(root) / "features.json", "an RLDS dataset's description")))


def _version_folder(root: Path) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}.")
    if (root / "features.json").is_file():
        return root
    versions = [path.parent for path in root.glob("*/features.json")]
    if not versions:
        raise FileNotFoundError(
            f"neither {root} nor a folder in it has a features.json; expected an RLDS dataset, <name>/<version>."
        )
    return max(versions, key=lambda path: [int(part) for part in re.findall(r"\d+", path.name)])


def _shards(root: Path, split: str) -> tuple[str, list[Path], list[int]]:
    """File format and shards of a split, and how many records each has."""
    info = read_json(root / "dataset_info.json", "an RLDS dataset's description")
    form = info.get("fileFormat", "tfrecord")
    if form not in FORMATS:
        raise UserError(f"{root} is of format {form!r}; {' and '.join(FORMATS)} can be read.")
    splits = {entry["name"]: entry for entry in info["splits"]}
    if split not in splits:
        raise UserError(f"{root} has no split {split!r}; it has {sorted(splits)}.")
    lengths = [int(length) for length in splits[split]["shardLengths"]]
    count = len(lengths)
    names = [f"{info['name']}-{split}.{form}-{number:05d}-of-{count:05d}" for number in range(count)]
    if missing := [name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{root} lacks {missing[:5]}, {len(missing)} of {count} shards. Copy the dataset again."
        )
    return form, [root / name for name in names], lengths
