"""Reads the configurations that checkpoints of format version 1 hold (up to November 2026).

Then one string, `ModelConfig.prediction`, stood for path, target, loss, sampler and head together, and `FlowConfig` for
the rest of the objective; `upgrade` makes values of them.
"""

from __future__ import annotations

from typing import Any

Json = dict[str, Any]

SOLVERS = {"euler": "Euler", "midpoint": "Midpoint", "heun": "Heun", "rk4": "RK4", "ddim": "DDIM", "ddpm": "DDIM"}
COUPLINGS = {"independent": "Independent", "optimal": "OptimalTransport", "sinkhorn": "Sinkhorn"}


def upgrade(policy: Json, train: Json | None) -> tuple[Json, Json | None]:
    """A policy's and an experiment's JSON in the form of version 2.

    Args:
        policy: of `PolicyConfig`.
        train: of `TrainConfig` without its policy; None for converted weights.
    """
    policy = dict(policy)
    model = dict(policy["model"])
    flow = {} if train is None else dict(train.get("flow", {}))
    teacher = None if train is None else train.get("reflow_from")
    prediction, max_delay = model.pop("prediction", "velocity"), model.pop("max_delay", 0)
    compact, bins = model.pop("compact", {}), model.pop("bins", {})
    model["head"] = {"type": "Compact", **compact} if model.pop("head", "expert") == "compact" else {"type": "Expert"}
    model["remat"] = {True: "full", False: "none"}.get(model.get("remat", "full"), model.get("remat", "full"))
    policy["model"] = model
    policy["objective"] = _objective(prediction, flow, bins, max_delay, teacher)
    policy["sampler"] = _sampler(policy, prediction)
    scale, condition = policy.pop("guidance_scale", 1.0), policy.pop("guidance_without", "prompt")
    policy["guidance"] = None if scale == 1 else {"scale": scale, "without": condition}
    if train is None:
        return policy, None
    train = {name: value for name, value in train.items() if name not in ("flow", "reflow_from")}
    for old, new in RENAMED_FIELDS.items():
        if old in train:
            train[new] = train.pop(old)
    if train.get("data", {}).get("frames") == "once":
        train["data"] = train["data"] | {"frames": "auto"}
    return policy, train


RENAMED_FIELDS = {
    "parts": "grad_accum_steps",
    "skip_in_row": "max_consecutive_skips",
    "skip_in_total": "max_total_skips",
}


def _objective(prediction: str, flow: Json, bins: Json, max_delay: int, teacher: str | None) -> Json:
    common = {
        "dropout": {name: flow.get(f"drop_{name}", 0.0) for name in ("prompt", "images", "both")},
        "mask_padded_steps": flow.get("mask_padded_steps", True),
    }
    if prediction in ("bins", "bin_sequence"):
        order = "parallel" if prediction == "bins" else "autoregressive"
        return {"type": "Tokens", "order": order, "bins": bins.get("count", 256), "dims": bins.get("dims"), **common}
    times = {"beta": {"type": "Beta", "alpha": flow.get("beta_alpha", 1.5)}, "uniform": {"type": "Uniform"}}
    common |= {
        "time": times.get(flow.get("time", "beta"), {"type": "LogitNormal"}),
        "draws": flow.get("samples_per_observation", 1),
        "mask_padded_dims": flow.get("mask_padded_dims", False),
    }
    if prediction == "average_velocity":
        return {"type": "Shortcut", "bootstrap_fraction": flow.get("shortcut_share", 0.25), **common}
    if teacher is not None:
        return {"type": "Reflow", "teacher": teacher, "teacher_steps": flow.get("reflow_steps", 20), **common}
    coupling: Json = {"type": COUPLINGS[flow.get("coupling", "independent")]}
    if coupling["type"] != "Independent":
        coupling["condition_weight"] = flow.get("condition_weight", 1.0)
    diffusion = prediction in ("epsilon", "v")
    return {
        "type": "Gaussian",
        "path": {"type": "Cosine" if diffusion else "Straight"},
        "predicts": {"epsilon": "noise"}.get(prediction, prediction),
        "coupling": coupling,
        "regression_draw": flow.get("mean_draw", False),
        "regression_warmup_steps": flow.get("mean_steps", 0),
        "max_delay": max_delay,
        **common,
    }


def _sampler(policy: Json, prediction: str) -> Json:
    """Takes the solver's fields out of the policy."""
    solver, steps, power = policy.pop("solver", "euler"), policy.pop("num_steps", 10), policy.pop("grid_power", 1.0)
    if prediction in ("bins", "bin_sequence"):
        return {"type": "Greedy"}
    sampler: Json = {"type": SOLVERS[solver], "num_steps": steps, "grid_power": power}
    if sampler["type"] == "DDIM":
        clip = 1.0 if policy.get("normalization") == "quantile" else 3.0
        sampler |= {"eta": 1.0 if solver == "ddpm" else 0.0, "clip": clip}
    return sampler
