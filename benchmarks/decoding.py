"""Time of π0-FAST's action tokens: openpi's `sample_actions` and ours, in turn, on the same weights and inputs.

    python benchmarks/decoding.py --openpi CHECKOUT --openpi-python PYTHON     (see openpi_jax.py)

At a reduced size, on the CPU, one observation of three cameras. `same` decodes as many greedy tokens as openpi, at
openpi's positions, and they have to be equal. `chunk` is a chunk as a policy computes it: the marker is read with the
prompt, only codes are written, and they become actions; it has as many codes as openpi's tokens leave room for beside
marker, `|` and EOS. A codec of one coefficient per code makes that number certain whatever the weights are.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from latency import SIZE
from openpi_jax import serve
from sides import Side, our_model

from pi0_jax.batch import CodecTables, Observation
from pi0_jax.config import Autoregressive, Fast, PolicyConfig
from pi0_jax.convert.formats import Overrides, open_checkpoint, params_of
from pi0_jax.inference.sampler import ChunkSampler, Inputs
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model import fold
from pi0_jax.model.writer import Rules, greedy
from pi0_jax.sampler import Greedy

CAMERAS = ("base_0_rgb", "base_1_rgb", "wrist_0_rgb")
SIZE_FAST = SIZE | {"vocab": 8192, "prompt": {"pi0_fast": 250}}
"""An eighth of the width, and a vocabulary whose share of the weights is about that of the full size."""
DIMS, MARKER, CODES = 3, 3, 1024


@dataclass
class Args:
    """Tokens per second and time per chunk of π0-FAST, beside openpi's."""

    openpi: str
    """A folder with openpi's sources."""
    openpi_python: str = sys.executable
    """A Python with openpi's versions of JAX and Flax."""
    tokens: int = 50
    """Tokens that openpi decodes: marker, codes, `|` and EOS."""
    prompt_tokens: int = 60
    """Of the prompt, which has room for 250."""
    rounds: int = 10
    """Calls of each side."""
    worker: str | None = None
    """Used by this script itself."""


def model_of(args: Args):
    horizon = (args.tokens - MARKER - 2) // DIMS
    fields = {"cameras": CAMERAS, "action_horizon": horizon, "action_dim": DIMS, "dtype": "float32"}
    return our_model(SIZE_FAST, variant="pi0_fast", **fields)


def write_inputs(path: Path, model, tokens: int) -> None:
    rng, valid = np.random.default_rng(0), np.arange(model.prompt_length) < tokens
    size = model.vision.image_size
    prompt = np.where(valid, rng.integers(1, 1000, model.prompt_length), 0)[None].astype(np.int32)
    images = {name: rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32) for name in CAMERAS}
    np.savez(path, prompt=prompt, prompt_mask=valid[None], **images)


def build_ours(args: Args, want: dict[str, Any]):
    """`same` or `chunk`, as a function without arguments."""
    model, inputs = model_of(args), dict(np.load(want["inputs"]))
    opened = open_checkpoint(want["weights"], Overrides(horizon=model.action_horizon, vision_heads=3))
    objective = Autoregressive(codec=Fast(max_tokens=args.tokens))
    policy = PolicyConfig(robot="none", model=model, objective=objective, sampler=Greedy(), normalization="quantile")
    content = jnp.arange(CODES, dtype=jnp.int32) % 128  # one coefficient per code
    tables = CodecTables(
        content.astype(jnp.uint8)[:, None],
        *(jnp.asarray(x) for x in (np.ones(CODES, np.int32), -64, 63, np.float32(10), DIMS)),
        *(jnp.asarray(x) for x in ([5, 6, 7], 8, 1)),
    )
    sampler = ChunkSampler(policy, model, fold.from_tree(params_of(opened)), codec=tables)
    length = next(n for n in prompt_lengths(model.prompt_length) if n >= args.prompt_tokens)
    observation = Observation(
        images={name: inputs[name] for name in CAMERAS},
        image_masks={name: np.ones(1, bool) for name in CAMERAS},
        state=np.zeros((1, DIMS), np.float32),
        prompt=inputs["prompt"][:, :length],
        prompt_mask=inputs["prompt_mask"][:, :length],
    )
    if want["kind"] == "chunk":
        arguments = Inputs(observation, jax.random.key(0)[None], np.zeros((1, model.action_horizon, DIMS), np.float32))
        return lambda: sampler(arguments, Greedy())
    network = sampler.objective.network

    @jax.jit
    def decode(params, observation):
        prefix, hidden = network.read(params, observation)
        every = jnp.arange(len(params["embedding"]))
        rules = Rules(
            params["embedding"],
            every,
            jnp.zeros(1),
            lambda state: jnp.ones((1, len(every)), bool),
            lambda state, token: (state, token == 1),
        )
        return network.decode(params, prefix, hidden, rules, args.tokens, greedy, like_openpi=True).tokens

    arrays = jax.tree.map(jnp.asarray, observation)
    return lambda: jax.block_until_ready(decode(sampler.params, arrays))


def main(args: Args) -> None:
    if args.worker is not None:
        return serve(functools.partial(build_ours, args))
    theirs = [args.openpi_python, str(Path(__file__).with_name("openpi_jax.py")), args.openpi, "fast"]
    mine = [sys.executable, __file__, *sys.argv[1:], "--worker", "ours"]
    with tempfile.TemporaryDirectory() as folder, Side(theirs) as openpi, Side(mine) as same, Side(mine) as chunk:
        inputs, weights = str(Path(folder, "inputs.npz")), str(Path(folder, "weights"))
        write_inputs(Path(inputs), model_of(args), args.prompt_tokens)
        openpi(build={"inputs": inputs, "weights": weights, "size": SIZE_FAST, "tokens": args.tokens})
        sides = {"openpi": openpi, "same": same, "chunk": chunk}
        for kind in ("same", "chunk"):
            sides[kind](build={"inputs": inputs, "weights": weights, "kind": kind})
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name in list(sides)[:: 1 if number % 2 else -1]:
                seconds[name] += sides[name](run=1)["seconds"] if number else []  # the first is compiled already
        found = {}
        for name in ("openpi", "same"):
            sides[name](save=str(Path(folder, f"{name}.npy")))
            found[name] = np.load(Path(folder, f"{name}.npy")).astype(int)
    number = int((found["openpi"] != 0).sum())
    print(f"{number} tokens, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    for name, times in seconds.items():
        ratios = np.array(seconds["openpi"]) / np.array(times)
        line = f"{name:7} {1000 * np.median(times):8.1f} ms, fastest {1000 * min(times):8.1f}"
        line += f"   openpi / it {np.median(ratios):.2f}, of the fastest {min(seconds['openpi']) / min(times):.2f}"
        print(line if name == "chunk" else f"{line}   {number / np.median(times):7.1f} tokens/s")
    print("tokens are equal" if np.array_equal(*found.values()) else f"TOKENS DIFFER: {found}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
