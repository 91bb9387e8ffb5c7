"""Devices and processes."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 takes all that remain. configs/sharding/ has the usual ways."""

    data: int = -1
    """Replicas of the parameters; each sees its part of the batch."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are divided over; they divide the batch too."""
    tensor: int = 1
    """Devices that heads, feed-forward widths and vocabulary are divided over; they work on the same examples, and
    exchange activations in each layer, so they have to be the nearest neighbours."""
    slices: int = 1
    """Groups of devices with a slow network between them: slices of a TPU, nodes of GPUs without a fast fabric. Each
    holds whole replicas of data x fsdp x tensor devices, and gradients alone cross the slow network."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which processes train together.

    Without any setting they are found in the environment: in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or as SLURM, Open MPI and GKE describe them; otherwise this process trains alone.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, which any free port there will do for."""
    count: int | None = None
    """Processes."""
    index: int | None = None
    """Number of this process, from 0."""
    cluster: Literal["auto", "none", "slurm", "ompi", "mpi4py", "gcetpu", "gketpu"] = "auto"
    """How the three above are found: auto looks at the environment; none does not; the others are the methods of
    jax.distributed.initialize, of which gcetpu and mpi4py have to be asked for."""
    start_timeout: int = 300
    """Seconds to wait for the others at the start."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as lost, and the others end with a message."""
