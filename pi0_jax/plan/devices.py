"""Devices to compile for that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from typing import Any, NamedTuple

import jax

from pi0_jax import compat
from pi0_jax.errors import UserError
from pi0_jax.flops import GPUS, TPUS, Device, sheet

JAX_DEFAULT = 0.75
"""Of an NVIDIA GPU's memory: what JAX takes."""
JAX_SHARE = 0.95
"""What it can be told to take (XLA_PYTHON_CLIENT_MEM_FRACTION); CUDA and NCCL need the rest."""


class Chip(NamedTuple):
    """What XLA asks of an NVIDIA GPU, by its maker's architecture papers."""

    capability: tuple[int, int]
    cores: int
    """Streaming multiprocessors."""
    cache: int
    """MiB of L2."""
    clock: float
    """GHz."""
    shared: int = 228
    """KiB of shared memory per core, of which a block can have all but one."""
    threads: int = 2048
    """Per core."""
    lanes: int = 128
    """Float32 units per core."""


CHIPS = {
    "a100": Chip((8, 0), 108, 40, 1.41, shared=164, lanes=64),
    "h100": Chip((9, 0), 132, 50, 1.98),
    "h200": Chip((9, 0), 132, 50, 1.98),
    "l40s": Chip((8, 9), 142, 96, 2.52, shared=100, threads=1536),
    "rtx4090": Chip((8, 9), 128, 72, 2.52, shared=100, threads=1536),
    "rtx5090": Chip((12, 0), 170, 96, 2.41, shared=100, threads=1536),
    "b200": Chip((10, 0), 148, 126, 1.965),
    "thor": Chip((10, 0), 20, 32, 1.57),  # it is 11.0, which CUDA 12 does not compile for; 10.0 is the nearest
}


def find_devices(topology: str | None) -> tuple[str, list[Any], Device | None]:
    """Name, devices to compile for, and data sheet of a topology.

    Without XLA's compiler for NVIDIA GPUs, their devices are CPU devices in the same number (`estimates`).

    Args:
        topology: "v5e:4x8", "h100:8"; None: the devices of this machine.

    Raises:
        UserError: unknown topology, or libtpu is missing.
    """
    if topology is None:
        devices = jax.devices()
        kind = devices[0].device_kind
        return f"{kind}:{len(devices)}", devices, sheet(kind)
    name, _, shape = topology.lower().partition(":")
    if name not in TPUS | GPUS or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"unknown topology {topology!r}. It is a device and how many: {', '.join(TPUS)} with their shape (v5e:4x8, "
            f"v5p:2x2x4), {', '.join(GPUS)} with their number (h100:8)."
        )
    # Nothing is run: accelerators of this machine are not looked for, and a missing driver is not complained about.
    settings: Any = jax.config
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        settings.update("jax_platforms", settings.jax_platforms or "cpu")
    if name in TPUS:
        return topology, _tpus(topology), TPUS[name]
    count = math.prod(int(n) for n in shape.split("x"))
    return topology, _gpus(name, count) if has_gpu_compiler() else _cpus(count), GPUS[name]


def has_gpu_compiler() -> bool:
    """Whether XLA's compiler for NVIDIA GPUs is installed; it needs neither a GPU nor a driver."""
    return any(importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))


def usable_memory(device: Device) -> float:
    """Bytes of a device's memory that JAX can be told to take."""
    return device.memory * (JAX_SHARE if device in GPUS.values() else 1.0)


def estimates(devices: list[Any], device: Device | None) -> bool:
    """Whether CPU devices stand for GPUs, so that what is known of memory and time is an estimate."""
    return devices[0].platform == "cpu" and device is not None


def compiler_options(device: Any, *, triton: bool = True, recompute: bool = True) -> dict[str, Any]:
    """XLA's settings for a device; there are some for GPUs that are not there, on which no kernel can be timed.

    Args:
        device: to compile for.
        triton: allow Triton's matrix products. Untuned, some of the backward pass cannot be compiled.
        recompute: on GPUs, let XLA compute again what would not fit, besides what the model does so anyway.
    """
    if device.platform not in ("cuda", "gpu"):
        return {}
    options = {} if recompute else {"xla_disable_hlo_passes": "rematerialization"}
    if compat.is_compile_only(device):
        options |= {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": triton}
    return options


def _gpus(name: str, count: int) -> list[Any]:
    chip, device = CHIPS[name], GPUS[name]
    major, minor = chip.capability
    # XLA computes again, or sends later, what needs more than a limit: on a card JAX's, else 0.8 of what is said here.
    memory = int(device.memory * JAX_SHARE / 0.8)
    # Without a driver's version XLA leaves loops and calls of libraries out of CUDA graphs.
    target = f"""
      gpu_device_info {{
        cuda_compute_capability {{ major: {major} minor: {minor} }}
        core_count: {chip.cores} fpus_per_core: {chip.lanes} clock_rate_ghz: {chip.clock}
        threads_per_core_limit: {chip.threads} threads_per_block_limit: 1024 threads_per_warp: 32
        registers_per_core_limit: 65536 registers_per_block_limit: 65536
        shared_memory_per_core: {chip.shared << 10} shared_memory_per_block_optin: {chip.shared - 1 << 10}
        shared_memory_per_block: 49152 l2_cache_size: {chip.cache << 20}
        driver_version: "12.9.0" device_memory_size: {memory} memory_bandwidth: {int(device.bandwidth)}
        block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
      }}
      platform_name: "CUDA" device_description_str: "{name}"
      dnn_version_info {{ major: 9 minor: 10 }} runtime_version {{ major: 12 minor: 9 }}
    """
    per_host = device.node if device.node and count % device.node == 0 else count
    try:
        return compat.gpu_devices(f"1x{count // per_host}x{per_host}", target)
    except Exception as error:  # whatever the plugin raises
        raise UserError(
            f"XLA cannot compile for {name}:{count} here: {str(error).splitlines()[0]} Without the compiler, "
            "pip uninstall jax-cuda12-plugin, the plan is an estimate."
        ) from error


def _tpus(topology: str) -> list[Any]:
    # Without these libtpu looks for TPUs and asks Google's metadata server about them.
    offline = {"TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    for key, value in offline.items():
        os.environ.setdefault(key, value)
    chips = [int(n) for n in topology.partition(":")[2].split("x")]
    options: dict[str, Any] = {"chips_per_host_bounds": [*chips, 1, 1][:3]} if math.prod(chips) < 4 else {}
    if topology.startswith("v4:"):  # a device is a chip, as on the hardware, and not a core
        options["chip_config_name"] = "megacore"
    try:
        return compat.tpu_devices(topology, **options)
    except Exception as error:  # whatever libtpu raises
        if importlib.util.find_spec("libtpu") is None:
            raise UserError(
                f"a plan for {topology} is compiled by libtpu, which is not installed: pip install -e '.[tpu]'. It "
                "needs no TPU. Plans for GPUs, such as h100:8, are estimates without a compiler."
            ) from error
        raise UserError(
            f"no topology {topology}: {str(error).splitlines()[0]} Shapes that exist: 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, "
            "16x16 of v5e and v6e, and of v4 and v5p three numbers, 2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4 and so on."
        ) from error


def _cpus(count: int) -> list[Any]:
    with contextlib.suppress(RuntimeError):  # JAX has its devices already
        jax.config.update("jax_num_cpu_devices", count)
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise UserError(f"planning for {count} GPUs takes as many CPU devices; this process has {len(devices)}.")
    return devices[:count]
