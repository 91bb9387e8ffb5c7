"""A policy as a robot uses it: raw observations in, raw actions out. A checkpoint is all it needs."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from pi0_jax import checkpoint
from pi0_jax.batch import Observation
from pi0_jax.config import Guidance, ModelConfig, PolicyConfig, RealTimeConfig
from pi0_jax.config.model import Dtype, Kernel
from pi0_jax.config.replace import replace
from pi0_jax.data.fast import FastCodec
from pi0_jax.data.normalization import Normalization, Stats, semantics_from_json, stats_from_json
from pi0_jax.data.observation import check_observation
from pi0_jax.data.robot_json import kept_robot
from pi0_jax.data.robots import RawObservation, Robot, get_robot, semantics_of
from pi0_jax.data.targets import tables_of
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import ANCHORS, Sample, make_transform, to_observation
from pi0_jax.errors import UserError
from pi0_jax.flow.realtime import Previous
from pi0_jax.inference.sampler import ChunkSampler, Inputs, from_checkpoint, with_steps
from pi0_jax.inference.shapes import check_batch_sizes, prompt_lengths
from pi0_jax.model.attention import report_kernel
from pi0_jax.model.fold import Read
from pi0_jax.model.quantize import Bits
from pi0_jax.sampler import Sampler

_log = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Where the time of one call went, seconds."""

    transform: float
    """From raw observations to the model's arrays."""
    device: float
    """The program, until its result is in host memory; the first call of each program compiles."""
    postprocess: float
    """From the model's actions to the robot's."""


class _Prepared(NamedTuple):
    """Observations as the sampler takes them."""

    observation: Observation
    anchors: dict[str, np.ndarray]
    """States that relative actions and signs of quaternions refer to, by key, if there are such."""
    previous: Previous | None
    """What is left of the chunks in execution, if any is."""


class Policy:
    """A trained network with the transforms around it.

    Args:
        config: model, robot, normalisation, objective, and how to sample.
        read: where the parameters come from (`model.fold.from_tree`, `inference.sampler.from_checkpoint`).
        stats: normalisation statistics of the robot's demonstrations.
        tokenizer: the one that the weights were trained with.
        folded: run folded parameters (`model.fold`); the numbers are the same.
        robot: as a checkpoint keeps it; None: the one that `config` names.
        codec: of action tokens, where the objective writes some.

    Raises:
        UserError: statistics, tokenizer, codec or cameras do not fit the robot or the model, or settings do not go
            together.
    """

    def __init__(
        self,
        config: PolicyConfig,
        read: Read,
        stats: Stats,
        tokenizer: Tokenizer,
        *,
        folded: bool = True,
        robot: Robot | None = None,
        codec: FastCodec | None = None,
    ):
        self.config = config
        self.robot: Robot = robot or get_robot(config.robot)
        self.tokenizer, self.stats = tokenizer, stats
        self.normalization = Normalization(stats, semantics_of(self.robot, config.action_semantics))
        self._transform = make_transform(config, self.robot, self.normalization, tokenizer)
        # A camera that the robot lacks is masked; leaving it out gives the same numbers.
        present = tuple(name for name in config.model.cameras if name in self.robot.cameras.values())
        model = dataclasses.replace(config.model, cameras=present)
        tables = tables_of(config, self.robot, tokenizer, codec)
        self.sampler = ChunkSampler(config, model, read, folded=folded, codec=tables)
        self._batch_sizes: tuple[int, ...] = ()
        self._timings: collections.deque[Timing] = collections.deque(maxlen=1000)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        sampler: Sampler | None = None,
        guidance: Guidance | None = None,
        real_time: RealTimeConfig | None = None,
        execute_steps: int | None = None,
        model: ModelConfig | None = None,
        attention: Kernel | None = None,
        dtype: Dtype | None = None,
        bits: Bits | None = None,
        folded: bool = True,
    ) -> Policy:
        """Reads a checkpoint: a run folder (its newest one), or a step folder.

        Args:
            path: where it is.
            sampler, guidance, real_time, execute_steps, model: fields of `PolicyConfig` to use in place of the
                checkpoint's own.
            attention: `ModelConfig.attention`; None: as it was trained.
            dtype: of matrices and activations (`ModelConfig.dtype`). None: as it was trained, but float32 on CPUs,
                where XLA widens bfloat16 weights to float32 and keeps both: more memory, and no time saved.
            bits: round the weights to eight bits (`quantize`).
            folded: see `Policy`.

        Raises:
            FileNotFoundError: no such path.
            UserError: not a checkpoint of ours, or one that is damaged or incomplete; or statistics that do not fit.
        """
        checkpoint.verify(checkpoint.resolve(path), only=("params",))
        assets = checkpoint.load_assets(path)
        if assets.norm_stats is None or assets.tokenizer is None:
            needed = (("norm_stats.json", assets.norm_stats), ("tokenizer.model", assets.tokenizer))
            missing = [name for name, value in needed if value is None]
            raise UserError(
                f"{checkpoint.resolve(path)} holds weights but no {' and no '.join(missing)} in its assets/, so raw "
                "observations cannot be prepared for it. Fine-tune from it (--init-from), or add the files: the "
                "tokenizer by `pi0 convert SOURCE TARGET --tokenizer FILE`."
            )
        semantics = assets.policy.action_semantics | semantics_from_json(assets.norm_stats)
        if dtype is None and jax.default_backend() == "cpu":
            dtype = "float32"
        changes = {"model": model, "model.attention": attention, "model.dtype": dtype}
        changes |= {"sampler": sampler, "guidance": guidance}
        changes |= {"real_time": real_time, "execute_steps": execute_steps, "action_semantics": semantics}
        config = replace(assets.policy, {name: value for name, value in changes.items() if value is not None})
        report_kernel(config.model.attention, config.model.dtype)
        robot = kept_robot(config.robot, assets.robot)
        stats, tokenizer = stats_from_json(assets.norm_stats, robot.name), Tokenizer(assets.tokenizer)
        codec = None if assets.codec is None else FastCodec.from_files(assets.codec)
        read = from_checkpoint(path, config)
        policy = cls(config, read, stats, tokenizer, folded=folded, robot=robot, codec=codec)
        if bits is not None:
            policy.quantize(bits)
        return policy

    def infer(
        self,
        observation: RawObservation,
        seed: int = 0,
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: Sampler | None = None,
        noise: Float[np.ndarray, "ah ad"] | None = None,
    ) -> Float[np.ndarray, "ah d"]:
        """One chunk of actions in the robot's units.

        Args:
            observation: `images` by camera (`[h, w, 3]` RGB, uint8 or float in [0, 1]), `state` `[d]` in the robot's
                units, and `prompt`, a string. With `previous`, what is left of the chunk in execution (`[n, d]`, the
                robot's units), and `delay`, how many of these will be executed before the new chunk is there, that one
                goes on from them, by `config.real_time`.
            seed: of the noise that becomes the actions.
            num_steps, guidance_scale, sampler: as in `infer_batch`.
            noise: that noise itself.

        Raises:
            UserError: the observation is not one of this robot's; the message says what is wrong.
        """
        batched = None if noise is None else np.asarray(noise)[None]
        keys = jax.random.key(seed)[None]
        return self.infer_batch([observation], keys, num_steps, guidance_scale, sampler=sampler, noise=batched)[0]

    def infer_batch(
        self,
        observations: Sequence[RawObservation],
        keys: Key[Array, "b"],
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        sampler: Sampler | None = None,
        noise: Float[np.ndarray, "n ah ad"] | None = None,
    ) -> Float[np.ndarray, "b ah d"]:
        """Chunks of actions for many observations in one call of the network.

        One program is compiled per number of observations, length of prompts (`prompt_lengths`) and sampler, at its
        first use; one more for guidance of whatever scale, one more for observations with `previous`, however much it
        holds, and one more for chosen noise. After `warm_up`, numbers of observations are brought to those it compiled.

        Args:
            observations: as in `infer`.
            keys: one for each observation's noise, so that a chunk does not depend on what else is in the batch.
            num_steps: solver steps; None: the sampler's.
            guidance_scale: of classifier-free guidance; None: the config's. 1 is no guidance.
            sampler: from noise to actions; None: the config's.
            noise: what becomes the actions, standard normal, in place of the keys' own.

        Raises:
            UserError: as of `infer`, or keys or noise of another number.
        """
        count = len(observations)
        if count == 0 or len(keys) != count or (noise is not None and len(noise) != count):
            chosen = "" if noise is None else f" and {len(noise)} of noise"
            raise UserError(
                f"{count} observations came with {len(keys)} keys{chosen}; expected one each, of at least 1."
            )
        if self._batch_sizes and count > (most := self._batch_sizes[-1]):
            slices = [slice(i, i + most) for i in range(0, count, most)]
            parts = [(observations[rows], keys[rows], None if noise is None else noise[rows]) for rows in slices]
            how = {"num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler}
            return np.concatenate([self.infer_batch(raw, key, noise=own, **how) for raw, key, own in parts])
        start = time.perf_counter()
        size = next((n for n in self._batch_sizes if n >= count), count)
        rows = np.minimum(np.arange(size), count - 1)
        prepared = self._prepare([observations[i] for i in rows])
        inputs = Inputs(
            prepared.observation,
            keys if size == count else keys[rows],
            None if noise is None else np.asarray(noise, np.float32)[rows],
            self._guidance_scale(guidance_scale),
            prepared.previous,
        )
        ready = time.perf_counter()
        normalised = self.sampler(inputs, self._chosen(sampler, num_steps))
        computed = time.perf_counter()
        actions = self._raw(normalised, prepared.anchors)[:count]
        self._timings.append(Timing(ready - start, computed - ready, time.perf_counter() - computed))
        return actions

    def sample(
        self, observation: Observation, keys: Key[Array, "b"], noise: Float[np.ndarray, "b ah ad"]
    ) -> Float[np.ndarray, "b ah ad"]:
        """Normalised, padded chunks for observations as the model takes them, with the cameras that the robot has.

        Noise, keys and programs are as in `infer_batch`.
        """
        return self.sampler(Inputs(observation, keys, noise, self._guidance_scale(None)), self.config.sampler)

    def warm_up(self, batch_sizes: Sequence[int] = (1,), *, real_time: bool = False) -> dict[int, float]:
        """Compiles what calls will need, so that none of them waits for a compiler, and runs each program.

        Args:
            batch_sizes: from now on, observations come in these numbers to the network: smaller batches are filled up,
                larger ones than the largest are divided.
            real_time: compile for observations with `previous`, too.

        Returns:
            Seconds of a call of the network by batch size, those of the slowest program.
        """
        self._batch_sizes = check_batch_sizes(batch_sizes)
        example = self.robot.example()
        unplayed = np.tile(self.robot.example_action(), (self.config.model.action_horizon, 1))
        examples = [example, {**example, "previous": unplayed}] if real_time else [example]
        lengths = prompt_lengths(self.config.model.prompt_length)
        programs = list(itertools.product(self._batch_sizes, lengths, examples))
        _log.info("compiling %d programs, for batches of %s", len(programs), ", ".join(map(str, self._batch_sizes)))
        seconds = dict.fromkeys(self._batch_sizes, 0.0)
        for number, (size, length, raw) in enumerate(programs, 1):
            prepared = self._prepare([cast(RawObservation, raw)] * size, length)
            keys, scale = jax.random.split(jax.random.key(0), size), self._guidance_scale(None)
            inputs = Inputs(prepared.observation, keys, None, scale, prepared.previous)
            start = time.perf_counter()
            self.sampler.compiled(inputs, self.config.sampler)
            compiled = time.perf_counter() - start
            ran = self._seconds(inputs)
            if ran < 1:  # a first call does more than the next ones, which shows where they are quick
                ran = self._seconds(inputs)
            seconds[size] = max(seconds[size], ran)
            kind = f"batch of {size}, prompt of {length} tokens" + (", real time" if "previous" in raw else "")
            done = "program %d of %d (%s): compiled in %.1f s, runs in %.3g s"
            _log.info(done, number, len(programs), kind, compiled, ran)
        self.forget_latency()
        return seconds

    def _seconds(self, inputs: Inputs) -> float:
        """The time of a call of the network."""
        start = time.perf_counter()
        self.sampler(inputs, self.config.sampler)
        return time.perf_counter() - start

    @property
    def compiled(self) -> int:
        """Number of programs compiled so far."""
        return len(self.sampler.programs)

    def latency(self) -> dict[str, dict[str, float]]:
        """p50, p95 and p99 of the last 1000 calls by stage (the fields of `Timing`) and in total, milliseconds; empty
        without calls."""
        if not self._timings:
            return {}
        table = 1000 * np.array(self._timings)
        columns = dict(zip(Timing._fields, table.T, strict=True)) | {"total": table.sum(1)}
        return {
            name: {f"p{q}": float(np.percentile(values, q)) for q in (50, 95, 99)} for name, values in columns.items()
        }

    def forget_latency(self) -> None:
        """Starts `latency` anew."""
        self._timings.clear()

    def quantize(self, bits: Bits) -> dict[str, float]:
        """Rounds the matrices of all layers to eight bits, and logs what that does to the actions.

        Args:
            bits: int8: weights alone. fp8: weights and what they are multiplied with, which is quicker on GPUs that
                multiply float8.

        Returns:
            Root mean square and largest difference of normalised actions, for eight noises at the robot's example.

        Raises:
            UserError: the parameters are not folded.
        """
        prepared = self._prepare([self.robot.example()] * 8)
        inputs = Inputs(prepared.observation, jax.random.split(jax.random.key(0), 8))
        before = self.sampler(inputs, self.config.sampler)
        self.sampler.quantize(bits)
        after = self.sampler(inputs, self.config.sampler)
        error = {"rms": float(np.sqrt(np.mean((after - before) ** 2))), "largest": float(np.abs(after - before).max())}
        message = "weights in %s: normalised actions change by %.2g (root mean square), %.2g at most"
        _log.info(message, bits, error["rms"], error["largest"])
        return error

    def program(self, size: int, length: int) -> tuple[Callable[..., Any], Any, Observation, np.ndarray]:
        """What a batch is computed with, to be compiled elsewhere.

        Args:
            size: number of observations.
            length: of their prompts, one of `prompt_lengths`.

        Returns:
            A function of parameters, the model's observation and noise, to normalised actions; those parameters; an
            example's observation and noise.

        Raises:
            UserError: the sampler draws random numbers of its own.
        """
        if getattr(self.config.sampler, "stochastic", False):
            raise UserError(
                f"{type(self.config.sampler).__name__} draws noise at every step, so its program needs a key; export "
                "with eta 0 or another sampler."
            )
        function, scale = self.sampler.function(self.config.sampler), self._guidance_scale(None)

        def sample(params, observation, noise):
            keys = jax.random.split(jax.random.key(0), size)
            return function(params, Inputs(observation, keys, noise, scale, None, self.sampler.codec))

        observation = self._prepare([self.robot.example()] * size, length).observation
        model = self.config.model
        noise = np.zeros((size, model.action_horizon, model.action_dim), np.float32)
        return sample, self.sampler.params, observation, noise

    def denoise(self, observation: RawObservation, seed: int = 0, num_steps: int | None = None) -> np.ndarray:
        """The points that noise passes on its way to a chunk, in the robot's units, `[num_steps + 1, ah, d]`."""
        keys = jax.random.key(seed)[None]
        points, anchors = self._points([observation], keys, self._chosen(None, num_steps))
        return self._raw(points[:, 0], anchors)

    def paths(
        self, observations: Sequence[RawObservation], keys: Key[Array, "b"], num_steps: int | None = None
    ) -> Float[np.ndarray, "n b ah ad"]:
        """The points on the way of many chunks, as `flow.straightness` wants them: in the model's own units, at equally
        spaced times whatever the config's grid."""
        sampler = self._chosen(None, num_steps)
        if hasattr(sampler, "grid_power"):
            sampler = dataclasses.replace(sampler, grid_power=1.0)
        return self._points(observations, keys, sampler)[0]

    def _points(self, observations: Sequence[RawObservation], keys: Key[Array, "b"], sampler: Sampler):
        prepared = self._prepare(observations)
        inputs = Inputs(prepared.observation, keys, None, self._guidance_scale(None))
        return self.sampler(inputs, sampler, path=True), prepared.anchors

    def _chosen(self, sampler: Sampler | None, num_steps: int | None) -> Sampler:
        return with_steps(sampler or self.config.sampler, num_steps)

    def _guidance_scale(self, scale: float | None) -> Float[np.ndarray, ""] | None:
        """The scale as an array, so that one program serves all; None: no guidance."""
        guidance = self.config.guidance
        scale = guidance.scale if scale is None and guidance is not None else scale
        return None if scale is None or scale == 1 else np.asarray(scale, np.float32)

    def _prepare(self, observations: Sequence[RawObservation], length: int | None = None) -> _Prepared:
        """Prompts are cut to the length, or to what they need."""
        samples = [self._transform.forward(check_observation(raw, self.robot)) for raw in observations]
        anchors = {key: np.stack([np.asarray(x.get(key)) for x in samples]) for key in ANCHORS if key in samples[0]}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(to_observation, samples))
        needed = int(stacked.prompt_mask.sum(axis=1).max())
        length = length or next(n for n in prompt_lengths(self.config.model.prompt_length) if n >= needed)
        cameras = self.sampler.model.cameras
        stacked = stacked._replace(
            images={name: stacked.images[name] for name in cameras},
            image_masks={name: stacked.image_masks[name] for name in cameras},
            prompt=stacked.prompt[:, :length],
            prompt_mask=stacked.prompt_mask[:, :length],
        )
        return _Prepared(stacked, anchors, self._previous(samples))

    def _previous(self, samples: Sequence[Sample]) -> Previous | None:
        """What remains of the chunks in execution, relative to the new state where actions are relative.

        A trained network cannot be told of more certain actions than it learned with: only so many are."""
        if not any("previous" in sample for sample in samples):
            return None
        model, trained = self.config.model, self.config.real_time.method == "trained"
        max_delay = getattr(self.config.objective, "max_delay", 0)
        actions = np.zeros((len(samples), model.action_horizon, model.action_dim), np.float32)
        delay, end = np.zeros((2, len(samples)), np.int32)
        for i, sample in enumerate(samples):
            left = sample.get("previous", actions[0, :0])[: model.action_horizon]
            actions[i, : len(left)], end[i] = left, len(left)
            delay[i] = min(sample.get("delay", 0), len(left), max_delay if trained else len(left))
        return Previous(*map(jnp.asarray, (actions, delay, end)))

    def _raw(self, actions: np.ndarray, anchors: dict[str, np.ndarray]) -> np.ndarray:
        sample = self._transform.inverse(cast(Sample, {"actions": actions, **anchors}))
        return np.asarray(sample.get("actions"), np.float32)
