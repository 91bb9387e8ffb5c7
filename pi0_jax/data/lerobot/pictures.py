"""Pictures that a LeRobot dataset keeps in its parquet files, encoded, in row groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import UInt8

from pi0_jax.data.video import decode_picture
from pi0_jax.errors import UserError

ROW_GROUPS_KEPT = 8
"""Row groups of encoded pictures kept in memory by each thread."""


class StoredPictures:
    """Reads pictures of one dataset. Not for several threads: each has its own."""

    def __init__(self, root: Path):
        self._root = root
        self._files: dict[str, tuple[pq.ParquetFile, np.ndarray]] = {}
        self._groups: dict[tuple[str, str, int], pa.Array] = {}

    def read(self, file: str, camera: str, row: int) -> UInt8[np.ndarray, "h w 3"]:
        """One picture, RGB.

        Raises:
            OSError, UserError: it cannot be read or decoded.
        """
        if file not in self._files:
            opened = pq.ParquetFile(self._root / file, memory_map=True)
            sizes = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
            self._files[file] = opened, np.cumsum(sizes)
        opened, ends = self._files[file]
        group = int(np.searchsorted(ends, row, side="right"))
        if (file, camera, group) not in self._groups:
            for old in list(self._groups)[: len(self._groups) - ROW_GROUPS_KEPT + 1]:
                del self._groups[old]
            try:
                column = opened.read_row_group(group, columns=[camera])[camera]
            except (pa.ArrowInvalid, OSError) as error:
                raise UserError(f"row group {group} cannot be read: {error}") from error
            self._groups[file, camera, group] = column.combine_chunks()
        value: Any = self._groups[file, camera, group][row - (int(ends[group - 1]) if group else 0)].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value.get("bytes") is not None else (self._root / value["path"]).read_bytes()
        return decode_picture(value)
