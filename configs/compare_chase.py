"""Ways to follow a moving circle, and to act while the policy computes.

Run:     pi0 record data/chase --env tabletop_chase --episodes 1000
         pi0 record data/chase-validation --env tabletop_chase --episodes 60 --split validation
         pi0 compare configs/compare_chase.py --jobs 2
"""

from configs.compare_detour import config as base
from configs.compare_detour import contenders
from pi0_jax.compare.config import Contender
from pi0_jax.config import Gaussian
from pi0_jax.config.replace import replace
from pi0_jax.sampler import Euler

config = replace(
    base,
    {
        "train.policy.model.cameras": ("tool",),
        "train.data.path": "data/chase",
        "train.data.validation_path": "data/chase-validation",
        "env": "tabletop_chase",
        "env_options": {},
        "run_dir": "runs/compare-chase",
    },
)
ways = ("synchronous", "asynchronous", "ensemble", "guidance", "identity")
model = config.train.policy.model
# Trained to go on from the actions that are being executed. Where one answer is right, few steps are enough.
trained = Contender(
    model, Gaussian(draws=4, max_delay=3), samplers={"Euler": Euler(num_steps=2)}, evaluations=(1, 2), ways=("trained",)
)
config = replace(config, {"contenders": {**contenders(model, ways), "flow-rtc": trained}})
