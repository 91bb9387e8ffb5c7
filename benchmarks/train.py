"""Updates of ours and of openpi's JAX code side by side: seconds, bytes of temporaries, seconds to compile.

    python benchmarks/train.py --openpi ~/openpi --openpi-python ~/openpi-env/bin/python --json train.json
    python benchmarks/train.py --size full --alone --json h100.json          # ours alone, on a card
    python benchmarks/train.py --json train.json --table

Both sides run in processes of their own and take turns, one at a time: ours, openpi's, ours, openpi's. Weights are
random and of equal sizes, the batch is the same, and each update is the whole of it: loss, gradient, clipping, AdamW,
moving average, norms; without augmentation, which the two do differently. openpi's update is `train_step` of its
scripts/train.py, from its own checkout, under its own versions of JAX; its environment needs

    pip install "jax==0.5.3" "flax==0.10.2" "orbax-checkpoint==0.11.13" "numpy<2" optax einops "jaxtyping==0.2.36"
        "beartype==0.19.0" augmax ml_collections tqdm pillow

openpi computes every layer again in the backward pass, and every camera; ours is measured under each policy of
`ModelConfig.remat`, and computes the cameras that the robot has.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from openpi_jax import import_for_training, resize, training_functions
from sides import Side, answer, markdown, our_model

SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "vision": {"width": 1152, "depth": 27, "mlp_dim": 4304, "num_heads": 16},
        "language": {"width": 2048, "mlp_dim": 16_384},
        "action": {"width": 1024, "mlp_dim": 4096},
        "stack": {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 256},
        "vocab": 257_152,
        "patch": 14,
        "prompt": {"pi0": 48, "pi05": 200},
    },
    # All layers, a sixteenth of the widths, and a third of the tokens: shares of the work are about those of full size.
    "reduced": {
        "vision": {"width": 64, "depth": 27, "mlp_dim": 256, "num_heads": 4},
        "language": {"width": 128, "mlp_dim": 1024},
        "action": {"width": 64, "mlp_dim": 256},
        "stack": {"depth": 18, "num_heads": 8, "num_kv_heads": 1, "head_dim": 16},
        "vocab": 1024,
        "patch": 28,
        "prompt": {"pi0": 16, "pi05": 64},
    },
    "tiny": {
        "vision": {"width": 32, "depth": 2, "mlp_dim": 64, "num_heads": 2},
        "language": {"width": 32, "mlp_dim": 64},
        "action": {"width": 32, "mlp_dim": 64},
        "stack": {"depth": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16},
        "vocab": 512,
        "patch": 56,
        "prompt": {"pi0": 16, "pi05": 64},
    },
}
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
ROBOTS = {3: "aloha", 2: "libero"}
"""A robot with so many of them."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured."""

    size: str = "reduced"
    variant: str = "pi0"
    dtype: str = "float32"
    batch: int = 1
    cameras: int = 3
    remat: str = "full"
    """Of ours."""
    draws: int = 1
    """Of noise and time an observation; ours alone."""
    recipe: str = "full"
    """What is trained; ours alone."""

    @property
    def name(self) -> str:
        extra = [f"K={self.draws}"] * (self.draws > 1) + [self.recipe] * (self.recipe != "full")
        return f"{self.variant}, {self.cameras} cameras, batch {self.batch}, {', '.join([self.remat, *extra])}"


def side_by_side(size: str, dtype: str, batch: int) -> list[Case]:
    """The cases to compare with openpi."""
    base = Case(size, dtype=dtype, batch=batch)
    return [
        dataclasses.replace(base, cameras=cameras, remat=remat)
        for remat, cameras in (("none", 3), ("none", 2), ("full", 3), ("full", 2), ("gate_up", 3))
    ]


def alone(size: str, dtype: str) -> list[Case]:
    """The cases for ours alone; those that do not fit say so."""
    cases = [
        Case(size, variant, dtype, batch, remat=remat)
        for variant in ("pi0", "pi05")
        for batch in (4, 8, 16, 32)
        for remat in ("full", "gate_up", "matmuls", "none")
    ]
    more = [Case(size, dtype=dtype, batch=8, remat="gate_up", draws=draws) for draws in (4, 8)]
    lora = [Case(size, variant, dtype, n, recipe="lora") for variant in ("pi0", "pi05") for n in (4, 8, 16, 32)]
    return [*cases, *more, *lora]


def main() -> None:
    """Reads the arguments, measures, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--openpi", type=Path, help="openpi's checkout")
    parser.add_argument("--openpi-python", default=sys.executable, help="Python of an environment for it")
    parser.add_argument("--alone", action="store_true", help="ours without openpi, in more settings")
    parser.add_argument("--size", choices=SIZES, default="reduced")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 at full size")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", help="the case of this name, or those with this in theirs")
    parser.add_argument("--json", type=Path, help="file of rows; rows that it has are not measured again")
    parser.add_argument("--table", action="store_true", help="print what the file has")
    parser.add_argument("--serve", choices=("ours", "openpi"), help="what this program calls itself with")
    options = parser.parse_args()
    if options.serve:
        answer(Server(options.serve, options.openpi))
        return
    rows = json.loads(options.json.read_text()) if options.json and options.json.exists() else []
    if not options.table:
        if options.openpi is None and not options.alone:
            parser.error("name openpi's checkout, --openpi PATH, or measure --alone")
        dtype = options.dtype or ("bfloat16" if options.size == "full" else "float32")
        cases = alone(options.size, dtype) if options.alone else side_by_side(options.size, dtype, options.batch)
        cases = [case for case in cases if not any(row["case"] == dataclasses.asdict(case) for row in rows)]
        named = [case for case in cases if case.name == options.only]
        cases = named or [case for case in cases if not options.only or options.only in case.name]
        with contextlib.ExitStack() as stack:
            for case in cases:
                print(case.name, flush=True)
                # With openpi, whose program is the same in all cases, the processes stay; alone, each has the memory.
                if options.alone or case is cases[0]:
                    stack.close()
                    sides = {name: stack.enter_context(side) for name, side in start(options).items()}
                rows.append(measure(case, options.rounds, sides))
                if options.json:
                    options.json.write_text(json.dumps(rows, indent=1))
    print(table(rows))


def start(options) -> dict[str, Side]:
    """The processes."""
    # openpi's checks of types at run time refuse newer optax; they cost nothing in a compiled update.
    # Two processes have to share a card.
    environment = {"JAXTYPING_DISABLE": "1", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    commands = {"ours": [sys.executable, __file__, "--serve", "ours"]}
    if not options.alone:
        commands["openpi"] = [options.openpi_python, __file__, "--serve", "openpi", "--openpi", str(options.openpi)]
    return {name: Side(command, **environment) for name, command in commands.items()}


def measure(case: Case, rounds: int, sides: dict[str, Side]) -> dict[str, Any]:
    """One row: the sides take turns."""
    row: dict[str, Any] = {"case": dataclasses.asdict(case), "name": case.name}
    for side in sides.values():  # both compile at once; what that costs is counted in CPU time
        side.send(case=dataclasses.asdict(case))
    row |= {name: side.receive() for name, side in sides.items()}
    if any("error" in row[name] for name in sides):
        return row
    for name, side in sides.items():
        row[name] |= {key: value for key, value in side(step=True).items() if key == "error"}
    if any("error" in row[name] for name in sides):
        return row
    steps = [{name: side(step=True) for name, side in sides.items()} for _ in range(rounds)]
    for name, side in sides.items():
        row[name] |= {key: [step[name][key] for step in steps] for key in ("seconds", "cpu_seconds")}
        row[name] |= side(memory=True)
    return row


class Server:
    """What the process of one side answers."""

    def __init__(self, side: str, openpi: Path | None):
        self._side, self._openpi, self._step = side, openpi, None

    def __call__(self, asked: dict[str, Any]) -> dict[str, Any]:
        try:
            if "case" in asked:
                self._step, case = None, Case(**asked["case"])
                self._step, found = ours(case) if self._side == "ours" else theirs(case, self._openpi)
                return found
            if "memory" in asked:
                return peak()
            assert self._step is not None
            then, before = time.perf_counter(), time.process_time()
            loss = self._step()
            seconds, cpu_seconds = time.perf_counter() - then, time.process_time() - before
            return {"loss": loss, "seconds": seconds, "cpu_seconds": cpu_seconds}
        except Exception as error:  # such as a card that is too small
            return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def peak() -> dict[str, float]:
    """Most bytes in use on the device, where it says."""
    import jax

    stats = jax.devices()[0].memory_stats() or {}
    return {"peak_bytes": stats["peak_bytes_in_use"]} if "peak_bytes_in_use" in stats else {}


def batch_arrays(case: Case) -> dict[str, Any]:
    """Random inputs, the same for both sides; a camera that is not there is black and masked."""
    random, b = np.random.default_rng(0), case.batch
    there = CAMERAS[: case.cameras]
    images = {name: random.uniform(-1, 1, (b, 224, 224, 3)).astype(np.float32) for name in CAMERAS}
    return {
        "images": {name: image if name in there else np.zeros_like(image) - 1 for name, image in images.items()},
        "image_masks": {name: np.full(b, name in there) for name in CAMERAS},
        "state": random.standard_normal((b, 32)).astype(np.float32),
        "prompt": random.integers(0, 512, (b, prompt_length(case))).astype(np.int32),
        "prompt_mask": np.ones((b, prompt_length(case)), bool),
        "actions": random.standard_normal((b, 50, 32)).astype(np.float32),
    }


def prompt_length(case: Case) -> int:
    return SIZES[case.size]["prompt"][case.variant]


def compiled(lowered, state_bytes) -> tuple[Any, dict[str, float]]:
    """A compiled update, and what compiling took and what it needs."""
    then, before = time.perf_counter(), time.process_time()
    program = lowered.compile()
    found = {"compile_seconds": time.perf_counter() - then, "compile_cpu_seconds": time.process_time() - before}
    memory = program.memory_analysis()
    return program, found | {"temporary_bytes": memory.temp_size_in_bytes, "state_bytes": state_bytes}


def ours(case: Case) -> tuple[Any, dict[str, float]]:
    """Our update, and what is known of it before it runs."""
    import jax
    from flax.linen import meta

    from pi0_jax import flops
    from pi0_jax.batch import Batch, Observation
    from pi0_jax.config import Gaussian, MeshConfig, PolicyConfig, TrainConfig, TuneConfig
    from pi0_jax.plan.compile import build_program
    from pi0_jax.training.metrics import seconds_at_peak

    model = our_model(SIZES[case.size], variant=case.variant, dtype=case.dtype, remat=case.remat)
    objective = Gaussian(draws=case.draws, mask_padded_steps=False)
    config = TrainConfig(
        policy=PolicyConfig(model=model, robot=ROBOTS[case.cameras], objective=objective),
        tune=TuneConfig(recipe=case.recipe),  # pyright: ignore[reportArgumentType]
        mesh=MeshConfig(data=1, fsdp=-1),
        batch_size=case.batch,
    )
    run, program, _ = build_program(config, jax.devices())
    arrays = batch_arrays(case)
    cameras = run.cameras.present
    images = {name: np.uint8((arrays["images"][name] + 1) * 127.5) for name in cameras}
    observation = Observation(
        images, {name: arrays["image_masks"][name] for name in cameras}, *(arrays[k] for k in Observation._fields[2:])
    )
    steps, dims = np.ones((case.batch, 50), bool), np.ones((case.batch, 32), bool)
    batch = program.place(Batch(observation, arrays["actions"], steps, dims))
    start = jax.jit(lambda key: program.start(meta.unbox(run.objective.network.init(key))))
    state = start(jax.random.key(0))
    update, found = compiled(program.update.lower(np.uint32(0), state, batch), nbytes(state))  # pyright: ignore
    found["flops"] = flops.training(run.policy.model, objective) * case.batch
    if (ideal := seconds_at_peak(run)) is not None:
        found["ideal_seconds"] = ideal
    kept = [state]

    def step() -> float:
        kept[0], metrics = update(np.uint32(0), kept[0], batch)
        return float(metrics["loss"])

    return step, found


def nbytes(tree) -> int:
    import jax

    return sum(x.nbytes for x in jax.tree.leaves(tree))


def theirs(case: Case, openpi: Path | None) -> tuple[Any, dict[str, float]]:
    """openpi's update; cameras are masked in its inputs, so that the program is the same with any number of them."""
    import jax

    program, kept, found = their_program(openpi, case.size, case.variant, case.dtype, case.batch)
    batch = jax.device_put(their_batch(case))

    def step() -> float:
        kept[0], info = program(jax.random.key(1), kept[0], batch)
        return float(info["loss"])

    return step, found


def their_batch(case: Case) -> tuple[Any, np.ndarray]:
    from openpi.models import model as models

    arrays = batch_arrays(case)
    observation = models.Observation(
        images=arrays["images"], image_masks=arrays["image_masks"], state=arrays["state"],
        tokenized_prompt=arrays["prompt"], tokenized_prompt_mask=arrays["prompt_mask"],
    )  # fmt: skip
    return observation, arrays["actions"]


@functools.cache
def their_program(openpi: Path, size: str, variant: str, dtype: str, batch: int) -> tuple[Any, list, dict[str, float]]:
    """openpi's compiled update, a list with its state, and what is known of it."""
    modules = import_for_training(openpi)
    import jax

    case = Case(size, variant, dtype, batch)
    resize(modules, SIZES[size])
    fields = {"dtype": dtype, "max_token_len": prompt_length(case), "pi05": variant == "pi05"}
    start, step = training_functions(modules, **fields)
    state = jax.jit(start)(jax.random.key(0))
    update = jax.jit(step, donate_argnums=1)
    program, found = compiled(update.lower(jax.random.key(1), state, their_batch(case)), nbytes(state))
    return program, [state], found


def table(rows: list[dict]) -> str:
    """The rows as Markdown; ratios are openpi's over ours."""
    titles = ["case", "step ms, ours / openpi", "ratio (quartiles)", "CPU time ratio (quartiles)"]
    titles += ["temporaries MB", "compile CPU s", "samples/s", "MFU", "peak GB"]
    lines = []
    for row in rows:
        sides = [row[name] for name in ("ours", "openpi") if name in row]
        if errors := [side["error"] for side in sides if "error" in side]:
            lines.append([row["name"], "; ".join(errors)])
            continue
        middle = [statistics.median(side["seconds"]) for side in sides]
        cells = [row["name"], " / ".join(f"{1e3 * seconds:.0f}" for seconds in middle)]
        cells += [ratio(sides, key) if len(sides) == 2 else "" for key in ("seconds", "cpu_seconds")]
        cells.append(" / ".join(f"{side['temporary_bytes'] / 1e6:.0f}" for side in sides))
        cells.append(" / ".join(f"{side['compile_cpu_seconds']:.0f}" for side in sides))
        ours = sides[0]
        cells.append(f"{row['case']['batch'] / middle[0]:.2f}")
        cells.append(f"{ours['ideal_seconds'] / middle[0]:.3f}" if "ideal_seconds" in ours else "")
        cells.append(f"{ours['peak_bytes'] / 1e9:.2f}" if "peak_bytes" in ours else "")
        lines.append(cells)
    return markdown(titles, lines)


def ratio(sides: list[dict], key: str) -> str:
    """Median of openpi's over ours, round by round, and its quartiles."""
    low, middle, high = statistics.quantiles((b / a for a, b in zip(*(s[key] for s in sides), strict=True)), n=4)
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main()
