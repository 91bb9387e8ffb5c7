"""Private and experimental interfaces of other packages, one per function or constant.

`tests/test_compat.py` has a test for each, so that an upgrade which breaks one fails there, by name. Packages are
imported inside the functions: nobody pays for those of others.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
"""Duration event of JAX's monitoring: one per program that is compiled or found in the compilation cache."""
CACHE_HIT_EVENT = "/jax/compilation_cache/cache_hits"
"""Event of JAX's monitoring: one per program that is found in the compilation cache."""

ORBAX_UNFINISHED = ".orbax-checkpoint-tmp"
"""What Orbax adds to the name of a step folder until the step is complete."""


def reset_compilation_cache() -> None:
    """Makes JAX look at its setting for the cache folder again; it latches "no folder" at the first compilation."""
    from jax.experimental.compilation_cache import compilation_cache

    compilation_cache.reset_cache()


def count_programs(jitted: Callable[..., Any]) -> int:
    """Number of programs that a `jax.jit` function has compiled."""
    return jitted._cache_size()  # pyright: ignore[reportFunctionMemberAccess]


def tpu_devices(topology: str, **options: Any) -> list[Any]:
    """Devices of a TPU topology that need not be there, as libtpu describes them."""
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(topology, "tpu", **options).devices)


def gpu_devices(shape: str, target: str) -> list[Any]:
    """Devices of NVIDIA GPUs that need not be there, for XLA's compiler, which comes with `jax[cuda12]`.

    Args:
        shape: numbers of partitions, hosts per partition and devices per host: "1x2x8".
        target: XLA's description of the GPU (`GpuTargetConfigProto`), as text.

    Raises:
        NotImplementedError, RuntimeError: JAX has no compiler for NVIDIA GPUs here.
    """
    from jax.experimental import topologies

    return list(topologies.get_topology_desc(platform="cuda", target_config=target, topology=shape).devices)


def is_compile_only(device: Any) -> bool:
    """Whether a device is one that programs can be compiled for, but not run on."""
    return device.client.runtime_type == "compile_only_runtime"


def bytes_of_refused_program(error: Exception) -> float | None:
    """Bytes of memory that a program takes which XLA refused to compile for a TPU; None for any other refusal."""
    used = re.search(r"Used ([\d.]+)([KMG]) of [\d.]+[KMG] hbm", str(error))
    return None if used is None else float(used[1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[used[2]]


def tensorstore_errno(error: Exception) -> int | None:
    """Number of the system error that made TensorStore fail, which it says in its message alone; None for others."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return None if code is None else int(code[1])
