r"""π0 for DROID: joint velocities, ten steps, as openpi's released checkpoint `pi0_droid` has them.

    pi0 convert gs://openpi-assets/checkpoints/pi0_droid checkpoints/pi0_droid --robot droid_velocity --horizon 10 \
        --tokenizer paligemma_tokenizer.model
    pi0 serve checkpoints/pi0_droid
    pi0 train configs/pi0_droid.py --data.path data/mine        # a DROID set-up of your own, as LeRobot or RLDS

Hyperparameters are those of openpi's `pi05_droid_finetune`. For joint positions: `--policy.robot droid`.
"""

import dataclasses

from pi0_jax.config import OPENPI_AUGMENT, PI0, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(model=dataclasses.replace(PI0, action_horizon=10), robot="droid_velocity", execute_steps=8),
    optim=OptimConfig(decay_steps=30_000),
    augment=OPENPI_AUGMENT,
    init_from="checkpoints/pi0_droid",
    run_dir="runs/pi0_droid",
    batch_size=32,
    num_steps=20_000,
    keep_every=5000,
)
