"""Ways to follow a moving circle, and to act while the policy computes.

Run:     pi0 record data/chase --env tabletop_chase --episodes 1000
         pi0 record data/chase-validation --env tabletop_chase --episodes 60 --split validation
         pi0 compare configs/compare_chase.py --jobs 2
"""

from configs.compare_detour import config as base
from configs.compare_detour import contenders
from pi0_jax.config.replace import replace

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
ways = ("synchronous", "asynchronous", "ensemble", "guidance")
config = replace(config, {"contenders": contenders(config.train.policy.model, ways)})
