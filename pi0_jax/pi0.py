"""π0 on one page: what is learned, and how it acts.

A policy is an objective on a network. The objective draws, for a batch of demonstrations, points between noise and
actions; the network says at each of them which way to go; the loss is how wrong it was. To act, a solver follows what
the network says from noise (t = 1) to actions (t = 0).

    objective = make_objective(policy.objective, policy.model)
    params    = init_params(objective, key)
    value, _  = loss(objective, params, batch, key)
    actions   = sample_actions(objective, params, observation, noise, SampleOptions(sampler=Euler(num_steps=10)))

`objective/gaussian.py` is the objective of the released weights, `model/layers.py` what the network is made of,
`sampler/` has the solvers, and `training/step.py` one update. Nothing here knows about training runs or robots.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.errors import UserError
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective import make_objective as make_objective
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
        params: of its network.
        batch: normalised examples; images uint8 or in [-1, 1].
        key: for noise, times, and whatever else is drawn.
        step: updates made so far; some objectives begin otherwise than they go on.
        teacher: parameters that the loss reads besides, where `objective.teacher` names some.

    Returns:
        The scalar loss, and metrics of the objective.
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

    Noise is an argument and not drawn here, because parity tests and servers both want to choose it.

    Args:
        objective: of `make_objective`.
        params: of its network, as trained or folded for sampling (`model.fold`).
        observation: images uint8 or in [-1, 1].
        noise: standard normal.
        options: sampler, guidance, and what is left of the chunk in execution.

    Returns:
        Normalised, padded actions, float32.

    Raises:
        UserError: options that do not suit what was learned.
    """
    return objective.sample(params, observation, noise, options)


def sample_path(
    objective: Objective,
    params: Params,
    observation: Observation,
    noise: Float[Array, "b ah ad"],
    options: SampleOptions,
) -> Float[Array, "n b ah ad"]:
    """The points that noise passes on its way to actions, from t = 1 to t = 0; arguments of `sample_actions`.

    Raises:
        UserError: what was learned is no flow, or the sampler no solver.
    """
    if objective.flow is None:
        raise UserError("action tokens are decoded, so there is no way from noise to actions to look at.")
    flow, project = objective.flow(params, observation, options)
    how: dict[str, Any] = {"features": options.features, "keys": options.keys, "project": project}
    return trajectory(flow, noise, solver_of(options.sampler), **how)


def sampling_options(policy: PolicyConfig) -> SampleOptions:
    """How a policy's configuration samples."""
    guidance = policy.guidance
    options = SampleOptions(policy.sampler, real_time=policy.real_time)
    return (
        options
        if guidance is None
        else options._replace(guidance_scale=guidance.scale, guidance_without=guidance.without)
    )
