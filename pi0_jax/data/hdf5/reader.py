"""Reads demonstrations in HDF5; `layout.py` describes the files. All but their description stays in them until asked
for."""

from __future__ import annotations

import collections
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8
from tqdm import tqdm

from pi0_jax.data.files import advice
from pi0_jax.data.foreign import HDF5, explain
from pi0_jax.data.hdf5.layout import Episode, Hdf5Options, describe, encoded, find_groups, natural
from pi0_jax.data.source import STATE, BadEpisode, Rows, Source
from pi0_jax.data.video import decode_picture
from pi0_jax.errors import UserError, require_package

FILES_OPEN = 4
FRAMES_AT_ONCE = 32
SHOWN = 20

_log = logging.getLogger(__name__)


class Hdf5Dataset(Source):
    """Reads HDF5 files.

    Args:
        root: a file, or a folder in which all HDF5 files belong to the dataset.
        options: what the files do not say.
        skip_bad_episodes: leave out episodes that cannot be read, or have other features than most.

    Raises:
        FileNotFoundError: there are no HDF5 files.
        UserError: an episode cannot be read, and the message lists them by file; the rate, the instruction or the state
            has to be given; h5py is not installed.
    """

    def __init__(self, root: Path, options: Hdf5Options, *, skip_bad_episodes: bool = False):
        self.root, self._options = root, options
        self._table, self.skipped = _find_episodes(root, options)
        if self.skipped and not (skip_bad_episodes and self._table):
            lines = self.skipped_lines(SHOWN)
            more = [f"and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
            hint = "\n--skip-bad-episodes leaves them out." if self._table else ""
            raise UserError("\n  ".join([f"{root} cannot be converted:", *lines[:SHOWN], *more]) + hint)
        self._layout = self._table[0].layout
        self.features = self._layout.features
        self.episodes = [episode.named(root) for episode in self._table]
        self.ends = np.cumsum([episode.length for episode in self._table])
        self.fps = options.fps or _rate(root, self._table)
        self.robot_type: str = options.robot_type or self._table[0].robot_type
        """Name of the robot, "unknown" where no file says it."""
        prompts = [episode.prompt or options.prompt or "" for episode in self._table]
        if wordless := [name for name, text in zip(self.episodes, prompts, strict=True) if not text.strip()]:
            raise UserError(
                f"{len(wordless)} of {len(prompts)} episodes of {root} have no instruction, such as {wordless[0]}. Say "
                'what the robot does in them: --prompt "fold the towel". Convert folders of several tasks one by one.'
            )
        self.tasks = list(dict.fromkeys(prompts))
        self._tasks = np.repeat([self.tasks.index(text) for text in prompts], self.lengths)
        _report(root, self._table[0], options)

    @property
    def task_index(self) -> Int[np.ndarray, "n"]:
        return self._tasks

    def read(self, name: str, episodes: Int[np.ndarray, "k"]) -> np.ndarray:
        self.check_column(name)
        rows = []
        for number in episodes.tolist():
            parts = [self._stored(number, path, slice(None)) for path in self._layout.paths[name]]
            rows.append(np.concatenate([part.reshape(len(part), -1) for part in parts], 1))
        return np.concatenate(rows).astype(self.features[name]["dtype"])

    def images(self, camera: str, rows: Rows) -> UInt8[np.ndarray, "*b h w 3"]:
        self.check_camera(camera)
        (path,) = self._layout.paths[camera]
        flat = np.asarray(rows).ravel()
        out = np.empty((flat.size, *self.features[camera]["shape"]), np.uint8)
        episodes = self.episode_of(flat)
        for number in np.unique(episodes).tolist():
            places = np.flatnonzero(episodes == number)
            for start in range(0, len(places), FRAMES_AT_ONCE):
                at = places[start : start + FRAMES_AT_ONCE]
                self._fill(out, at, number, path, flat[at] - self.episode_range(number)[0])
        out = out[:, ::-1, ::-1] if self._options.rotate_180 else out
        out = out[..., ::-1] if self._options.bgr else out
        return out.reshape(*np.shape(rows), *out.shape[1:])

    def picture_files(self, camera: str) -> list[Path]:
        self.check_camera(camera)
        return list(dict.fromkeys(episode.file for episode in self._table))

    def _fill(self, out: np.ndarray, at: np.ndarray, number: int, path: str, frames: np.ndarray) -> None:
        """Writes frames of one episode to `out[at]`."""
        first = int(frames.min())
        stored = self._stored(number, path, slice(first, int(frames.max()) + 1))
        if stored.ndim == 4:
            out[at] = stored[frames - first]
            return
        for i, frame in zip(at.tolist(), frames.tolist(), strict=True):
            try:
                image = decode_picture(encoded(stored[frame - first]))
                if image.shape != out.shape[1:]:
                    raise UserError(f"its shape is {image.shape}; that of the first is {out.shape[1:]}")
            except (OSError, UserError) as error:
                raise BadEpisode(
                    f"{self.episodes[number]} of {self.root}: picture {frame} of {path} cannot be decoded ({error})."
                ) from error
            out[i] = image

    def _stored(self, number: int, path: str, rows: slice) -> np.ndarray:
        episode = self._table[number]
        try:
            file = self.open_file(episode.file, _h5py(self.root).File, FILES_OPEN)
            return file[episode.group][path][rows]
        except (OSError, KeyError) as error:
            raise BadEpisode(f"{self.episodes[number]} of {self.root}: {path} cannot be read ({error}).") from error


def _h5py(root: Path) -> Any:
    return require_package("h5py", "hdf5", f"reading the HDF5 files of {root}")


def find_files(root: Path) -> list[Path]:
    """The HDF5 files of a path, in the order of the numbers in their names.

    Raises:
        FileNotFoundError: there are none.
    """
    if not root.exists():
        raise FileNotFoundError(f"there is no {root}; expected a Python file that sets `config`, or HDF5 files.")
    files = [path for path in ([root] if root.is_file() else root.rglob("*")) if path.suffix in HDF5]
    if not files and any((root / name).is_file() for name in ("meta/info.json", "features.json")):
        raise UserError(
            f"{root} is a dataset already. To bring it to LeRobot 3.0, write a config with this `data.path` and its "
            "`policy.robot` (docs/your_robot.md): pi0 data convert CONFIG TARGET"
        )
    if not files:
        raise FileNotFoundError(f"there are no HDF5 files to convert. {explain(root)}")
    return sorted(files, key=lambda path: natural(str(path)))


def _find_episodes(root: Path, options: Hdf5Options) -> tuple[list[Episode], dict[str, str]]:
    """Episodes that have the same features, and the files and episodes that are left out, with reasons."""
    found, bad, files = [], {}, find_files(root)
    h5py = _h5py(root)
    for path in tqdm(files, desc=f"looking into {root.name}", unit="file", delay=2):
        name = str(path.relative_to(root)) if root.is_dir() else path.name
        group = ""
        try:
            with h5py.File(path) as file:
                for group in find_groups(file):
                    try:
                        found.append(describe(path, file, file[group], options))
                    except UserError as error:
                        bad[name if group == "/" else f"{name} {group}"] = str(error)
        except UserError as error:
            bad[name] = str(error)
        except (OSError, KeyError, RuntimeError) as error:
            bad[name] = f"cannot be read as HDF5 ({error}). {advice(path)}"
    if not found:
        return [], bad
    kinds = [repr(episode.layout.features) for episode in found]
    usual = kinds.index(collections.Counter(kinds).most_common(1)[0][0])
    for episode, kind in zip(found, kinds, strict=True):
        if kind != kinds[usual]:
            bad[episode.named(root)] = _difference(episode, found[usual], root)
    return [episode for episode, kind in zip(found, kinds, strict=True) if kind == kinds[usual]], bad


def _difference(episode: Episode, usual: Episode, root: Path) -> str:
    ours, theirs = ({k: list(f["shape"]) for k, f in e.layout.features.items()} for e in (episode, usual))
    changed = [f"{name} {ours.get(name, 'is missing')}" for name in theirs | ours if ours.get(name) != theirs.get(name)]
    return f"has other features than {usual.named(root)}: {', '.join(changed) or 'other types'}"


def _rate(root: Path, episodes: list[Episode]) -> int | float:
    rates = {episode.fps for episode in episodes}
    if len(rates) > 1:
        raise UserError(f"files of {root} have {sorted(map(str, rates))} frames per second. Convert them one by one.")
    (rate,) = rates
    if rate is None:
        raise UserError(f"the files of {root} do not say how many frames per second they have: --fps 30, for instance.")
    return rate


def _report(root: Path, episode: Episode, options: Hdf5Options) -> None:
    """Logs what was understood."""
    layout = episode.layout
    cameras = [name for name, feature in layout.features.items() if feature["dtype"] == "image"]
    state = " + ".join(path.partition("/")[2] for path in layout.paths[STATE])
    _log.info("%s: the state is %s; cameras are %s", root, state, ", ".join(cameras))
    if layout.left_out:
        _log.info("%s: left out, as neither pictures nor vectors: %s", root, ", ".join(layout.left_out))
    if not cameras:
        _log.warning("%s has no pictures; robomimic's dataset_states_to_obs.py adds them to its files.", root)
    if episode.is_libero and not options.rotate_180:
        _log.warning(
            "%s: LIBERO's pictures are upside down. --rotate-180 turns them, as openpi's and LeRobot's LIBERO datasets "
            "have them, and policies expect that were trained on those.",
            root,
        )
