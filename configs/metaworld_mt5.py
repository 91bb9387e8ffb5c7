"""A small π0 on five tasks of Meta-World's MT10, from scratch, on a CPU (success and time: docs/evaluation.md).

Run:     pi0 env install metaworld
         pi0 record data/mt5 --env metaworld --episodes 250 --env-options image_size=96 \
             tasks=reach,door-open,drawer-close,button-press-topdown,window-open
         pi0 train configs/metaworld_mt5.py
         pi0 evaluate runs/mt5                     # in the simulator, and by the options, of data/mt5
"""

from pi0_jax.config import (
    Beta,
    DataConfig,
    ExpertConfig,
    Gaussian,
    ModelConfig,
    OptimConfig,
    PolicyConfig,
    TrainConfig,
    VisionConfig,
)

config = TrainConfig(
    policy=PolicyConfig(
        model=ModelConfig(
            vision=VisionConfig(
                width=128,
                depth=2,
                mlp_dim=256,
                num_heads=4,
                image_size=96,
                patch_size=16,
                stem_width=32,
                position="sincos2d",
            ),
            language=ExpertConfig(width=128, mlp_dim=256),
            action=ExpertConfig(width=128, mlp_dim=256),
            depth=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=32,
            vocab_size=512,
            cameras=("base_0_rgb",),
            action_dim=4,
            action_horizon=16,
            prompt_length=24,
            dtype="float32",
            remat="none",
        ),
        robot="metaworld",
        objective=Gaussian(time=Beta(2.5), draws=3, regression_draw=True, regression_warmup_steps=700),
        execute_steps=8,
    ),
    optim=OptimConfig(name="muon", peak_lr=4e-3, end_lr=4e-5, warmup_steps=100, weight_decay=1e-4, ema_decay=0.998),
    data=DataConfig(path="data/mt5", validation_share=0.04),
    run_dir="runs/mt5",
    batch_size=32,
    num_steps=4500,
    validate_every=500,
    save_every=500,
)
