"""Flow matching, diffusion and discretised actions on the tabletop, on one backbone, with one optimizer.

Run:     make compare, or make compare-quick for a small form
"""

import dataclasses

from configs.tabletop import config as base
from pi0_jax.compare.config import Changes, CompareConfig, Contender
from pi0_jax.config import Beta, Compact, Cosine, Gaussian, OptimalTransport, Reflow, Shortcut, Tokens, Uniform
from pi0_jax.config.replace import replace
from pi0_jax.sampler import Greedy
from pi0_jax.sampler.ddim import DDIM

model = base.policy.model
train = replace(
    base,
    {
        # All see quantile-normalised numbers, because the bins lie between the 1st and the 99th percentile.
        "policy.normalization": "quantile",
        # Runs are short, and a longer average would still hold weights of their beginning.
        "optim.ema_decay": 0.99,
        "num_steps": 400,
        "validate_every": 200,
    },
)
flow = Gaussian(time=Beta(1.5), draws=2)
# The published width of the compact head, 1024, has ten times the weights of this backbone.
compact = Compact(width=256)
modulated = dataclasses.replace(compact, conditioning="adaln", pooling="attention")
# Denoised actions are clipped to the quantiles, which are -1 and 1.
diffusion = {"DDIM": DDIM(clip=1.0), "DDPM": DDIM(eta=1.0, clip=1.0)}


def noising(predicts):
    return Contender(model, Gaussian(path=Cosine(), predicts=predicts, time=Uniform(), draws=2), samplers=diffusion)


def tokens(order, evaluations):
    return Contender(model, Tokens(dims=3, order=order), samplers={"Greedy": Greedy()}, evaluations=(evaluations,))


config = CompareConfig(
    train=train,
    env="tabletop",
    contenders={
        "flow": Contender(model, flow),
        # At this weight two thirds of the noises of a batch change places; at 0.1 none does.
        "flow-ot": Contender(model, dataclasses.replace(flow, coupling=OptimalTransport(condition_weight=0.02))),
        "reflow": Contender(model, Reflow(teacher="flow", draws=2)),
        "shortcut": Contender(model, Shortcut(time=Beta(1.5), draws=2), evaluations=(1, 2, 4, 10, 50)),
        "compact": Contender(replace(model, {"head": compact}), flow),
        "compact-adaln": Contender(replace(model, {"head": modulated}), flow),
        "diffusion-epsilon": noising("noise"),
        "diffusion-v": noising("v"),
        "bins": tokens("parallel", 1),
        "bins-sequence": tokens("autoregressive", 24),
    },
    # With fewer steps the policies ignore the language instruction: the backbone begins to follow it after about 1000.
    backbone=Gaussian(regression_draw=True),
    backbone_steps=2200,
    quick=Changes(
        seeds=(0,),
        backbone_steps=1400,
        num_steps=150,
        episodes=60,
        evaluations=(1, 10),
        contenders=("flow", "reflow", "diffusion-v", "bins"),
    ),
)
