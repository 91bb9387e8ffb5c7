"""Ways to learn a precise task: to lower the ring over a puck with millimetres of play.

Run:     pi0 record data/insertion --env tabletop_insertion --episodes 1000
         pi0 record data/insertion-validation --env tabletop_insertion --episodes 60 --split validation
         pi0 compare configs/compare_insertion.py --jobs 2
"""

from configs.compare_detour import config as base
from configs.compare_detour import contenders
from pi0_jax.config.replace import replace

# The camera on the tool sees how far off the ring is.
config = replace(
    base,
    {
        "train.policy.model.cameras": ("tool",),
        "train.data.path": "data/insertion",
        "train.data.validation_path": "data/insertion-validation",
        "env": "tabletop_insertion",
        "env_options": {},
        "run_dir": "runs/compare-insertion",
    },
)
config = replace(config, {"contenders": contenders(config.train.policy.model)})
