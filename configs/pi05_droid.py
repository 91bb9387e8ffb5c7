r"""π0.5 for a DROID set-up of your own, with openpi's hyperparameters (`pi05_droid_finetune` in its config.py).

    pi0 convert gs://openpi-assets/checkpoints/pi05_droid checkpoints/pi05_droid --robot droid_velocity --horizon 15 \
        --tokenizer paligemma_tokenizer.model
    pi0 serve checkpoints/pi05_droid
    pi0 train configs/pi05_droid.py --data.path data/mine       # LeRobot, as openpi's converter writes it, or RLDS

Actions are joint velocities, as in those weights. Keep their statistics: openpi's folder has them as
assets/droid/norm_stats.json, and `data.norm_stats` takes that file.
"""

import dataclasses

from pi0_jax.config import OPENPI_AUGMENT, PI05, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(
        model=dataclasses.replace(PI05, action_horizon=16),
        robot="droid_velocity",
        normalization="quantile",
        execute_steps=8,
    ),
    optim=OptimConfig(decay_steps=30_000),
    augment=OPENPI_AUGMENT,
    init_from="checkpoints/pi05_droid",
    run_dir="runs/pi05_droid",
    batch_size=32,
    num_steps=20_000,
    keep_every=5000,
)
