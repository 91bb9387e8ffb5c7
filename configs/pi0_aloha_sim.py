r"""π0 on ALOHA in simulation, with openpi's hyperparameters (`pi0_aloha_sim` in its training/config.py).

    pi0 convert gs://openpi-assets/checkpoints/pi0_base checkpoints/pi0_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi0_aloha_sim.py

One camera, no conversion of joints, targets as they are.
"""

from pi0_jax.config import OPENPI_AUGMENT, PI0, DataConfig, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(model=PI0, robot="aloha_sim", execute_steps=10),
    optim=OptimConfig(decay_steps=30_000),
    augment=OPENPI_AUGMENT,
    data=DataConfig("hf://lerobot/aloha_sim_transfer_cube_human"),
    init_from="checkpoints/pi0_base",
    run_dir="runs/pi0_aloha_sim",
    batch_size=32,
    num_steps=20_000,
    keep_every=5000,
)
