"""The measurements of a policy, one after another."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from pi0_jax.config import ModelConfig
from pi0_jax.data.mixture import OpenDataset
from pi0_jax.data.robots import Robot
from pi0_jax.data.transform import Sample as TransformSample
from pi0_jax.data.transform import Transform, make_transform, resize_with_pad
from pi0_jax.diagnose import measure
from pi0_jax.diagnose.ablations import ablations, why_not
from pi0_jax.diagnose.figures import Figures
from pi0_jax.diagnose.frames import Chunks, read_chunks, training_batches
from pi0_jax.diagnose.inside import Sample, attention, features, sampled
from pi0_jax.inference.policy import Policy

NEIGHBOURS = 3
"""Nearest training frames that are shown."""
REFERENCE = 256
"""Training frames whose own nearest ones are looked for."""


class Subject(NamedTuple):
    """A policy as its measurements see it."""

    sample: Sample
    transform: Transform
    model: ModelConfig
    """With the cameras that are there alone."""
    robot: Robot
    semantics: tuple[str, ...]
    execute_steps: int
    sees_state: bool


class Neighbour(NamedTuple):
    """A training frame near to a moment."""

    pictures: dict[str, UInt8[np.ndarray, "s s 3"]]
    caption: str


class Moment(NamedTuple):
    """A chunk that is shown."""

    number: int
    """Of the chunk."""
    neighbours: list[Neighbour]
    attention: dict[str, Float[np.ndarray, "y x"]]
    """By camera, where the network attends; empty where it cannot be seen."""
    subtask: str | None = None
    """What the policy wrote before it acted; None: it writes none, or that cannot be seen."""


class Evidence(NamedTuple):
    """What the page shows beside the figures."""

    chunks: Chunks
    predicted: Float[np.ndarray, "n ah d"]
    """Robot units."""
    expert: Float[np.ndarray, "n ah d"]
    """Robot units."""
    errors: Float[np.ndarray, "n"]
    """Of each chunk, normalised."""
    moments: list[Moment]


def subject(policy: Policy, batch_size: int, seed: int) -> Subject:
    """A policy that is loaded."""
    model, config = policy.sampler.model, policy.config
    present = dataclasses.replace(config, model=model)
    return Subject(
        sample=sampled(policy, batch_size, seed),
        transform=as_it_acts(
            make_transform(present, policy.robot, policy.normalization, policy.tokenizer), bool(config.subtask_every)
        ),
        model=model,
        robot=policy.robot,
        semantics=policy.normalization.semantics,
        execute_steps=min(config.execute_steps, model.action_horizon),
        sees_state=model.variant != "pi05" or config.state_in_prompt,
    )


def as_it_acts(transform: Transform, asks: bool) -> Transform:
    """The transform without the texts of demonstrations, whose prompts ask for one where the policy writes it."""

    def forward(sample: TransformSample) -> TransformSample:
        seen = {name: value for name, value in sample.items() if name != "text"}
        return transform.forward(cast(TransformSample, {**seen, "asks": asks}))

    return transform._replace(forward=forward)


def diagnose(
    policy: Policy,
    held_out: Sequence[OpenDataset],
    training: Sequence[OpenDataset],
    *,
    frames: int,
    train_frames: int,
    moments: int,
    batch_size: int,
    seed: int,
) -> tuple[Figures, Evidence]:
    """Measures a policy on held-out episodes.

    Args:
        policy: to look at.
        held_out: datasets with held-out episodes of the policy's robot.
        training: datasets with training episodes of it; none: what needs them is left out.
        frames: largest number of chunks.
        train_frames: training frames to look for the nearest among.
        moments: chunks that are shown, the worst of different episodes.
        batch_size: chunks computed at once.
        seed: of the noise, and of what is swapped.

    Raises:
        FileNotFoundError, UserError: a dataset cannot be read, or is not the robot's.
    """
    who = subject(policy, batch_size, seed)
    dims = len(who.robot.model_actions)
    chunks = read_chunks(held_out, who.transform, who.model, dims, frames, who.execute_steps, batch_size)
    tasks = [task for each in (*held_out, *training) for task in each.source.tasks]
    figures, evidence = examine(who, chunks, tasks, float(held_out[0].source.fps), seed)
    worst = worst_moments(evidence.errors, chunks, moments)
    neighbours: list[list[Neighbour]] = [[] for _ in worst]
    if training:
        figures, neighbours = _beside_training(
            policy, who, training, figures, evidence, worst, train_frames, batch_size, seed
        )
    figures, maps, written = _attention(policy, figures, chunks, worst, batch_size, seed)
    shown = [Moment(*each) for each in zip(worst.tolist(), neighbours, maps, written, strict=True)]
    return figures, evidence._replace(moments=shown)


def examine(who: Subject, chunks: Chunks, tasks: Sequence[str], fps: float, seed: int = 0) -> tuple[Figures, Evidence]:
    """What can be said of a policy from held-out chunks alone.

    Args:
        who: the policy.
        chunks: of held-out episodes.
        tasks: instructions of the datasets.
        fps: control rate.
        seed: of the noise, and of what is swapped.
    """
    rng = np.random.default_rng(seed)
    robot, model, valid, episode = who.robot, who.model, chunks.valid, chunks.episode
    dims = len(robot.model_actions)
    noise = rng.standard_normal((len(episode), model.action_horizon, model.action_dim)).astype(np.float32)
    plain = who.sample(chunks.observation, noise, "chunks")[..., :dims]
    errors = plain - chunks.expert
    predicted, expert = (to_robot(who.transform, x, chunks.anchors) for x in (plain, chunks.expert))
    uses = []
    for each in ablations(chunks, who.transform, tasks, sees_state=who.sees_state, rng=rng):
        without = who.sample(each.observation, noise, f"{each.name}: {each.how}")[..., :dims]
        uses.append(measure.use(each.kind, each.name, each.how, plain, without, chunks.expert, valid, episode))
    grippers = gripper_dims(robot.actions, who.semantics)
    streams = measure.streams(predicted, expert, episode, chunks.lengths, chunks.every)
    window = max(model.action_horizon, round(2 * fps))
    turns = [i for pose in robot.poses.actions for i in range(pose.start + 3, pose.end)]  # signs and wraps are no jumps
    smooth = [i for i in range(len(robot.actions)) if i not in (*grippers, *turns)] or list(range(len(robot.actions)))
    raw = measure.per_dimension(predicted - expert, valid)
    figures = Figures(
        episodes=len(chunks.lengths),
        chunks=len(episode),
        every=chunks.every,
        execute_steps=who.execute_steps,
        fps=fps,
        error=measure.root_mean_square(errors, valid),
        average_error=measure.average_error(chunks.expert, valid),
        training_error=None,
        dimensions=measure.dimensions(
            robot.model_actions, plain, chunks.expert, dict(zip(robot.actions, raw, strict=True)), valid
        ),
        horizon=measure.horizon(errors, valid),
        phases=measure.phases(errors, valid, chunks.step, chunks.lengths[episode]),
        roughness=measure.roughness(predicted, expert, valid, episode, chunks.every, smooth),
        switches=[s for i in grippers for s in measure.switches(robot.actions[i], i, streams, window)],
        uses=uses,
        not_tried=why_not(chunks, tasks, sees_state=who.sees_state),
        nearness=None,
        attention=None,
    )
    return figures, Evidence(chunks, predicted, expert, measure.per_chunk(errors, valid), [])


def gripper_dims(names: Sequence[str], semantics: Sequence[str]) -> list[int]:
    """Dimensions that open and close a gripper, by their meaning or their name."""
    both = zip(names, semantics, strict=True)
    return [i for i, (name, kind) in enumerate(both) if kind == "gripper" or "gripper" in name.lower()]


def to_robot(
    transform: Transform, normalised: Float[np.ndarray, "n ah d"], anchors: dict[str, np.ndarray]
) -> Float[np.ndarray, "n ah d"]:
    """Actions in the robot's units."""
    sample = transform.inverse(cast(TransformSample, {"actions": normalised, **anchors}))
    return np.asarray(sample.get("actions"), np.float32)


def worst_moments(errors: Float[np.ndarray, "n"], chunks: Chunks, count: int) -> Int[np.ndarray, "k"]:
    """The worst chunks, one of an episode."""
    order = np.argsort(-errors, kind="stable")
    order = order[chunks.valid[order].any(1)]
    _, first = np.unique(chunks.episode[order], return_index=True)
    return order[np.sort(first)[:count]]


def _beside_training(
    policy: Policy,
    who: Subject,
    training: Sequence[OpenDataset],
    figures: Figures,
    evidence: Evidence,
    worst: np.ndarray,
    count: int,
    batch_size: int,
    seed: int,
) -> tuple[Figures, list[list[Neighbour]]]:
    """Figures with the error on training frames and the nearness to them, and the nearest of the worst moments."""
    rng, feature_of, dims = np.random.default_rng(seed), features(policy, batch_size), len(who.robot.model_actions)
    found, places, groups, squares, steps = [], [], [], 0.0, 0
    for batch, member, rows in training_batches(training, who.transform, who.model, count, batch_size, rng):
        found.append(feature_of(batch.observation))
        places += [(member, row) for row in rows.tolist()]
        groups.append(member * 10**9 + training[member].source.episode_of(rows))
        if len(places) - len(rows) < figures.chunks:
            noise = rng.standard_normal(batch.actions.shape).astype(np.float32)
            errors = (who.sample(batch.observation, noise, "chunks") - batch.actions)[..., :dims]
            squares += float(np.square(errors[batch.step_mask]).sum())
            steps += int(batch.step_mask.sum()) * dims
    pool, group = np.concatenate(found), np.concatenate(groups)
    figures = dataclasses.replace(figures, training_error=float(np.sqrt(squares / steps)) if steps else None)
    near = measure.nearest(feature_of(evidence.chunks.observation), pool, NEIGHBOURS)
    if len(np.unique(group)) > 1:
        usual = measure.nearest(pool[:REFERENCE], pool, 1, group)
        nearness = measure.nearness(near, usual, evidence.errors, len(pool))
        figures = dataclasses.replace(figures, nearness=nearness)
    return figures, [
        [_neighbour(training, places[k], who.model, d) for k, d in zip(near.number[i], near.distance[i], strict=True)]
        for i in worst
    ]


def _neighbour(
    training: Sequence[OpenDataset], place: tuple[int, int], model: ModelConfig, distance: float
) -> Neighbour:
    dataset, row = training[place[0]], place[1]
    source, size = dataset.source, model.vision.image_size
    episode = int(source.episode_of(np.array(row)))
    pictures = {
        camera: resize_with_pad(source.image(row, feature), size)
        for feature, camera in dataset.cameras.items()
        if camera in model.cameras
    }
    frame = row - source.episode_range(episode)[0]
    where = f"{source.root.name}, {source.episodes[episode]}, frame {frame}: “{source.task(row)}”"
    return Neighbour(pictures, f"{where}; distance {distance:.2f}")


def _attention(
    policy: Policy, figures: Figures, chunks: Chunks, worst: np.ndarray, batch_size: int, seed: int
) -> tuple[Figures, list[dict[str, np.ndarray]], list[str | None]]:
    """Figures with the shares of attention over a batch of chunks, and where it goes at the worst moments, and the
    subtasks written there."""
    spread = np.unique(np.linspace(0, len(chunks.episode) - 1, batch_size).astype(int))
    rows, model = np.concatenate([spread, worst]), policy.sampler.model
    noise = np.random.default_rng(seed).standard_normal((len(rows), model.action_horizon, model.action_dim))
    observation = jax.tree.map(lambda x: x[rows], chunks.observation)
    seen = attention(policy, observation, noise.astype(np.float32), batch_size)
    if seen is None:
        return figures, [{} for _ in worst], [None for _ in worst]
    count = len(spread)
    shares = {f"camera {name}": float(x[:count].sum((1, 2)).mean()) for name, x in seen.cameras.items()}
    shares |= {"prompt": float(seen.prompt[:count].mean()), "state and actions": float(seen.own[:count].mean())}
    shares |= {} if seen.subtask is None else {"subtask": float(seen.subtask[:count].mean())}
    maps = [{name: x[count + i] for name, x in seen.cameras.items()} for i in range(len(worst))]
    written: list[str | None] = [None for _ in worst] if seen.written is None else [*seen.written[count:]]
    return dataclasses.replace(figures, attention=shares), maps, written
