"""What `pi0 plan` does."""

from __future__ import annotations

from pi0_jax.config import TrainConfig
from pi0_jax.plan.estimate import describe, find_fitting, make_plan


def plan(config: TrainConfig, topology: str | None) -> None:
    """Runs `pi0 plan`: prints the plan of a run, and where it does not fit, that of the nearest one that does.

    Raises:
        ValueError: see `plan.estimate.make_plan`.
    """
    first = make_plan(config, topology)
    print(describe(first), flush=True)
    if first.fits:
        return
    print("\nIt does not fit. Looking for the nearest settings that do ...", flush=True)
    found = find_fitting(config, first)
    if found is None:
        print("None of those that this command knows do: take more devices.")
    else:
        print(f"\nThis fits: {found[0]}\n\n{describe(found[1])}")
