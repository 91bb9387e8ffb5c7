"""Flow matching, diffusion and discretised actions on the tabletop, on one backbone, with one optimizer.

Run:     make compare, or make compare-quick for a small form
"""

import dataclasses
import runpy
from pathlib import Path

from pi0_jax.compare.config import Changes, CompareConfig, Contender
from pi0_jax.config import BinConfig, CompactConfig, FlowConfig

base = runpy.run_path(str(Path(__file__).with_name("tabletop.py")))["config"]
model = base.policy.model
# All see quantile-normalised numbers, because the bins lie between the 1st and the 99th percentile.
train = dataclasses.replace(
    base,
    policy=dataclasses.replace(base.policy, normalization="quantile"),
    flow=FlowConfig(),
    # Runs are short, and a longer average would still hold weights of their beginning.
    optim=dataclasses.replace(base.optim, ema_decay=0.99),
    num_steps=400,
    validate_every=200,
)
flow = FlowConfig(beta_alpha=1.5, samples_per_observation=2)
# The published width of the compact head, 1024, has ten times the weights of this backbone.
compact = CompactConfig(width=256)
bins = BinConfig(count=256, dims=3)


def predicting(kind, **changes):
    return dataclasses.replace(model, prediction=kind, **changes)


config = CompareConfig(
    train=train,
    env="tabletop",
    contenders={
        "flow": Contender(model, flow),
        # At this weight two thirds of the noises of a batch change places; at 0.1 none does.
        "flow-ot": Contender(model, dataclasses.replace(flow, coupling="optimal", condition_weight=0.02)),
        "reflow": Contender(model, dataclasses.replace(flow, time="uniform"), teacher="flow"),
        "shortcut": Contender(predicting("average_velocity"), flow, evaluations=(1, 2, 4, 10, 50)),
        "compact": Contender(dataclasses.replace(model, head="compact", compact=compact), flow),
        "compact-adaln": Contender(
            dataclasses.replace(
                model, head="compact", compact=dataclasses.replace(compact, conditioning="adaln", pooling="attention")
            ),
            flow,
        ),
        "diffusion-epsilon": Contender(
            predicting("epsilon"), dataclasses.replace(flow, time="uniform"), solvers=("ddim", "ddpm")
        ),
        "diffusion-v": Contender(predicting("v"), dataclasses.replace(flow, time="uniform"), solvers=("ddim", "ddpm")),
        "bins": Contender(predicting("bins", bins=bins), FlowConfig(), solvers=("argmax",), evaluations=(1,)),
        "bins-sequence": Contender(
            predicting("bin_sequence", bins=bins), FlowConfig(), solvers=("argmax",), evaluations=(24,)
        ),
    },
    # Fewer steps leave the backbone deaf to the instruction: it begins to listen after about 1000.
    backbone=FlowConfig(mean_draw=True),
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
