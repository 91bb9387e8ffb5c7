"""Episodes of a LeRobot dataset that cannot be read: found when it is opened, without decoding."""

from __future__ import annotations

import concurrent.futures

import numpy as np

from pi0_jax.data.lerobot.layout import BOOKKEEPING, Episode, RowIndex, Uneven, read_column
from pi0_jax.data.video import FrameReader


def find_bad(rows: RowIndex, features: dict[str, dict], fps: int | float) -> dict[int, str]:
    """Episodes that cannot be read, by number, and why: those of files with rows or values that are missing, and those
    with frames that their videos do not hold."""
    bad: dict[int, str] = {}
    usable: dict[str, np.ndarray] = {}
    pictures = [name for name, feature in features.items() if feature["dtype"] in ("video", "image")]
    numeric = [name for name in features if name not in pictures and name not in BOOKKEEPING]
    for file, episodes in rows.episodes.items():
        try:
            rows.locate(file)
            usable[file] = read_column(rows.root / file, "timestamp", (1,))[:, 0]
            for name in numeric:
                bad |= _find_uneven(rows, file, name, features[name]["shape"])
        except (ValueError, OSError) as error:
            bad |= {episode.number: str(error) for episode in episodes}
            usable.pop(file, None)
    by_video: dict[str, list[tuple[Episode, np.ndarray]]] = {}
    for file, timestamps in usable.items():
        _, starts = rows.locate(file)
        for episode in rows.episodes[file]:
            within = timestamps[starts[episode.number] : starts[episode.number] + episode.length]
            for name, start in episode.videos.values():
                by_video.setdefault(name, []).append((episode, start + within.astype(np.float64)))

    def look(name: str) -> dict[int, str]:
        path, reader, found = rows.root / name, FrameReader(), {}
        for episode, times in by_video[name]:
            try:
                reader.locate(path, times, fps)
            except (ValueError, OSError) as error:
                found[episode.number] = str(error)
        return found

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(look, by_video):
            bad |= found
    return bad


def _find_uneven(rows: RowIndex, file: str, name: str, shape: tuple[int, ...]) -> dict[int, str]:
    """Episodes of a file with rows of another length than the column's."""
    bad: dict[int, str] = {}
    index, _ = rows.locate(file)
    while True:
        try:
            read_column(rows.root / file, name, shape, ~np.isin(index, list(bad)))
            return bad
        except Uneven as error:
            bad[error.episode] = str(error)
