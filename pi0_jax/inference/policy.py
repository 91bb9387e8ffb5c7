"""A policy as a robot uses it: raw observations in, raw actions out. A checkpoint is all it needs."""

from __future__ import annotations

import collections
import dataclasses
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from pi0_jax import checkpoint, pi0
from pi0_jax.batch import Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.data.normalization import Normalization, Stats, semantics_from_json, stats_from_json
from pi0_jax.data.robots import Robot, get_robot, semantics_of
from pi0_jax.data.tokenizer import Tokenizer
from pi0_jax.data.transform import Sample, check_observation, make_transform, to_observation
from pi0_jax.flow.guidance import Previous
from pi0_jax.inference.fast import FastNetwork
from pi0_jax.inference.rewrite import Bits, Read, can_rewrite, from_checkpoint, quantized, read_all, rewrite
from pi0_jax.model.attention import Kernel, report_kernel
from pi0_jax.model.heads import make_network

_log = logging.getLogger(__name__)


class Timing(NamedTuple):
    """Where the time of one call went, seconds."""

    transform: float
    """Raw observations to the model's arrays."""
    device: float
    """The program, until its result is there; the first call of each program compiles."""
    reply: float
    """The model's actions to the robot's."""


class Policy:
    """A trained network with the transforms around it.

    Args:
        config: model, robot, normalisation, and how to sample.
        read: where the weights come from (`rewrite.from_tree`, `rewrite.from_checkpoint`).
        stats: normalisation statistics of the robot's demonstrations.
        tokenizer: the one that the weights were trained with.
        rewritten: run rewritten weights (`rewrite.py`), where there are rules for the model; the numbers are the same.
        straight: a straight-line program instead of loops over layers and steps; None: on GPUs, where loops cost more
            than they do elsewhere.

    Raises:
        ValueError: statistics, tokenizer or cameras do not fit the robot or the model.
    """

    def __init__(
        self,
        config: PolicyConfig,
        read: Read,
        stats: Stats,
        tokenizer: Tokenizer,
        *,
        rewritten: bool = True,
        straight: bool | None = None,
    ):
        pi0.check_policy(config)
        self.config = config
        self.robot: Robot = get_robot(config.robot)
        self.tokenizer, self.stats = tokenizer, stats
        self.normalization = Normalization(stats, semantics_of(self.robot, config.action_semantics))
        self._transform = make_transform(config, self.robot, self.normalization, tokenizer)
        # A camera that the robot lacks is masked; leaving it out gives the same numbers.
        present = tuple(name for name in config.model.cameras if name in self.robot.cameras.values())
        model = dataclasses.replace(config.model, cameras=present)
        self._rewritten = rewritten and can_rewrite(model)
        self._straight = jax.default_backend() == "gpu" if straight is None else straight
        if self._rewritten:
            self._network: Any = FastNetwork(model)
            self._weights = rewrite(model, read, unstacked=self._straight)
        else:
            self._network, self._weights = make_network(model), read_all(model, read)
        self._tables: dict[int, Any] = {}
        self._batch_sizes: tuple[int, ...] = ()
        self._timings: collections.deque[Timing] = collections.deque(maxlen=1000)
        names = ("num_steps", "solver", "grid_power", "guidance_without", "clip", "path")
        self._run = jax.jit(self._sample, static_argnames=names)

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        rewritten: bool = True,
        straight: bool | None = None,
        bits: Bits | None = None,
        attention: Kernel | None = None,
        **changes: Any,
    ) -> Policy:
        """Reads a checkpoint: a run folder (its newest one), or a step folder.

        Args:
            path: where it is.
            rewritten, straight: see `Policy`.
            bits: round the weights to eight bits (`quantize`).
            attention: `ModelConfig.attention`; None: as it was trained.
            changes: fields of `PolicyConfig` to set otherwise, such as `num_steps=4`.

        Raises:
            FileNotFoundError: no such path.
            ValueError: not a checkpoint of ours, or one that is damaged or incomplete; or statistics that do not fit.
        """
        checkpoint.verify(checkpoint.resolve(path), only=("params",))
        assets = checkpoint.load_assets(path)
        if assets.norm_stats is None or assets.tokenizer is None:
            needed = (("norm_stats.json", assets.norm_stats), ("tokenizer.model", assets.tokenizer))
            missing = [name for name, value in needed if value is None]
            raise ValueError(
                f"{checkpoint.resolve(path)} holds weights but no {' and no '.join(missing)} in its assets/, so raw "
                "observations cannot be prepared for it. Fine-tune from it (--init-from), or add the files: the "
                "tokenizer by `pi0 convert SOURCE TARGET --tokenizer FILE`."
            )
        config = dataclasses.replace(assets.policy, **changes)
        if attention is not None:
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=attention))
        report_kernel(config.model.attention, config.model.dtype)
        semantics = config.action_semantics | semantics_from_json(assets.norm_stats)
        config = dataclasses.replace(config, action_semantics=semantics)
        stats, tokenizer = stats_from_json(assets.norm_stats, config.robot), Tokenizer(assets.tokenizer)
        read = from_checkpoint(path, config.model)
        policy = cls(config, read, stats, tokenizer, rewritten=rewritten, straight=straight)
        if bits is not None:
            policy.quantize(bits)
        return policy

    def infer(
        self, observation: dict[str, Any], seed: int = 0, *, noise: Float[np.ndarray, "ah ad"] | None = None, **how: Any
    ) -> Float[np.ndarray, "ah d"]:
        """One chunk of actions in the robot's units.

        Args:
            observation: `images` by camera (`[h, w, 3]` RGB, uint8 or float in [0, 1]), `state` `[d]` in the robot's
                units, and `prompt`, a string. With `previous`, what is left of the chunk in execution (`[n, d]`, the
                robot's units), and `delay`, how many of these will be executed before the new chunk is there, that one
                goes on from them, by `config.real_time`.
            seed: of the noise that becomes the actions.
            noise: that noise itself.
            how: `num_steps`, `guidance_scale` and `solver`, as in `infer_batch`.

        Raises:
            ValueError: the observation is not one of this robot's; the message says what is wrong.
        """
        given = None if noise is None else np.asarray(noise)[None]
        return self.infer_batch([observation], jax.random.key(seed)[None], noise=given, **how)[0]

    def infer_batch(
        self,
        observations: Sequence[dict[str, Any]],
        keys: PRNGKeyArray,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        *,
        solver: str | None = None,
        noise: Float[np.ndarray, "b ah ad"] | None = None,
    ) -> Float[np.ndarray, "b ah d"]:
        """Chunks of actions for many observations in one call of the network.

        One program is compiled for each number of observations, length of prompts (`prompt_lengths`), number of steps
        and solver, at its first use; one more for guidance of whatever scale, one more for observations with
        `previous`, however much that is, and one more for given noise. After `warm_up` numbers of observations are
        brought to those that it compiled.

        Args:
            observations: as in `infer`.
            keys: one for each observation's noise, so that a chunk does not depend on what else is in the batch.
            num_steps: solver steps; None: the config's.
            guidance_scale: of classifier-free guidance; None: the config's.
            solver: name of the solver; None: the config's.
            noise: what becomes the actions, standard normal, in place of the keys' own.

        Raises:
            ValueError: as of `infer`, or keys or noise of another number.
        """
        count = len(observations)
        if count == 0 or len(keys) != count or (noise is not None and len(noise) != count):
            given = "" if noise is None else f" and {len(noise)} of noise"
            raise ValueError(
                f"{count} observations came with {len(keys)} keys{given}; expected one each, of at least 1."
            )
        if self._batch_sizes and count > self._batch_sizes[-1]:
            most = self._batch_sizes[-1]
            parts = [slice(i, i + most) for i in range(0, count, most)]
            how = (num_steps, guidance_scale)
            some = (None if noise is None else noise[part] for part in parts)
            found = [
                self.infer_batch(observations[part], keys[part], *how, solver=solver, noise=x)
                for part, x in zip(parts, some, strict=True)
            ]
            return np.concatenate(found)
        start = time.perf_counter()
        size = next((n for n in self._batch_sizes if n >= count), count)
        rows = np.minimum(np.arange(size), count - 1)
        observation, anchors, previous = self._prepare([observations[i] for i in rows])
        options = self._options(num_steps, guidance_scale, solver)
        given = None if noise is None else np.asarray(noise, np.float32)[rows]
        prepared = time.perf_counter()
        normalised = self._compute(observation, keys if size == count else keys[rows], previous, options, given)
        computed = time.perf_counter()
        actions = self._raw(normalised, anchors)[:count]
        self._timings.append(Timing(prepared - start, computed - prepared, time.perf_counter() - computed))
        return actions

    def warm_up(self, batch_sizes: Sequence[int] = (1,), *, real_time: bool = False, **how: Any) -> None:
        """Compiles what calls will need, so that none of them waits for a compiler.

        Args:
            batch_sizes: from now on, observations come in these numbers to the network: fewer are filled up, more than
                the largest are divided.
            real_time: compile for observations with `previous`, too.
            how: arguments of `infer_batch` to compile for.
        """
        self._batch_sizes = check_batch_sizes(batch_sizes)
        example = self.robot.example()
        rest = {"previous": np.zeros((self.config.model.action_horizon, len(self.robot.actions)), np.float32)}
        options = self._options(**how)
        for size in self._batch_sizes:
            for length in prompt_lengths(self.config.model.prompt_length):
                start = time.perf_counter()
                for raw in (example, example | rest) if real_time else (example,):
                    observation, _, previous = self._prepare([raw] * size, length)
                    self._compute(observation, jax.random.split(jax.random.key(0), size), previous, options)
                _log.info("batch of %d, prompt of %d: ready after %.1f s", size, length, time.perf_counter() - start)
        self.forget_latency()

    @property
    def compiled(self) -> int:
        """Number of programs compiled so far."""
        return self._run._cache_size()  # pyright: ignore

    def latency(self) -> dict[str, dict[str, float]]:
        """Percentiles (p50, p95, p99) of the last 1000 calls' times, milliseconds, by `Timing`'s parts and in total.

        A call's time is taken when its result is in host memory.
        """
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
            ValueError: the policy does not run on rewritten weights.
        """
        if not self._rewritten:
            raise ValueError(
                f"eight-bit weights need a policy on rewritten weights; this one predicts "
                f"{self.config.model.prediction} with the head {self.config.model.head!r}."
            )
        observation, *_ = self._prepare([self.robot.example()] * 8)
        keys, options = jax.random.split(jax.random.key(0), 8), self._options(None)
        before = self._compute(observation, keys, None, options)
        self._weights = quantized(self._weights, bits)
        after = self._compute(observation, keys, None, options)
        error = {"rms": float(np.sqrt(np.mean((after - before) ** 2))), "largest": float(np.abs(after - before).max())}
        _log.info(
            "weights in %s: normalised actions change by %.2g (root mean square), %.2g at most",
            bits, error["rms"], error["largest"],
        )  # fmt: skip
        return error

    def program(self, size: int, length: int) -> tuple[Callable[..., Any], Any, Observation, np.ndarray]:
        """What a batch is computed with, to be compiled elsewhere.

        Args:
            size: number of observations.
            length: of their prompts, one of `prompt_lengths`.

        Returns:
            A function of weights, the model's observation and noise, to normalised actions; those weights; an example's
            observation and noise.

        Raises:
            ValueError: the solver draws random numbers of its own.
        """
        if self.config.solver == "ddpm":
            raise ValueError("the solver ddpm draws noise at every step, so its program needs a key; export with ddim.")
        options = self._options()

        def sample(weights, observation, noise):
            return self._sample(weights, observation, None, noise=noise, previous=None, **options)

        observation, *_ = self._prepare([self.robot.example()] * size, length)
        noise = np.zeros((size, self.config.model.action_horizon, self.config.model.action_dim), np.float32)
        return sample, self._with_tables(options, None), observation, noise

    def denoise(self, observation: dict[str, Any], seed: int = 0, num_steps: int | None = None) -> np.ndarray:
        """The points that noise passes on its way to a chunk, in the robot's units, `[num_steps + 1, ah, d]`."""
        points, anchors = self._points([observation], jax.random.key(seed)[None], self._options(num_steps))
        return self._raw(points[:, 0], anchors)

    def paths(
        self, observations: Sequence[dict[str, Any]], keys: PRNGKeyArray, num_steps: int | None = None
    ) -> Float[np.ndarray, "n b ah ad"]:
        """The points on the way of many chunks, as `flow.straightness` wants them: in the model's own units, at equally
        spaced times whatever the config's grid."""
        return self._points(observations, keys, self._options(num_steps) | {"grid_power": 1.0})[0]

    def _points(self, observations: Sequence[dict[str, Any]], keys: PRNGKeyArray, options: dict[str, Any]):
        observation, anchors, _ = self._prepare(observations)
        weights = self._with_tables(options, None)
        _, points = self._run(weights, observation, keys, noise=None, previous=None, **options, path=True)
        return np.asarray(points), anchors

    def _compute(self, observation, keys, previous, options, noise=None) -> np.ndarray:
        """Normalised actions, in host memory."""
        weights = self._with_tables(options, previous)
        return np.asarray(self._run(weights, observation, keys, noise=noise, previous=previous, **options))

    def _with_tables(self, options: dict[str, Any], previous: Previous | None) -> Any:
        """The weights, and what the flow times of an equal Euler grid do, where those are the times."""
        each_its_own = previous is not None and self.config.real_time.method == "trained"
        euler = options["solver"] == "euler" and options["grid_power"] == 1
        if not self._rewritten or not euler or self.config.model.prediction != "velocity" or each_its_own:
            return self._weights
        steps = options["num_steps"]
        if steps not in self._tables:
            self._tables[steps] = jax.jit(self._network.time_tables, static_argnums=1)(self._weights, steps)
        return self._weights | {"tables": self._tables[steps]}

    def _options(
        self, num_steps: int | None = None, guidance_scale: float | None = None, solver: str | None = None
    ) -> dict[str, Any]:
        options = pi0.sampling_options(self.config)
        options |= {name: x for name, x in (("num_steps", num_steps), ("solver", solver)) if x is not None}
        scale = options.pop("guidance_scale") if guidance_scale is None else guidance_scale
        return options | {"guidance_scale": None if scale == 1 else scale}

    def _prepare(self, observations: Sequence[dict[str, Any]], length: int | None = None):
        """The model's observations; the states that relative actions refer to, if there are such; and what is left of
        the chunks in execution, if anything is. Prompts are cut to the given length, or to what they need."""
        samples = [self._transform.forward(check_observation(raw, self.robot)) for raw in observations]
        anchors = {key: np.stack([sample[key] for sample in samples]) for key in ("anchor",) if key in samples[0]}
        stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *map(to_observation, samples))
        needed = int(stacked.prompt_mask.sum(axis=1).max())
        length = length or next(n for n in prompt_lengths(self.config.model.prompt_length) if n >= needed)
        cameras = self._network.config.cameras
        stacked = stacked._replace(
            images={name: stacked.images[name] for name in cameras},
            image_masks={name: stacked.image_masks[name] for name in cameras},
            prompt=stacked.prompt[:, :length],
            prompt_mask=stacked.prompt_mask[:, :length],
        )
        return stacked, anchors, self._previous(samples)

    def _previous(self, samples: Sequence[Sample]) -> Previous | None:
        """What remains of the chunks in execution, relative to the new state where actions are relative.

        A trained network cannot be told of more certain actions than it learned with: only so many are."""
        if not any("previous" in sample for sample in samples):
            return None
        model, trained = self.config.model, self.config.real_time.method == "trained"
        actions = np.zeros((len(samples), model.action_horizon, model.action_dim), np.float32)
        delay, end = np.zeros((2, len(samples)), np.int32)
        for i, sample in enumerate(samples):
            left = sample.get("previous", actions[0, :0])[: model.action_horizon]
            actions[i, : len(left)], end[i] = left, len(left)
            delay[i] = min(sample.get("delay", 0), len(left), model.max_delay if trained else len(left))
        return Previous(*map(jnp.asarray, (actions, delay, end)))

    def _raw(self, actions: np.ndarray, anchors: dict[str, np.ndarray]) -> np.ndarray:
        return self._transform.inverse({"actions": actions} | anchors)["actions"].astype(np.float32)

    def _sample(self, weights, observation, keys, *, noise, guidance_scale, **options):
        if noise is None:
            shape = (self.config.model.action_horizon, self.config.model.action_dim)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
        scale = 1.0 if guidance_scale is None else guidance_scale
        return pi0.sample_actions(
            self._network, weights, observation, noise, guidance_scale=scale, keys=keys,
            real_time=self.config.real_time, unroll=self._straight, **options,
        )  # fmt: skip


def check_batch_sizes(sizes: Sequence[int]) -> tuple[int, ...]:
    """The sizes in order, each once.

    Raises:
        ValueError: none, or some below 1.
    """
    if not sizes or min(sizes) < 1:
        raise ValueError(f"batch sizes came as {list(sizes)}; expected at least one, of at least 1.")
    return tuple(sorted(set(sizes)))


def prompt_lengths(longest: int) -> tuple[int, ...]:
    """Lengths that prompts are padded to: 32, 64, 128, … and the model's own. Padding is masked and has no position, so
    the numbers are those of the longest."""
    lengths = []
    while (length := 32 << len(lengths)) < longest:
        lengths.append(length)
    return (*lengths, longest)
