"""π0 on one page: what is learned, and how it acts.

A policy is an objective on a network. The objective draws, for a batch of demonstrations, points between noise and
actions; the network says at each of them which way to go; the loss is how wrong it was. To act, a solver follows what
the network says from noise (t = 1) to actions (t = 0); the paper's τ is 1 - t.

The network is a transformer with two sets of weights. The language expert (Gemma 2B) has the tokens of the observation,
image patches from SigLIP and the prompt; the smaller action expert has the robot's state and a token per action. In
each layer the tokens of an action attend to the observation's and to one another, and the observation's never to them.
So training is one pass over everything (`network.joint`), and sampling computes keys and values of the observation once
(`network.prefill`), against which each solver step runs the action expert alone (`network.velocity`).

    objective = make_objective(policy.objective, policy.model)
    params    = init_params(objective, key)
    value, _  = loss(objective, params, batch, key)
    actions   = sample_actions(objective, params, observation, noise, SampleOptions(sampler=Euler(num_steps=10)))

`objective/__init__.py` says what an `Objective` is, and `objective/gaussian.py` is that of the released weights;
`model/layers.py` has the network's layers; `sampler/` has the solvers; `training/step.py` is one update, which calls
draw and loss itself, for microbatches of the draws. Nothing here knows about training runs or robots.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int, Key

from pi0_jax.batch import Batch, Observation
from pi0_jax.config import PolicyConfig
from pi0_jax.errors import UserError
from pi0_jax.objective import Metrics, Objective, Params, SampleOptions
from pi0_jax.objective import make_objective as make_objective  # for users of this page
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
        params: of its network, as trained or folded for sampling (`model.fold`).
        observation: images uint8 or in [-1, 1].
        noise: standard normal; the caller draws it.
        options: sampler (10 Euler steps by default), guidance, and for real-time chunking the actions of the previous
            chunk that are not executed yet.

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
    """The steps + 1 points that noise passes on its way to actions, noise first; arguments of `sample_actions`.

    Raises:
        UserError: what was learned is no flow, or the sampler no solver.
    """
    if objective.flow is None:
        raise UserError("action tokens are decoded one by one: there is no path from noise to actions.")
    flow, project = objective.flow(params, observation, options)
    keywords: dict[str, Any] = {"features": options.features, "keys": options.keys, "project": project}
    return trajectory(flow, noise, solver_of(options.sampler), **keywords)


def sampling_options(policy: PolicyConfig) -> SampleOptions:
    """How a policy's configuration samples."""
    guidance = policy.guidance
    options = SampleOptions(policy.sampler, real_time=policy.real_time)
    if guidance is None:
        return options
    return options._replace(guidance_scale=guidance.scale, guidance_without=guidance.without)
