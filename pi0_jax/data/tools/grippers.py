"""Range and polarity of grippers: what a dataset has, held against what its robot declares (`Robot.grippers`)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from jaxtyping import Float

from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.robots import Robot
from pi0_jax.data.source import ACTION, STATE

WORDS = ("gripper", "finger", "jaw", "claw")
"""What names of grippers have in them."""
USUAL = {(0.0, 1.0): "0 to 1", (0.0, 100.0): "0 to 100", (-1.0, 1.0): "-1 to 1"}
"""Ranges that grippers usually have."""
TOLERANCE = 0.1
"""Share of a range by which its ends may be missed: grippers do not close on an object, and overshoot."""
BEYOND = 0.25
"""Share of the declared range beyond which values have other units."""
AGAINST = -0.5
"""Correlation of commanded and measured opening below which one of them is inverted."""


def check_grippers(dataset: OpenDataset) -> tuple[list[str], list[str]]:
    """What contradicts the robot's declaration, and a line per gripper of what the dataset has."""
    robot, problems, notes = dataset.robot, [], []
    openings: dict[str, dict[str, np.ndarray]] = {"state": {}, "actions": {}}
    for key, feature, names in (("state", STATE, robot.state), ("actions", ACTION, robot.actions)):
        values, declared = dataset.source.columns(feature), getattr(robot.grippers, key)
        if values.shape[1:] != (len(names),):
            continue
        for i in _grippers(key, robot, dataset.semantics, declared):
            problem, note = _compare(values[:, i].astype(float), dataset, f"{key} {names[i]}", declared.get(names[i]))
            problems += problem
            notes.append(note)
            opened, closed = declared.get(names[i], (1.0, 0.0))
            openings[key][names[i]] = (values[:, i] - closed) / (opened - closed)
    for name in [name for name in openings["state"] if name in openings["actions"]]:
        together = _correlation(openings["state"][name], openings["actions"][name])
        if together < AGAINST:
            declared = name in robot.grippers.state and name in robot.grippers.actions
            by = f", by the `grippers` of {robot.name}," if declared else ""
            line = f"{name}: the state opens{by} where the actions close (correlation {together:.2f}): one is inverted"
            (problems if declared else notes).append(line)
    return problems, notes


def _grippers(key: str, robot: Robot, semantics: tuple[str, ...], declared: Mapping[str, object]) -> list[int]:
    """Dimensions that are the opening of a gripper."""
    names = getattr(robot, key)
    called = [name in declared or any(word in name.lower() for word in WORDS) for name in names]
    meant = [key == "actions" and semantics[i] == "gripper" for i in range(len(names))]
    return [i for i, name in enumerate(names) if (called[i] or meant[i]) and name not in robot.changes]


def _compare(
    values: np.ndarray, dataset: OpenDataset, what: str, declared: tuple[float, float] | None
) -> tuple[list[str], str]:
    """Problems of one gripper, and its line."""
    low, high = np.quantile(values, [0.01, 0.99]).tolist()
    if high == low:  # a gripper that acts in few frames
        low, high = float(values.min()), float(values.max())
    usual = _usual(low, high)
    note = f"{what} is from {low:.3g} to {high:.3g}{f' (a range of {usual})' if usual else ''}"
    first = values[dataset.source.ends - dataset.source.lengths]
    if declared is None:
        return [], f"{note}, at the beginning of most episodes {np.median(first):.3g}"
    opened, closed = declared
    least, most = sorted(declared)
    margin = BEYOND * (most - least)
    by = f"{dataset.robot.name}'s is {opened:g} open, {closed:g} closed"
    other = usual is not None and (least, most) in USUAL and usual != USUAL[least, most]
    if low < least - margin or high > most + margin or other:
        return [f"{note}, and {by}: convert the dataset, or declare another range in the robot's `grippers`"], note
    shut = float((np.abs(first - closed) < np.abs(first - opened)).mean())
    return [], f"{note}; {by}, so that {shut:.0%} of the episodes begin with it closed"


def _usual(low: float, high: float) -> str | None:
    """The usual range that values fill."""
    for (least, most), name in USUAL.items():
        margin = TOLERANCE * (most - least)
        inside = low > least - margin and high < most + margin
        if inside and low < least + 3 * margin and high > most - 3 * margin:
            return name
    return None


def _correlation(a: Float[np.ndarray, "n"], b: Float[np.ndarray, "n"]) -> float:
    return float(np.corrcoef(a, b)[0, 1]) if min(a.std(), b.std()) > 0 else 0.0
