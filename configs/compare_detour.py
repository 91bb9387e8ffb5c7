"""Ways to learn a task with two right answers, whose mean is wrong: to pass a pillar on the left or on the right.

Run:     pi0 record data/detour --env tabletop_detour --episodes 1000
         pi0 record data/detour-validation --env tabletop_detour --episodes 60 --split validation
         pi0 compare configs/compare_detour.py --jobs 2
"""

from configs.tabletop import config as base
from pi0_jax.compare.config import Changes, CompareConfig, Contender
from pi0_jax.config import Beta, Compact, Cosine, Gaussian, OptimalTransport, Reflow, Shortcut, Tokens, Uniform
from pi0_jax.config.replace import replace
from pi0_jax.sampler import Euler, Greedy
from pi0_jax.sampler.ddim import DDIM

# One camera and one sentence, always seen from the same side: the network is small, and learns in minutes.
train = replace(
    base,
    {
        "policy.model.cameras": ("top",),
        "policy.model.depth": 2,
        "policy.model.prompt_length": 10,
        "policy.normalization": "quantile",
        "policy.objective": Gaussian(draws=4),
        "augment.square_symmetries": False,
        "optim.ema_decay": 0.99,
        "data.path": "data/detour",
        "data.validation_path": "data/detour-validation",
        "num_steps": 1200,
        "validate_every": 1200,
    },
)


def contenders(model, ways=()):
    """The kinds of policies that are compared on each of the three tasks; `ways` are measured for flow matching."""
    plain = tuple(way for way in ways if way in ("synchronous", "asynchronous", "ensemble"))
    few = (1, 2, 4, 10)

    def diffusion(predicts):
        objective = Gaussian(path=Cosine(), predicts=predicts, time=Uniform(), draws=4)
        return Contender(model, objective, samplers={"DDIM": DDIM(clip=1.0)}, evaluations=few)

    return {
        "flow": Contender(model, Gaussian(draws=4), evaluations=few, ways=ways),
        # At t = 1 the noisy actions tell nothing: what is learned is the mean of the actions given the observation.
        "regression": Contender(
            model,
            Gaussian(predicts="data", time=Beta(1e6)),
            samplers={"Euler": Euler(num_steps=1)},
            evaluations=(1,),
            ways=plain,
        ),
        "bins": Contender(model, Tokens(dims=3), samplers={"Greedy": Greedy()}, evaluations=(1,), ways=plain),
        "diffusion-v": diffusion("v"),
        "diffusion-epsilon": diffusion("noise"),
        "flow-ot": Contender(
            model, Gaussian(draws=4, coupling=OptimalTransport(condition_weight=0.02)), evaluations=few
        ),
        # The published width of the compact head, 1024, has ten times the weights of this backbone.
        "compact": Contender(replace(model, {"head": Compact(width=256)}), Gaussian(draws=4), evaluations=few),
        "shortcut": Contender(model, Shortcut(draws=4), evaluations=few),
        "reflow": Contender(model, Reflow(teacher="flow", draws=4), evaluations=few),
    }


config = CompareConfig(
    train=train,
    env="tabletop_detour",
    # Two episodes of each layout tell whether a policy takes both ways from one start.
    env_options={"repeats": 2},
    contenders=contenders(train.policy.model),
    backbone=Gaussian(regression_draw=True),
    backbone_steps=300,
    episodes=200,
    run_dir="runs/compare-detour",
    quick=Changes(
        seeds=(0,), num_steps=400, evaluations=(1, 10), contenders=("flow", "regression", "bins", "diffusion-v")
    ),
)
