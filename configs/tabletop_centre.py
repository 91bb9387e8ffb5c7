"""The tabletop's policy, fine-tuned on three tasks that are new to it: to bring an object to the table's centre.

Run:     make demo                                           # the policy to start from, runs/tabletop
         pi0 record data/centre --env tabletop_centre --episodes 300
         pi0 record data/centre-validation --env tabletop_centre --episodes 30 --split validation
         pi0 train configs/tabletop_centre.py
         pi0 train configs/tabletop_centre.py --tune.recipe lora --run-dir runs/centre-lora
         pi0 evaluate runs/centre-lora --env tabletop_centre --episodes 200 --seed 1
"""

from configs.tabletop import config as base
from pi0_jax.config.replace import replace

config = replace(
    base,
    {
        "policy.objective.regression_warmup_steps": 0,
        "optim.peak_lr": 1e-3,
        "optim.end_lr": 1e-5,
        "optim.warmup_steps": 40,
        "optim.ema_decay": 0.99,
        "tune.lora_ranks": (8, 8),
        "data.path": "data/centre",
        "data.validation_path": "data/centre-validation",
        # The weights know state and actions in the units of their own demonstrations.
        "data.norm_stats": "runs/tabletop/checkpoints/2800/assets/norm_stats.json",
        "init_from": "runs/tabletop",
        "run_dir": "runs/centre",
        "num_steps": 400,
    },
)
