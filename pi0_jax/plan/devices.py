"""Devices to compile for that need not be there."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import re
from typing import Any

import jax

from pi0_jax import compat
from pi0_jax.errors import UserError
from pi0_jax.flops import GPUS, TPUS, Device, sheet


def find_devices(topology: str | None) -> tuple[str, list[Any], Device | None]:
    """Name, devices to compile for, and data sheet of a topology.

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
    if name in TPUS:
        return topology, _tpus(topology), TPUS[name]
    return topology, _cpus(math.prod(int(n) for n in shape.split("x"))), GPUS[name]


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
                "needs no TPU. Plans for GPUs, such as h100:8, need nothing."
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
