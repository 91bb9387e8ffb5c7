"""Time of a chunk of actions: openpi's `sample_actions` and ours, in turn, on the same weights, inputs and noise.

    python benchmarks/latency.py                                            ours alone, reduced sizes, CPU
    python benchmarks/latency.py --openpi CHECKOUT --openpi-python PYTHON   openpi beside it (see openpi_jax.py)
    python benchmarks/latency.py --full --rounds 50                         full size, bfloat16, on an accelerator

Each side is a process of its own that computes one chunk at a time, while the other waits; the order changes from round
to round. openpi computes every camera and pads prompts to their full length; ours leaves out what is not there and pads
to the next of a few lengths, so prompts here have a usual length (`--prompt-tokens`; 0: the full one). A time ends when
the actions are there. The table has medians, and openpi / ours: the ratio of the fastest calls, and the median of the
rounds' ratios with its quartiles. JSON goes to --json. `--plain` and `--bits` run our other programs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import platform
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from openpi_jax import serve
from sides import Side, our_model

from pi0_jax.batch import Observation
from pi0_jax.config import PI0, PI05, ModelConfig, PolicyConfig
from pi0_jax.convert.formats import Overrides, open_checkpoint, params_of
from pi0_jax.inference.sampler import ChunkSampler, Inputs
from pi0_jax.inference.shapes import prompt_lengths
from pi0_jax.model import fold
from pi0_jax.model.head import make_head
from pi0_jax.sampler import Euler

SIZE = {
    "vision": {"width": 192, "depth": 12, "mlp_dim": 768, "num_heads": 3},
    "language": {"width": 256, "mlp_dim": 2048},
    "action": {"width": 128, "mlp_dim": 512},
    "stack": {"depth": 4, "num_heads": 8, "num_kv_heads": 1, "head_dim": 32},
    "vocab": 1024,
    "patch": 14,
    "prompt": {"pi0": 48, "pi05": 200},
}
"""Reduced, but for the number of tokens: 256 an image."""
USUAL_PROMPT = {"pi0": 20, "pi05": 90}
"""Tokens. π0.5 reads the state as part of the prompt."""


@dataclass
class Args:
    """Latency of a chunk, beside openpi's."""

    variants: tuple[Literal["pi0", "pi05"], ...] = ("pi0", "pi05")
    """Models."""
    cameras: tuple[int, ...] = (3, 2)
    """How many of the three cameras are there."""
    full: bool = False
    """Full size in bfloat16, with random weights of each side's own."""
    rounds: int = 15
    """Calls of each side."""
    num_steps: int = 10
    """Euler steps."""
    prompt_tokens: int | None = None
    """Tokens of the prompt; 0: as many as the model takes."""
    plain: bool = False
    """Parameters of training, scanned over layers, in place of folded ones."""
    bits: Literal["int8", "fp8"] | None = None
    """Eight-bit weights."""
    openpi: str | None = None
    """A folder with openpi's sources."""
    openpi_python: str = sys.executable
    """A Python with openpi's versions of JAX and Flax."""
    json: Path | None = None
    """Where the figures go."""
    worker: bool = False
    """Used by this script itself."""


def model_of(variant: Literal["pi0", "pi05"], cameras: int, full: bool) -> ModelConfig:
    released = {"pi0": PI0, "pi05": PI05}[variant]
    model = released if full else our_model(SIZE, variant=variant, dtype="float32")
    return dataclasses.replace(model, cameras=model.cameras[:cameras])


def write_inputs(path: Path, model: ModelConfig, tokens: int) -> None:
    rng = np.random.default_rng(0)
    size = model.vision.image_size
    valid = np.arange(model.prompt_length) < tokens
    np.savez(
        path,
        state=rng.normal(size=(1, model.action_dim)).astype(np.float32),
        noise=rng.normal(size=(1, model.action_horizon, model.action_dim)).astype(np.float32),
        prompt=np.where(valid, rng.integers(1, 1000, model.prompt_length), 0)[None].astype(np.int32),
        prompt_mask=valid[None],
        **{name: rng.uniform(-1, 1, (1, size, size, 3)).astype(np.float32) for name in model.cameras},
    )


def measure(args: Args, variant: str, cameras: int, folder: Path) -> dict[str, Any]:
    """One row: both sides in turn."""
    model = model_of(variant, cameras, args.full)
    tokens = USUAL_PROMPT[variant] if args.prompt_tokens is None else args.prompt_tokens or model.prompt_length
    inputs = folder / "inputs.npz"
    write_inputs(inputs, model, tokens)
    weights = None if args.full or args.openpi is None else str(folder / "weights")
    build = {"variant": variant, "inputs": str(inputs), "num_steps": args.num_steps, "weights": weights}
    row: dict[str, Any] = {"variant": variant, "cameras": cameras, "prompt_tokens": tokens}
    with contextlib.ExitStack() as stack:
        sides = {}
        if args.openpi is not None:
            theirs = [args.openpi_python, str(Path(__file__).with_name("openpi_jax.py")), args.openpi]
            sides["openpi"] = stack.enter_context(Side(theirs))
            row["openpi"] = sides["openpi"](build=build | {"size": None if args.full else SIZE})
        sides["ours"] = stack.enter_context(Side([sys.executable, __file__, *sys.argv[1:], "--worker"]))
        row["ours"] = sides["ours"](build=build | {"cameras": cameras})
        seconds: dict[str, list[float]] = {name: [] for name in sides}
        for it in sides.values():
            it(run=2)
        for n in range(args.rounds):
            for name in list(sides)[:: 1 if n % 2 else -1]:
                seconds[name] += sides[name](run=1)["seconds"]
        for name, it in sides.items():
            it(save=str(folder / f"{name}.npy"))
    for name, found in seconds.items():
        row[name] |= {f"p{q}_ms": 1000 * float(np.percentile(found, q)) for q in (50, 95)}
        row[name]["fastest_ms"] = 1000 * min(found)
    if args.openpi is not None:
        ratios = np.array(seconds["openpi"]) / np.array(seconds["ours"])
        row["openpi / ours"] = {
            "fastest": min(seconds["openpi"]) / min(seconds["ours"]),
            "median": float(np.median(ratios)),
            "quartiles": [float(np.percentile(ratios, q)) for q in (25, 75)],
        }
        if weights is not None:
            both = [np.load(folder / f"{name}.npy") for name in ("openpi", "ours")]
            row["largest difference"] = float(np.abs(both[0] - both[1]).max())
    return row


def build_ours(args: Args, want: dict[str, Any]):
    """The program that `Policy` runs, as a function without arguments."""
    model = model_of(want["variant"], want["cameras"], args.full)
    inputs, network = dict(np.load(want["inputs"])), make_head(model)
    if want["weights"] is None:
        shapes = fold.shapes_of(network)
        key = jax.random.key(0)

        def read(wanted):
            return {p: 0.02 * jax.random.normal(key, shapes[p].shape, x.dtype) for p, x in wanted.items()}
    else:
        overrides = Overrides(horizon=model.action_horizon, vision_heads=model.vision.num_heads)
        read = fold.from_tree(params_of(open_checkpoint(want["weights"], overrides)))
    policy = PolicyConfig(robot="none", model=model)
    sampler = ChunkSampler(policy, model, read, folded=not args.plain)
    if args.bits is not None:
        sampler.quantize(args.bits)
    needed = int(inputs["prompt_mask"].sum())
    length = next(n for n in prompt_lengths(model.prompt_length) if n >= needed)
    observation = Observation(
        images={name: inputs[name] for name in model.cameras},
        image_masks={name: np.ones(1, bool) for name in model.cameras},
        state=inputs["state"],
        prompt=inputs["prompt"][:, :length],
        prompt_mask=inputs["prompt_mask"][:, :length],
    )
    arguments = Inputs(observation, jax.random.key(0)[None], inputs["noise"])
    arrays, sample = jax.tree.map(jnp.asarray, arguments), jax.jit(sampler.function(Euler(want["num_steps"])))
    return lambda: jax.block_until_ready(sample(sampler.params, arrays))


def line_of(row: dict[str, Any]) -> str:
    """A row of the printed table."""
    text = f"{row['variant']:5} {row['cameras']} cameras, {row['prompt_tokens']:3} tokens"
    text += f"   ours {row['ours']['p50_ms']:8.1f} ms"
    if "openpi" not in row:
        return text
    ratio = row["openpi / ours"]
    low, high = ratio["quartiles"]
    text += f"   openpi {row['openpi']['p50_ms']:8.1f} ms   openpi / ours {ratio['fastest']:.2f} (fastest), "
    text += f"{ratio['median']:.2f} [{low:.2f}, {high:.2f}]"
    return text + (f"   actions differ by {row['largest difference']:.1g}" if "largest difference" in row else "")


def main(args: Args) -> None:
    if args.worker:
        return serve(functools.partial(build_ours, args))
    load = os.getloadavg()[0]
    result: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count(), "load": load}
    result |= {"jax": jax.__version__, "rounds": args.rounds, "full": args.full, "rows": []}
    if load > 0.5:
        print(f"the machine is busy (load {load:.1f}); times will be off, their ratios less so", file=sys.stderr)
    for variant in args.variants:
        for cameras in args.cameras:
            with tempfile.TemporaryDirectory() as folder:
                row = measure(args, variant, cameras, Path(folder))
            result["rows"].append(row)
            print(line_of(row), flush=True)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
