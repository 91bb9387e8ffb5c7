"""Frames that training samples, by a file of ranges such as DROID's `droid_sample_ranges`, which leaves out idle ones.

The file is JSON, as openpi reads it: name of a recording → list of ranges [first, end), in frames of the episode. The
name is `<recording_folderpath>--<file_path>` of the episode's metadata. Recordings without an entry are left out.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from jaxtyping import Int

from pi0_jax.data.files import read_json
from pi0_jax.data.source import Source
from pi0_jax.errors import UserError

_log = logging.getLogger(__name__)


def sampled_frames(source: Source, path: str) -> Int[np.ndarray, "n"]:
    """Frames of a dataset that a file of ranges keeps, in order.

    Raises:
        FileNotFoundError: there is no such file.
        UserError: it is no such JSON, the dataset does not name its recordings, or it keeps none of their frames.
    """
    file = Path(path).expanduser()
    ranges = read_json(file, "ranges of frames, such as droid_sample_ranges_v1_0_1.json", of_dataset=False)
    if not source.recordings:
        raise UserError(
            f"{source.root} does not name its recordings, so {file} cannot be used: that needs an RLDS dataset with "
            "`recording_folderpath` and `file_path` in its `episode_metadata`, as DROID's."
        )
    kept, known = np.zeros(source.num_frames, bool), 0
    try:
        for episode, recording in enumerate(source.recordings):
            first, end = source.episode_range(episode)
            known += recording in ranges
            for start, stop in ranges.get(recording, ()):
                kept[first + max(0, start) : max(first, min(end, first + stop))] = True
    except (AttributeError, TypeError, ValueError) as error:
        raise UserError(f"{file} is not of the form {{recording: [[first, end], ...]}}: {error}.") from error
    if not kept.any():
        raise UserError(
            f"{file} keeps no frame of {source.root}: of its {source.num_episodes} recordings {known} are in the file. "
            f"The first is {source.recordings[0]!r}, and the first of the file {next(iter(ranges), None)!r}."
        )
    shares = 100 * kept.mean(), known, source.num_episodes
    _log.info("%s: %s keeps %.0f %% of the frames, and knows %d of %d episodes", source.root, file, *shares)
    return np.flatnonzero(kept)
