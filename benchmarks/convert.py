"""Time and peak memory of converting a full-size π0 from openpi's layout to LeRobot's and back.

    python benchmarks/convert.py /tmp/convert-benchmark     (some 25 GB of disk; --layers 2 for a small try)

The source is random bfloat16 weights, 6.5 GB, in an Orbax folder whose arrays are each one chunk, as openpi's training
on one host writes them. Peak memory is the largest resident set of the converting process, less that of one that only
imports the package; CPU seconds are of all its threads.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from pi0_jax.config import PI0, PolicyConfig
from pi0_jax.convert.assemble import foreign_tensors
from pi0_jax.convert.formats import OpenCheckpoint, openpi
from pi0_jax.convert.lazy import LazyArray, computed, entry_by_entry
from pi0_jax.convert.orbax_format import write_orbax
from pi0_jax.convert.parameters import parameters


def main() -> None:
    """Writes the source, runs the conversions, prints one JSON object each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=PI0.depth, help="Gemma layers, fewer for a small try")
    parser.add_argument("--chunk", choices=("array", "layer"), default="array", help="how the source is cut")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    model = dataclasses.replace(PI0, depth=arguments.layers)
    apart(write_source, arguments.folder / "openpi", model, arguments.chunk == "array")
    largest = max(tensor.nbytes for tensor in random_weights(model).tensors.values())
    baseline, *_ = run(["-c", "import pi0_jax.convert.commands, tensorstore"])
    for source, target, to in (
        ("openpi", "lerobot", "lerobot"),
        ("lerobot", "ours", "pi0"),
        ("ours", "back", "openpi"),
    ):
        cli = ["-c", "import sys; from pi0_jax.cli import main; sys.exit(main())"]
        command = [*cli, "convert", str(arguments.folder / source), str(arguments.folder / target)]
        peak, seconds, cpu = run([*command, "--to", to, "--horizon", "50"])
        record = json.loads((arguments.folder / target / "conversion.json").read_text())
        result = {
            "conversion": f"{source} -> {to}",
            "seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
            "peak_above_import_GB": round((peak - baseline) / 1e9, 2),
            "of_largest_tensor": round((peak - baseline) / largest, 2),
            "largest_tensor_GB": round(largest / 1e9, 2),
            "parameters": record["parameters"],
            "weights_sha256": record["weights_sha256"][:16],
        }
        print(json.dumps(result), flush=True)
    shutil.rmtree(arguments.folder)


def apart(function: Callable, *args) -> None:
    """Calls a function in a process of its own: a child's high-water mark starts at that of its parent."""
    process = multiprocessing.get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise SystemExit(f"{function.__name__} failed")


def run(command: list[str]) -> tuple[int, float, float]:
    """Peak resident bytes of a Python process, its seconds, and its CPU's."""
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, *command], env={**os.environ, "JAX_PLATFORMS": "cpu"})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{command} failed")
    peak = usage.ru_maxrss * (1024 if sys.platform != "darwin" else 1)
    return peak, time.monotonic() - started, usage.ru_utime + usage.ru_stime


def random_weights(model) -> OpenCheckpoint:
    """Random signs, mantissas and exponents between 2^-7 and 2^-3, made when they are read."""

    def tensor(number: int, shape: tuple[int, ...]) -> LazyArray:
        dtype = np.dtype(ml_dtypes.bfloat16)

        def read(entry: int, out: tuple[int, ...]) -> np.ndarray:
            rng = np.random.default_rng((number, entry))
            bits = np.frombuffer(bytearray(rng.bytes(2 * math.prod(out))), np.uint16)
            bits &= 0x81FF
            bits += 0x3C00
            return bits.view(dtype).reshape(out)

        if len(shape) > 2:
            return entry_by_entry(shape, dtype, lambda i: read(i + 1, shape[1:]))
        return computed(shape, dtype, lambda: read(0, shape))

    found = {path: tensor(i, parameter.shape) for i, (path, parameter) in enumerate(parameters(model).items())}
    return OpenCheckpoint("pi0", Path("random"), PolicyConfig(robot="none", model=model), found)


def write_source(folder: Path, model, whole: bool) -> None:
    """An openpi folder; with `whole`, each array is one chunk."""
    opened = random_weights(model)
    write_orbax(folder / "params", foreign_tensors(opened, "openpi", openpi.rules(model.variant)), whole)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
