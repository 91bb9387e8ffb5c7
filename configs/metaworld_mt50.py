"""A π0 on Meta-World's MT50, or MT10, from scratch, for one GPU. Planned (docs/evaluation.md), not trained.

Run:     pi0 env install metaworld
         pi0 record data/mt50 --env metaworld --episodes 2500 --env-options image_size=96 tasks=mt50
         pi0 plan configs/metaworld_mt50.py --topology h100:1
         pi0 train configs/metaworld_mt50.py
         pi0 evaluate runs/mt50

MT10:    record and evaluate with tasks=mt10 (500 episodes); plan and train with
         --data.path data/mt10 --run-dir runs/mt10 --num-steps 10000
"""

from configs.metaworld_mt5 import config as base
from pi0_jax.config.replace import replace

config = replace(
    base,
    {
        "policy.model.vision.width": 256,
        "policy.model.vision.mlp_dim": 1024,
        "policy.model.vision.num_heads": 8,
        "policy.model.vision.depth": 6,
        "policy.model.vision.patch_size": 8,
        "policy.model.vision.stem_width": 64,
        "policy.model.language.width": 256,
        "policy.model.language.mlp_dim": 1024,
        "policy.model.action.width": 256,
        "policy.model.action.mlp_dim": 1024,
        "policy.model.depth": 6,
        "policy.model.num_heads": 8,
        "policy.model.num_kv_heads": 8,
        "policy.model.dtype": "bfloat16",
        "optim.peak_lr": 2e-3,
        "optim.end_lr": 2e-5,
        "optim.warmup_steps": 500,
        "optim.ema_decay": 0.9995,
        "data.path": "data/mt50",
        "run_dir": "runs/mt50",
        "batch_size": 256,
        "num_steps": 30_000,
        "validate_every": 2000,
        "save_every": 2000,
    },
)
