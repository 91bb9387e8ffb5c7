"""A policy as a robot uses it: raw observations in, raw actions out. A checkpoint is all it needs."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
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
from pi0_jax.data.transform import Sample, make_transform
from pi0_jax.errors import UserError
from pi0_jax.inference.prepare import Prepared, prepare
from pi0_jax.inference.sampler import ChunkSampler, Inputs, from_checkpoint, with_steps
from pi0_jax.inference.shapes import check_batch_sizes, prompt_lengths
from pi0_jax.inference.warm_up import Call, warm_up
from pi0_jax.model.attention import report_kernel
from pi0_jax.model.fold import Read
from pi0_jax.model.quantize import Bits
from pi0_jax.model.writer import Block
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
        # A camera that the robot lacks is masked; leaving it out gives the same numbers. Not so a blank one.
        blank, there = config.objective.blank_cameras, self.robot.cameras.values()
        present = tuple(name for name in config.model.cameras if blank or name in there)
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
        subtask_every: int | None = None,
        model: ModelConfig | None = None,
        attention: Kernel | None = None,
        dtype: Dtype | None = None,
        bits: Bits | None = None,
        folded: bool = True,
    ) -> Policy:
        """Reads a checkpoint: a run folder (its newest one), or a step folder.

        Args:
            path: where it is.
            sampler, guidance, real_time, execute_steps, subtask_every, model: fields of `PolicyConfig` to use in place
                of the checkpoint's own.
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
        changes |= {"sampler": sampler, "guidance": guidance, "subtask_every": subtask_every}
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
        how = {"num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler, "noise": noise}
        return self.answer_batch(observations, keys, **how)[0]

    def answer_batch(
        self,
        observations: Sequence[RawObservation],
        keys: Key[Array, "b"],
        *,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: Sampler | None = None,
        noise: Float[np.ndarray, "n ah ad"] | None = None,
    ) -> tuple[Float[np.ndarray, "b ah d"], list[str | None]]:
        """`infer_batch`, and the subtask of each chunk: the observation's, or what the policy wrote for itself
        (`PolicyConfig.subtask_every`); None where there is none."""
        count = len(observations)
        if count == 0 or len(keys) != count or (noise is not None and len(noise) != count):
            chosen = "" if noise is None else f" and {len(noise)} of noise"
            raise UserError(
                f"{count} observations came with {len(keys)} keys{chosen}; expected one each, of at least 1."
            )
        asks = np.array([bool(self.config.subtask_every) and raw.get("subtask") is None for raw in observations])
        most = self._batch_sizes[-1] if self._batch_sizes else count
        rows = [np.flatnonzero(asks), np.flatnonzero(~asks)]
        groups = [some[i : i + most] for some in rows for i in range(0, len(some), most)]
        how = {"num_steps": num_steps, "guidance_scale": guidance_scale, "sampler": sampler}
        if len(groups) > 1:
            own = [None if noise is None else noise[some] for some in groups]
            parts = [
                self.answer_batch([observations[i] for i in some], keys[some], noise=x, **how)
                for some, x in zip(groups, own, strict=True)
            ]
            order, texts = np.argsort(np.concatenate(groups)), [text for _, found in parts for text in found]
            return np.concatenate([actions for actions, _ in parts])[order], [texts[i] for i in order]
        start = time.perf_counter()
        size = next((n for n in self._batch_sizes if n >= count), count)
        rows = np.minimum(np.arange(size), count - 1)
        prepared = self._prepare([observations[i] for i in rows], asks=bool(asks[0]))
        inputs = Inputs(
            prepared.observation,
            keys if size == count else keys[rows],
            None if noise is None else np.asarray(noise, np.float32)[rows],
            self._guidance_scale(guidance_scale),
            prepared.previous,
            prepared.text,
        )
        ready = time.perf_counter()
        texts: list[str | None] = [raw.get("subtask") for raw in observations]
        if asks[0]:
            normalised, block = self.sampler.write(inputs, self._chosen(sampler, num_steps))
            texts[:] = [self.tokenizer.decode(row[there].tolist()) for row, there in zip(*block, strict=True)][:count]
        else:
            normalised = self.sampler(inputs, self._chosen(sampler, num_steps))
        computed = time.perf_counter()
        actions = self._raw(normalised, prepared.anchors)[:count]
        self._timings.append(Timing(ready - start, computed - ready, time.perf_counter() - computed))
        return actions, texts

    def sample(
        self, observation: Observation, keys: Key[Array, "b"], noise: Float[np.ndarray, "b ah ad"]
    ) -> tuple[Float[np.ndarray, "b ah ad"], Block | None]:
        """Normalised, padded chunks for observations as the model takes them, with the cameras that the robot has, and
        the subtask that a policy which writes subtasks wrote for each.

        Noise, keys and programs are as in `infer_batch`.
        """
        inputs = Inputs(observation, keys, noise, self._guidance_scale(None))
        if self.config.subtask_every:
            return self.sampler.write(inputs, self.config.sampler)
        return self.sampler(inputs, self.config.sampler), None

    def warm_up(self, batch_sizes: Sequence[int] = (1,), *, real_time: bool = False) -> dict[int, float]:
        """Compiles what calls will need, so that none of them waits for a compiler, and runs the programs.

        As many are compiled beside each other as there are cores. Where a call takes longer than a second, as on CPUs,
        programs for shorter prompts, which are no slower, are not run.

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
        examples: Any = [example, {**example, "previous": unplayed}] if real_time else [example]
        if self.config.objective.text_tokens:  # that of an earlier chunk, or of the request
            examples += [{**raw, "subtask": "x"} for raw in examples]
        lengths = prompt_lengths(self.config.model.prompt_length)
        calls = [
            self._example(size, length, raw) for size in self._batch_sizes for length in lengths for raw in examples
        ]
        seconds = warm_up(self.sampler, self.config.sampler, calls)
        self.forget_latency()
        return seconds

    def _example(self, size: int, length: int, raw: RawObservation) -> Call:
        """A call of the network with some equal observations."""
        write = bool(self.config.subtask_every) and "subtask" not in raw
        prepared = self._prepare([raw] * size, length, asks=write)
        keys, scale = jax.random.split(jax.random.key(0), size), self._guidance_scale(None)
        inputs = Inputs(prepared.observation, keys, None, scale, prepared.previous, prepared.text)
        name = f"batch of {size}, prompt of {length} tokens" + (", real time" if "previous" in raw else "")
        name += ", writing a subtask" if write else ", with a subtask" if "subtask" in raw else ""
        return Call(name, size, length, inputs, write)

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
            return function(params, Inputs(observation, keys, noise, scale, codec=self.sampler.codec))

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

    def _prepare(
        self, observations: Sequence[RawObservation], length: int | None = None, *, asks: bool = False
    ) -> Prepared:
        """Observations as the network takes them; with `asks`, their prompts ask for a subtask."""
        checked = [check_observation(raw, self.robot) for raw in observations]
        samples = [self._transform.forward(cast(Sample, {**x, "asks": True}) if asks else x) for x in checked]
        return prepare(samples, self.config, self.tokenizer, self.sampler.model.cameras, length)

    def _raw(self, actions: np.ndarray, anchors: dict[str, np.ndarray]) -> np.ndarray:
        sample = self._transform.inverse(cast(Sample, {"actions": actions, **anchors}))
        return np.asarray(sample.get("actions"), np.float32)
