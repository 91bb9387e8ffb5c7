"""FAST codecs fitted to the chunks that a configuration trains on."""

# pyright: reportTypedDictNotRequiredAccess=false
from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from pi0_jax.config import PolicyConfig
from pi0_jax.data.fast import FastCodec, hold, round_trip
from pi0_jax.data.loader import learnable_frames, valid_steps
from pi0_jax.data.mixture import OpenDataset, apportion
from pi0_jax.data.normalization import Mode, Normalization, affine
from pi0_jax.data.source import STATE
from pi0_jax.data.transform import to_normalized

EPISODES = 1024
"""Episodes of each dataset that chunks are taken from, at most: each may be a file."""
AT_ONCE = 1024
"""Chunks that are read at a time."""


def normalized_chunks(
    datasets: Sequence[OpenDataset],
    normalizations: Mapping[str, Normalization],
    policy: PolicyConfig,
    count: int,
    *,
    seed: int = 0,
    progress: bool = True,
) -> list[Float[np.ndarray, "_n _ah _d"]]:
    """Random chunks as training writes them in action tokens, one array per dataset, all of which have actions.

    Args:
        datasets: shares are their weights, or else their frames.
        normalizations: by name, those of training.
        policy: its horizon and kind of normalisation.
        count: of chunks, all datasets together; fewer where there are fewer.
        seed: of the choice.
        progress: show a bar.
    """
    rng = np.random.default_rng(seed)
    frames = [_some_frames(dataset, rng) for dataset in datasets]
    weights = [dataset.weight for dataset in datasets if dataset.weight is not None] or [len(own) for own in frames]
    found = []
    horizon = policy.model.action_horizon
    with tqdm(total=count, desc="action chunks", unit="chunk", disable=not progress or None) as bar:
        for dataset, own, quota in zip(datasets, frames, apportion(weights, count).tolist(), strict=True):
            rows = np.sort(rng.choice(own, min(max(quota, 1), len(own)), replace=False))
            forward = to_normalized(dataset.robot, normalizations[dataset.stats], policy.normalization).forward
            parts = []
            for start in range(0, len(rows), AT_ONCE):
                some = rows[start : start + AT_ONCE]
                actions, steps = dataset.source.chunk(some, horizon)
                steps &= valid_steps(dataset.source, some, horizon)
                sample = forward({"state": dataset.source.values(STATE, some), "actions": actions})
                parts.append(hold(sample["actions"], steps))
                bar.update(len(some))
            found.append(np.concatenate(parts))
    return found


def fit_codec(
    datasets: Sequence[OpenDataset],
    normalizations: Mapping[str, Normalization],
    policy: PolicyConfig,
    num_codes: int,
    scale: int | float = 10,
    count: int = 20_000,
) -> FastCodec:
    """A codec for the chunks that a policy is trained on; the arguments are those of `normalized_chunks` and
    `FastCodec.fit`. The same demonstrations give the same codec."""
    datasets = [dataset for dataset in datasets if dataset.source.has_actions]
    chunks = normalized_chunks(datasets, normalizations, policy, count)
    return FastCodec.fit(chunks, num_codes, scale, progress=sys.stderr.isatty())


def _some_frames(dataset: OpenDataset, rng: np.random.Generator) -> np.ndarray:
    episodes = dataset.training
    if len(episodes) > EPISODES:
        episodes = np.sort(rng.choice(episodes, EPISODES, replace=False))
    return learnable_frames(dataset.source, episodes, dataset.sampled)


def report_lines(
    codec: FastCodec,
    chunks: Float[np.ndarray, "n ah d"],
    dataset: OpenDataset,
    normalization: Normalization,
    mode: Mode,
    room: int,
) -> list[str]:
    """What a codec does to chunks of a dataset, for people: codes per chunk, for which there is `room`, error of each
    dimension, and what the codec lacks."""
    report = round_trip(codec, chunks)
    lengths, unused = report.lengths, codec.num_codes - int(report.used.sum())
    mean, usual = lengths.mean(), np.quantile(lengths, 0.95)
    lines = [
        f"{dataset.source.root}: {len(lengths)} chunks of {chunks.shape[1]} actions",
        f"  codes per chunk: mean {mean:.1f}, 95 % up to {usual:.0f}, most {lengths.max()}",
        f"  {'error of a round trip':28} {'rms':>10} {'largest':>10} {'rms, robot':>12}",
    ]
    units = np.abs(affine(normalization.stats["actions"], mode).scale)
    for row in zip(dataset.robot.model_actions, report.error, report.largest, report.error * units, strict=True):
        lines.append("  {:28} {:10.4f} {:10.4f} {:12.4g}".format(*row))
    lines.append(f"  codes that never occur here: {unused} of {codec.num_codes}")
    if long := int((lengths > room).sum()):
        lines.append(f"  {long} chunks ({long / len(lengths):.2%}) take more than {room}, and will be cut")
    if report.lossy:
        lines.append(
            f"  {report.lossy} chunks ({report.lossy / len(lengths):.2%}) do not come back whole: they exceed the "
            f"codec's range, {codec.min_token} to {codec.max_token}, or it has no code for one of their bytes"
        )
    return lines
