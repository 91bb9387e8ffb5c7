"""Room on disk and in memory that saving a tree of arrays takes."""

from __future__ import annotations

import contextlib
import errno
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp


def tree_bytes(tree: Any) -> int:
    """Bytes of all arrays (or `ShapeDtypeStruct`s) of a tree, over all devices, each counted once."""
    return sum(x.size * jnp.dtype(x.dtype).itemsize for x in jax.tree.leaves(tree))


def require_disk(folder: Path, nbytes: int) -> None:
    """Raises OSError where the disk of a folder has less than `nbytes` free."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"the disk of {folder} has {free / 1e9:.2f} GB free and the run's checkpoints need {nbytes / 1e9:.2f} GB. "
            "Free some, choose another --run-dir, or lower --keep-checkpoints",
        )


def require_memory(tree: Any) -> None:
    """Raises OSError where this host has no room for the copy that a save in the background makes of its arrays."""
    needed, available = staged_bytes(tree), available_memory()
    if available is not None and available < needed:
        raise OSError(
            errno.ENOMEM,
            f"this host has {available / 1e9:.2f} GB of memory available, and a save in the background needs a copy of "
            f"{needed / 1e9:.2f} GB. Free some, or divide the state over more hosts (--mesh.fsdp)",
        )


def staged_bytes(tree: Any) -> int:
    """Bytes of the shards of a tree that the devices of this process have, each distinct shard once."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding, size = getattr(x, "sharding", None), jnp.dtype(x.dtype).itemsize
        if sharding is None:
            total += x.size * size
        else:
            shards = {str(index) for index in sharding.addressable_devices_indices_map(x.shape).values()}
            total += len(shards) * math.prod(sharding.shard_shape(x.shape)) * size
    return total


def available_memory() -> int | None:
    """Bytes of memory that this host, or the container, can still give; None where the system does not say."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError):  # no limit, or no cgroup of version 2
        cached = int(re.findall(r"^inactive_file (\d+)", (group / "memory.stat").read_text(), re.MULTILINE)[0])
        used = int((group / "memory.current").read_text()) - cached
        found = min(found, int((group / "memory.max").read_text()) - used)
    return found
