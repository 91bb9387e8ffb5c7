"""The command `pi0 plan`."""

from __future__ import annotations

import math

from pi0_jax.config import TrainConfig
from pi0_jax.plan.cost import Plan, make_plan
from pi0_jax.plan.fit import find_fitting
from pi0_jax.training.resolve import wide_enough


def plan(config: TrainConfig, topology: str | None) -> None:
    """Runs `pi0 plan`: prints the plan of a run, and where it does not fit, that of the nearest one that does.

    Raises:
        UserError: see `plan.cost.make_plan`.
    """
    config = wide_enough(config)
    first = make_plan(config, topology)
    print(describe(first), flush=True)
    if first.fits:
        return
    print("\nIt does not fit. Looking for the nearest settings that do ...", flush=True)
    found = find_fitting(config, first)
    if found is None:
        print("None of the settings that this command knows fits: take more devices.")
    else:
        print(f"\nThis fits: {found[0]}\n\n{describe(found[1])}")


def describe(plan: Plan) -> str:
    """A plan as lines for people."""
    axes = " x ".join(f"{name} {size}" for name, size in plan.mesh.items())
    source = "estimated" if plan.estimated else f"of the compiler, in {plan.seconds_to_compile:.0f} s"
    rows = [(name, _size(size), "") for name, size in plan.resident_bytes.items()]
    rows.append(("temporaries", _size(plan.temporaries), source))
    room = "" if plan.device is None else f"of {_size(plan.device.memory)}: {'fits' if plan.fits else 'DOES NOT FIT'}"
    rows.append(("peak", _size(plan.peak), room))
    rows.append(("work", f"{plan.flops / 1e12:.4g} TFLOP", "matrix products, rematerialisation included"))
    rows.append(("through memory", _size(plan.hbm_bytes), "estimated"))
    rows += [(kind, _size(sent), "sent") for kind, sent in plan.comm_bytes.items() if sent]
    lines = [f"{plan.topology}: {math.prod(plan.mesh.values())} devices, mesh {axes}, batch {plan.batch_size}", ""]
    lines += [f"  {name:18} {value:>14}  {note}".rstrip() for name, value, note in rows]
    if plan.times:
        times = ", ".join(f"{name} {_duration(seconds)}" for name, seconds in plan.times.items())
        lines += ["", f"a step takes at least {_duration(max(plan.times.values()))} ({times}),"]
        lines[-1] += f" which is at most {plan.samples_per_second:.0f} samples/s"
    return "\n".join(lines)


def _size(size: int | float) -> str:
    return f"{size / 1e9:.3f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"
