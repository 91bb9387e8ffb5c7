"""Several processes that train as one: how they find one another, agree, and end together.

Every process runs the same program over all devices (JAX's multi-controller model), so all of them have to do the same
things in the same order: what one alone knows, such as a signal, has to reach all before any acts upon it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
import time
import traceback
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from pi0_jax.config import HostsConfig
from pi0_jax.errors import UserError

_log = logging.getLogger(__name__)


def connect(config: HostsConfig) -> None:
    """Joins the processes of a run, before any device is touched; does nothing where there is one alone.

    Where not all come in time, JAX's runtime ends the process, and a line says so.

    Raises:
        UserError: the address of the first process is known and how many there are, or which this is, is not; or the
            environment is not as `cluster` says.
    """
    if jax.distributed.is_initialized():
        return
    coordinator = config.coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    count = _number("JAX_NUM_PROCESSES") if config.count is None else config.count
    index = _number("JAX_PROCESS_ID") if config.index is None else config.index
    if config.cluster == "none" or count == 1:
        return
    if config.cluster == "auto":
        if coordinator is not None and (count is None or index is None or not 0 <= index < count):
            raise UserError(
                f"the first process is at {coordinator}, and this is process {index} of {count}: give both numbers, by "
                "--hosts.count and --hosts.index (from 0), or JAX_NUM_PROCESSES and JAX_PROCESS_ID."
            )
        if coordinator is None and (count is not None or index is not None):
            raise UserError(
                "several processes need the address of the first: --hosts.coordinator HOST:PORT, or "
                "JAX_COORDINATOR_ADDRESS."
            )
        if coordinator is None and not _several_in(os.environ):
            return
    method = config.cluster
    if method == "auto":
        method = None if coordinator is None else "deactivate"
    where = f"process {index} of {count} at {coordinator}" if coordinator else "found in the environment"
    text = (
        f"the processes of the run did not find one another in {config.start_timeout} s (--hosts.start-timeout); "
        f"this one: {where}. Look for one that did not start, and whether the first one's port can be reached."
    )
    with _witness(text):
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=method,
            initialization_timeout=config.start_timeout,
            heartbeat_timeout_seconds=config.heartbeat_timeout,
            shutdown_timeout_seconds=config.heartbeat_timeout,
        )
    if jax.process_index() and "PI0_LOG" not in os.environ:
        logging.getLogger("pi0_jax").setLevel(logging.WARNING)
    _log.info("process %d of %d", jax.process_index(), jax.process_count())


def _number(name: str) -> int | None:
    return int(os.environ[name]) if name in os.environ else None


def _several_in(environment) -> bool:
    """Whether a launcher says that there are several processes."""
    slurm = "SLURM_STEP_NODELIST" in environment and int(environment.get("SLURM_NTASKS", 1)) > 1
    mpi = int(environment.get("OMPI_COMM_WORLD_SIZE", 1)) > 1
    tpu = "," in environment.get("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in environment
    return slurm or mpi or tpu


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def wait_for_all(point: str) -> None:
    """Returns once all processes have come to `point`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(point)


@contextlib.contextmanager
def first_before_others(point: str) -> Iterator[None]:
    """A context that the first process runs alone, so that the others find what it left on the disk."""
    if not is_first():
        wait_for_all(point)
    yield
    if is_first():
        wait_for_all(point)


def require_same(what: str, content: bytes) -> None:
    """Raises UserError where the processes do not have the same `content`."""
    if jax.process_count() == 1:
        return
    sums = np.ravel(multihost_utils.process_allgather(np.uint32(zlib.crc32(content))))
    if others := np.flatnonzero(sums != sums[0]).tolist():
        raise UserError(f"{what} of processes {others} differ from those of process 0; they have to be the same.")


def all_true(value: bool) -> bool:
    """Logical AND over processes; collective: every process has to call it."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.uint32(value))))


class StopVote:
    """Lets all processes stop at the same step when any of them is asked to.

    The vote of a step is counted on the devices, after the step itself, and read at the next: no process waits for it.
    """

    def __init__(self, mesh: Mesh):
        self._ballots = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._count = jax.jit(jnp.max, out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int | None) -> int | None:
        """Casts this process's vote and returns the outcome of the vote before; collective, once per step.

        Args:
            number: of the signal that came; None for none.

        Returns:
            The largest number of any process, None if there is none; with one process `number` itself.
        """
        if jax.process_count() == 1:
            return number
        outcome = 0 if self._before is None else int(self._before)
        ballot = np.full(1, number or 0, np.int32)
        self._before = self._count(
            jax.make_array_from_callback((self._ballots.mesh.size,), self._ballots, lambda _: ballot)
        )
        return outcome or None


@contextlib.contextmanager
def ended_together(together: tuple[type[Exception], ...], advice: str) -> Iterator[None]:
    """A context in which a run of several processes ends in bounded time, and says so, when one of them fails.

    A process that fails alone prints why and exits at once, without Python's shutdown, in which JAX would wait for the
    others. Those, and processes whose partner was killed or hangs, are aborted by JAX's runtime within
    `HostsConfig.heartbeat_timeout`; an aborted process prints nothing, so `advice` comes from a child that outlives it.

    Args:
        together: exceptions that all processes raise at the same step; they pass.
        advice: what the user can do then.
    """
    if jax.process_count() == 1:
        yield
        return
    process = f"process {jax.process_index()} of {jax.process_count()}"
    with _witness(f"{process} was ended from outside, or lost another one, as its last lines say. {advice}"):
        try:
            yield
        except together:
            raise
        except BaseException as error:
            failed = error
        else:
            return
    if isinstance(failed, (ValueError, OSError)) and not os.environ.get("PI0_TRACEBACK"):
        print(f"\npi0 train: {process}: {failed}. {advice}", file=sys.stderr, flush=True)
    else:
        traceback.print_exception(failed)
        print(f"\npi0 train: {process} failed. {advice}", file=sys.stderr, flush=True)
    # The end of the first process aborts the others; those that failed in the same way should print it before.
    time.sleep(2.0 if is_first() else 0.0)
    os._exit(1)


@contextlib.contextmanager
def _witness(text: str) -> Iterator[None]:
    """A context with a child process that prints `text` if this process dies in it.

    The child waits for a line from this process, and gets the end of the pipe instead, however this process dies.
    """
    script = 'trap "" INT TERM; read -r line || printf "\\npi0 train: %s\\n" "$0" >&2'
    witness = subprocess.Popen(["sh", "-c", script, text], stdin=subprocess.PIPE)
    try:
        yield
    finally:
        witness.communicate(b"done\n")
