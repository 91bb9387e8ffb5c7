"""A small π0 on the embedded tabletop, from scratch, on a CPU.

Run:     make demo, or python train.py configs/tabletop.py
"""

from pi0_jax.config import (
    AugmentConfig,
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
                width=96,
                depth=1,
                mlp_dim=192,
                num_heads=4,
                image_size=48,
                patch_size=12,
                stem_width=32,
                position="sincos2d",
            ),
            language=ExpertConfig(width=96, mlp_dim=192),
            action=ExpertConfig(width=96, mlp_dim=192),
            depth=3,
            num_heads=4,
            num_kv_heads=4,
            head_dim=24,
            vocab_size=512,
            cameras=("top", "tool"),
            action_dim=6,
            action_horizon=8,
            prompt_length=14,
            dtype="float32",
            remat="none",
        ),
        robot="tabletop",
        objective=Gaussian(time=Beta(2.5), draws=3, regression_draw=True, regression_warmup_steps=1000),
    ),
    optim=OptimConfig(name="muon", peak_lr=4e-3, end_lr=4e-5, warmup_steps=100, weight_decay=1e-4, ema_decay=0.998),
    augment=AugmentConfig(square_symmetries=True),
    data=DataConfig(path="data/tabletop", validation_path="data/tabletop-validation"),
    run_dir="runs/tabletop",
    batch_size=32,
    num_steps=2800,
    validate_every=500,
    save_every=500,
)
