"""Sentences to act on, from figures. All thresholds are in `THRESHOLDS`, and nowhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Literal

from pi0_jax.diagnose.figures import Figures, Interval, Switches, Use

Kind = Literal["act", "good", "unclear"]
Verdict = Literal["used", "unused", "no better", "unclear"]


@dataclasses.dataclass(frozen=True)
class Thresholds:
    """Where a figure becomes a sentence."""

    unused: float = 0.05
    """Something is not used if the error grows by less than this share without it, to the interval's upper end."""
    change: float = 0.2
    """Nor may the chunks change by more than this share of the error."""
    episodes: int = 5
    """Episodes below which no interval is believed."""
    skill: float = 0.1
    """A policy, or a dimension, with less is no better than the average action."""
    memorised: float = 1.5
    """Error on held-out frames over that on training frames."""
    horizon: float = 2.0
    """Error of later steps of a chunk over that of its first."""
    phase: float = 1.5
    """Error in a third of the episodes over the mean of the others."""
    roughness: float = 1.5
    """Jitter or seams over those of the demonstrations."""
    late: float = 2.0
    """Frames."""
    chatter: float = 1.5
    """Switches of a gripper over those of the demonstrations, from where on their times mean nothing."""
    missed: float = 0.2
    """Share of a gripper's switches that the policy does not have."""
    unlike: float = 1.5
    """Distance of held-out pictures to training frames over that of training frames to one another."""
    correlation: float = 0.4
    """Rank correlation of that distance with the error."""


THRESHOLDS = Thresholds()


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence."""

    kind: Kind
    """act: something to mend. good: as it should be. unclear: more data would tell."""
    sentence: str
    figure: str
    """What it was concluded from."""
    advice: str = ""


def findings(f: Figures, limits: Thresholds = THRESHOLDS) -> list[Finding]:
    """What the figures mean, what to mend first."""
    parts = (_learned, _uses, _grippers, _course, _smoothness, _data)
    found = [finding for part in parts for finding in part(f, limits)]
    return sorted(found, key=lambda finding: ("act", "unclear", "good").index(finding.kind))


def _learned(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    figure = f"error {f.error:.3f}, that of the average action {f.average_error:.3f}"
    if f.skill < limits.skill:
        advice = "Train longer, and look for mistakes in the data: pi0 data check, pi0 data show."
        yield Finding("act", "Predicts no better than the average action.", figure, advice)
    else:
        yield Finding("good", f"Explains {f.skill:.0%} of the variance of held-out actions.", figure)
        bad = [d for d in f.dimensions if d.skill is not None and d.skill < limits.skill]
        if bad:
            text = ", ".join(f"{d.name} {d.skill:.0%}" for d in bad)
            advice = "Look at their curves: noise, or wrong statistics, or another order of dimensions?"
            yield Finding(
                "act", f"Does not predict {_list([d.name for d in bad])}.", f"variance explained: {text}", advice
            )
    if f.training_error and (ratio := f.error / f.training_error) > limits.memorised:
        figure = f"error {f.error:.3f} on held-out frames, {f.training_error:.3f} on training frames"
        advice = "More demonstrations, augmentation, fewer steps, or --tune.recipe lora."
        yield Finding("act", f"Memorises the training episodes: {ratio:.1f} times the error elsewhere.", figure, advice)


def _uses(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    texts = {
        "instruction": (
            "Ignores the instruction.",
            "Listens to the instruction.",
            "Does each scene of the data go with one task alone? Then no policy has to listen: record several tasks in "
            "the same scenes. Otherwise train longer, or try guidance.",
        ),
        "state": (
            "Ignores the robot's state.",
            "Uses the robot's state.",
            "That may be as it should; where the state matters, check its column and its statistics.",
        ),
    }
    verdicts = {}
    for name, uses in _by_name(f.uses).items():
        kind = uses[0].kind
        verdicts[name] = (kind, verdict := _verdict(uses, f.episodes, limits))
        ignores, does, advice = texts.get(
            kind,
            (
                f"Hardly looks at the camera {name}.",
                f"Looks at the camera {name}.",
                "Does it show what the task takes? Check its pictures (pi0 data show) and its name in the robot file; "
                "one that is not needed costs time.",
            ),
        )
        figure = "; ".join(f"{use.how}: error {_change(use.increase)}" for use in uses)
        if verdict == "unused":
            yield Finding("act", ignores, figure, advice)
        elif verdict == "used":
            yield Finding("good", does, figure)
            continue
        subject = {"camera": f"the camera {name}", "state": "the robot's state"}.get(kind, "the instruction")
        if verdict == "no better":
            figure += f"; chunks change by {max(use.change for use in uses):.2f} of the error"
            advice = "It has not learned what to make of it: train longer."
            yield Finding("act", f"Reacts to {subject}, and is no better for it.", figure, advice)
        elif verdict == "unclear":
            advice = f"{f.episodes} episodes do not tell; look at more: --frames {4 * f.chunks}, or --data FOLDER."
            yield Finding("unclear", f"May or may not use {subject}.", figure, advice)
    cameras = [verdict for kind, verdict in verdicts.values() if kind == "camera"]
    if cameras and set(cameras) == {"unused"} and verdicts.get("state", ("", ""))[1] == "used":
        advice = "It continues the motion without looking. Drop the state for some of the training, or add recoveries."
        yield Finding("act", "Acts on the state alone.", "no camera is missed, and the state is", advice)
    for kind, reason in f.not_tried.items():
        yield Finding("unclear", f"Whether it uses the {kind} was not tried.", reason)


def _by_name(uses: Sequence[Use]) -> dict[str, list[Use]]:
    found: dict[str, list[Use]] = {}
    for use in uses:
        found.setdefault(use.name, []).append(use)
    return found


def _verdict(uses: Sequence[Use], episodes: int, limits: Thresholds) -> Verdict:
    """What the ablations of one thing say.

    used: without it, in one way at least, the error grows for certain. unused: for certain neither error nor chunks
    change by much. no better: the chunks change, and the error does not.
    """
    if episodes < limits.episodes:
        return "unclear"
    if any(use.increase.low > 0 and use.increase.value > limits.unused for use in uses):
        return "used"
    if any(use.increase.high >= limits.unused for use in uses):
        return "unclear"
    return "no better" if any(use.change > limits.change for use in uses) else "unused"


def _grippers(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    for each in f.switches:
        name = each.name if "gripper" in each.name.lower() else f"gripper {each.name}"
        name = name[:1].upper() + name[1:]
        if each.own > limits.chatter * each.count:
            figure = f"it {each.motion} {each.own} times, and {each.count} times in the demonstrations"
            advice = "Train longer; or execute more of each chunk, and average or threshold its commands."
            yield Finding("act", f"{name} chatters.", figure, advice)
            continue
        if (each.count - each.found) / each.count > limits.missed:
            figure = f"of {each.count} times in the demonstrations it {each.motion} {each.found} times near then"
            advice = "Look at the curves: too few demonstrations of it, or a range that normalisation squeezes?"
            yield Finding("act", f"{name} often does not {each.motion[:-1]} when it should.", figure, advice)
        yield from _timing(name, each, f, limits)


def _timing(name: str, each: Switches, f: Figures, limits: Thresholds) -> Iterator[Finding]:
    delay = each.delay
    if delay is None:
        return
    figure = f"median of {each.found} of {each.count} times {delay.value:+.3g} frames, {_interval(delay, '+.3g')}"
    certain = delay.low > 0 or delay.high < 0
    if abs(delay.value) >= limits.late and certain and f.episodes >= limits.episodes:
        word = "late" if delay.value > 0 else "early"
        frames = f"{abs(delay.value):.3g} frames"
        seconds = f"{abs(delay.value) / f.fps:.2g} s"
        advice = f"Execute less of each chunk (now {f.execute_steps}), and check that actions and pictures are in step."
        yield Finding("act", f"{name} {each.motion} {frames} {word} ({seconds}).", figure, advice)
    elif abs(delay.value) < limits.late:
        yield Finding("good", f"{name} {each.motion} in time.", figure)


def _course(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    if f.horizon and f.horizon[0] > 0:
        far = [k for k, error in enumerate(f.horizon) if error > limits.horizon * f.horizon[0]]
        if far and f.execute_steps > far[0]:
            figure = f"error of step 1 is {f.horizon[0]:.3f}, of step {far[0] + 1} {f.horizon[far[0]]:.3f}"
            sentence = f"Executes steps that are much worse than the first: {f.execute_steps}, and {far[0]} are good."
            yield Finding("act", sentence, figure, f"Execute {far[0]} (--execute-steps {far[0]}).")
    words = ("at the start", "in the middle", "at the end")
    known = [(word, error) for word, error in zip(words, f.phases, strict=True) if error is not None]
    for word, error in known:
        others = [e for w, e in known if w != word]
        if others and (mean := sum(others) / len(others)) > 0 and error > limits.phase * mean:
            figure = f"error {error:.3f}, {mean:.3f} in the other thirds of the episodes"
            yield Finding("act", f"Is worst {word} of the episodes.", figure, f"More demonstrations that vary {word}.")


def _smoothness(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    jitter, seams = f.roughness.jitter, f.roughness.seams
    if jitter is not None and jitter > limits.roughness:
        figure = f"second differences are {jitter:.1f} times those of the demonstrations"
        yield Finding("act", "Chunks shake.", figure, "Train longer, or take more solver steps (--num-steps).")
    if seams is not None and seams > limits.roughness:
        figure = f"the step from one chunk to the next is {seams:.1f} times that of the demonstrations"
        advice = "Act with real-time chunking, or execute more of each chunk (docs/serving.md)."
        yield Finding("act", "Jumps where a new chunk begins.", figure, advice)
    if jitter is not None and seams is not None and max(jitter, seams) <= limits.roughness:
        figure = f"jitter {jitter:.2f} and seams {seams:.2f} times those of the demonstrations"
        yield Finding("good", "Moves as smoothly as the demonstrations.", figure)


def _data(f: Figures, limits: Thresholds) -> Iterator[Finding]:
    near = f.nearness
    if near is None:
        return
    if near.ratio > limits.unlike:
        figure = f"held-out frames are {near.ratio:.1f} times as far from training frames as these from one another"
        yield Finding(
            "act", "The held-out scenes are unlike those of training.", figure, "Train on more varied scenes."
        )
    if near.correlation > limits.correlation and f.episodes >= limits.episodes:
        figure = f"rank correlation of the error with the distance to the nearest training frame {near.correlation:.2f}"
        advice = "Record demonstrations of scenes such as the worst moments above."
        yield Finding("act", "Errs where pictures are unlike any training frame.", figure, advice)


def _change(increase: Interval) -> str:
    return f"{increase.value:+.0%}, {_interval(increase, '+.0%')}"


def _interval(interval: Interval, form: str) -> str:
    return f"95 % interval {format(interval.low, form)} to {format(interval.high, form)}"


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
