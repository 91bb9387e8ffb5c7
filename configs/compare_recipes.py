"""What action tokens, knowledge insulation, subtasks and image-text pairs do for following an instruction.

Run:     pi0 record data/stages --env tabletop_stages --episodes 5000
         pi0 record data/stages-few --env tabletop_stages --episodes 200
         pi0 record data/stages-validation --env tabletop_stages --episodes 60 --split validation
         pi0 record data/stages-questions --env tabletop_stages --questions 1000 --seed 1
         pi0 compare configs/compare_recipes.py --jobs 2
"""

import dataclasses

from configs.tabletop import config as base
from pi0_jax.compare.config import Changes, CompareConfig, Contender
from pi0_jax.config import Autoregressive, DatasetConfig, ExpertConfig, Fast, Gaussian, Joint
from pi0_jax.config.replace import replace
from pi0_jax.sampler import Euler, Greedy, Sampler

UPDATES, EVERY = 1600, 200

train = replace(
    base,
    {
        # The picture from the ring shows all there is to know, so prompts are words alone.
        "policy.model.variant": "pi05",
        "policy.model.cameras": ("tool",),
        "policy.model.depth": 2,
        "policy.model.action": ExpertConfig(width=64, mlp_dim=128),
        "policy.model.vocab_size": 896,
        "policy.model.prompt_length": 18,
        "policy.state_in_prompt": False,
        "policy.normalization": "quantile",
        "policy.objective": Gaussian(draws=2),
        "augment.square_symmetries": False,
        "optim.ema_decay": 0.99,
        "data.codes": 384,
        "data.path": "data/stages",
        "data.validation_path": "data/stages-validation",
        "num_steps": UPDATES,
        "validate_every": UPDATES,
    },
)
model = train.policy.model
language = dataclasses.replace(model, variant="pi0_fast")
codec = Fast(skip=0, max_tokens=30)
flow = Gaussian(draws=2)
joint = Joint(flow=flow, codec=codec, text_tokens=6)
regression = dataclasses.replace(flow, regression_draw=True)
answers = Joint(flow=regression, codec=None, text_tokens=6, insulate=False, flow_weight=10.0)
subtasks = {"data.datasets": (DatasetConfig("data/stages", prompt_from="predict"),), "policy.subtask_every": 1}
few = DatasetConfig("data/stages-few", weight=0.75)
pairs = DatasetConfig("data/stages-questions", weight=0.25)


def contender(objective, changes=None, model=model, sampler: Sampler = Euler()):
    return Contender(model, objective, {"default": sampler}, evaluations=(10,), changes=changes or {})


config = CompareConfig(
    train=train,
    env="tabletop_stages",
    contenders={
        "flow": contender(flow),
        "joint": contender(joint),
        "joint-open": contender(dataclasses.replace(joint, insulate=False, flow_weight=10.0)),  # as π0.5
        "tokens": contender(Autoregressive(codec=codec), model=language, sampler=Greedy()),
        "joint-subtasks": contender(joint, subtasks),
        "flow-regression": contender(regression),
        "flow-subtasks": contender(answers, subtasks),
        "few": contender(answers, {"data.datasets": (few,)}),
        "few-pairs": contender(answers, {"data.datasets": (few, pairs)}),
    },
    backbone=None,
    episodes=60,
    measure_every=EVERY,
    control=False,
    run_dir="runs/compare-recipes",
    quick=Changes(seeds=(0,)),
)
