"""Peak memory and time of loading a policy's parameters from a checkpoint, folded for inference.

    python benchmarks/loading.py /tmp/loading-benchmark     (7 GB of disk, 8 GB of memory; --layers 2 for a small try)

The checkpoint is a full-size π0 with random weights in bfloat16. Peak memory is the largest resident set of the loading
process, less that of one which only imports the package and starts JAX; on an accelerator, less what moves there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import time
from pathlib import Path

from convert import apart, random_weights, run

from pi0_jax.config import PI0
from pi0_jax.convert.formats import write_checkpoint

LOAD = """
import jax, sys, time
from pi0_jax.config import PI0, PolicyConfig
from pi0_jax.inference.sampler import from_checkpoint
from pi0_jax.model.fold import fold
from pi0_jax.model.head import make_head
import dataclasses
policy = PolicyConfig(robot="none", model=dataclasses.replace(PI0, depth={layers}))
jax.block_until_ready(jax.numpy.ones(8) + 1)
if {load}:
    start = time.perf_counter()
    weights = jax.block_until_ready(fold(make_head(policy.model), from_checkpoint({folder!r}, policy)))
    print(sum(x.nbytes for x in jax.tree.leaves(weights)), time.perf_counter() - start, file=open({out!r}, "w"))
"""


def write(folder: Path, layers: int) -> None:
    write_checkpoint(random_weights(dataclasses.replace(PI0, depth=layers)), folder, "pi0")


def main() -> None:
    """Writes the checkpoint, loads it in processes of their own, prints a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=PI0.depth, help="Gemma layers, fewer for a small try")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True)
    checkpoint, out = arguments.folder / "checkpoint", arguments.folder / "out"
    apart(write, checkpoint, arguments.layers)
    values = {"layers": arguments.layers, "folder": str(checkpoint), "out": str(out)}
    baseline, *_ = run(["-c", LOAD.format(**values, load=False)])
    start = time.monotonic()
    peak, *_ = run(["-c", LOAD.format(**values, load=True)])
    weights, seconds = map(float, out.read_text().split())
    result = {
        "weights_GB": round(weights / 1e9, 2),
        "peak_above_import_GB": round((peak - baseline) / 1e9, 2),
        "peak_of_weights": round((peak - baseline) / weights, 3),
        "seconds": round(seconds, 1),
        "seconds_with_start": round(time.monotonic() - start, 1),
    }
    print(json.dumps(result), flush=True)
    shutil.rmtree(arguments.folder)


if __name__ == "__main__":
    main()
