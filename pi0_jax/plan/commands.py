"""The command `pi0 plan`."""

from __future__ import annotations

from pi0_jax.config import TrainConfig
from pi0_jax.plan.cost import make_plan
from pi0_jax.plan.fit import find_fitting
from pi0_jax.plan.report import describe


def plan(config: TrainConfig, topology: str | None) -> None:
    """Runs `pi0 plan`: prints the plan of a run, and where it does not fit, that of the nearest one that does.

    Raises:
        UserError: see `plan.cost.make_plan`.
    """
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
