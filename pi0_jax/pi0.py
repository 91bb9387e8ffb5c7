"""π0 on one page: the training loss and the sampling of a policy.

The network predicts the velocity dx/dt at a noisy action chunk x_t, given the observation and t. In training the
objective draws noise and a time t per demonstrated chunk: x_t = (1 - t) · actions + t · noise; the loss is the mean
squared error. To act, a solver integrates the velocity from noise (t = 1) to actions (t = 0). The paper's τ is 1 - t.

With the default head the network is a transformer with two sets of weights. The language expert (Gemma 2B) has the
prefix, image patches from SigLIP and the prompt, which see one another only. The smaller action expert has a token per
action, which sees all tokens, and π0's state token, which sees no actions (π0.5 has the state in the prompt). So
training is one pass over all tokens (`network.joint`). Sampling computes the prefix's keys and values once
(`network.prefill`), and each evaluation of the velocity runs the action expert against them (`network.velocity`).

    objective = make_objective(policy.objective, policy.model)
    params    = init_params(objective, key)
    value, _  = loss(objective, params, batch, key)
    actions   = sample_actions(objective, params, observation, noise, SampleOptions(sampler=Euler(num_steps=10)))

`objective/gaussian.py` is the objective above; `joint.py` adds text and action tokens that the language expert writes
(π0.5 as published), `autoregressive.py` has these alone (π0-FAST). The network is in `model/head/expert.py`, its layers
in `model/layers.py`, solvers in `sampler/`. `training/step.py` is one update: `objective.draw` once, then `loss`.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.errors import UserError
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective import make_objective as make_objective  # re-exported
from pi0_jax.objective.sampling import solver_of
from pi0_jax.sampler import trajectory


def init_params(objective: Objective, key: Key[Array, ""]) -> Params:
    """Random parameters of the objective's network, nested dicts of float32 arrays."""
    return nn.meta.unbox(objective.network.init(key))


def loss(
    objective: Objective,
    params: Params,
    batch: Batch,
    key: Key[Array, ""],
    step: Int[Array, ""] | int = 0,
    *teacher: Params,
) -> tuple[Float[Array, ""], Metrics]:
    """Loss of a batch.

    Args:
        objective: of `make_objective`.
        params: of its network, trainable and frozen.
        batch: normalised examples; images uint8 or in [-1, 1].
        key: for noise, times, and whatever else is drawn.
        step: updates made so far; some objectives have a warm-up.
        teacher: parameters of a trained policy that is distilled, where `objective.teacher` names one.

    Returns:
        The loss, and metrics of the objective.
    """
    draws, count = objective.draw(batch, key, step)
    return objective.loss(params, draws, count, *teacher)


def sample_actions(
    objective: Objective,
    params: Params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    options: SampleOptions = SampleOptions(),
) -> Float[Array, "b ah ad"]:
    """Turns noise into action chunks.

    Args:
        objective: of `make_objective`.
        params: of its network, as trained or rewritten for faster inference (`model/fold.py`).
        observation: images uint8 or in [-1, 1].
        noise: standard normal; the caller draws it.
        options: sampler (10 Euler steps by default), guidance, text that was written, the codec of action tokens, and
            for real-time chunking the actions of the previous chunk that are not executed yet.

    Returns:
        Normalised, padded actions, float32.

    Raises:
        UserError: the objective does not support these options.
    """
    return objective.sample(params, observation, noise, options)


def sample_path(
    objective: Objective,
    params: Params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    options: SampleOptions,
) -> Float[Array, "n b ah ad"]:
    """The num_steps + 1 points of a solver from noise to actions, noise first; arguments of `sample_actions`.

    Raises:
        UserError: the objective or the sampler decodes action tokens.
    """
    if objective.flow is None:
        raise UserError("action tokens are decoded one by one: there is no path from noise to actions.")
    flow, project = objective.flow(params, observation, options)  # `project` sets the actions that are certain
    keywords: dict[str, Any] = {"features": options.features, "keys": options.keys, "project": project}
    return trajectory(flow, noise, solver_of(options.sampler), **keywords)


def sampling_options(policy: PolicyConfig) -> SampleOptions:
    """The options that a policy's configuration sets."""
    guidance = policy.guidance
    options = SampleOptions(policy.sampler, real_time=policy.real_time)
    if guidance is None:
        return options
    return options._replace(guidance_scale=guidance.scale, guidance_without=guidance.without)
