r"""π0 on a real ALOHA, with openpi's hyperparameters (`pi0_aloha_pen_uncap` in its training/config.py).

    pi0 convert gs://openpi-assets/checkpoints/pi0_base checkpoints/pi0_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi0_aloha.py --data.path data/mine

Joints and grippers are converted to the units of the weights (`pi0_jax/data/robots/aloha.py`). The released weights
were normalised by the statistics of such arms, which are better than those of a small dataset: openpi's folder has them
as assets/trossen/norm_stats.json, and `data.norm_stats` takes that file.
"""

from pi0_jax.config import OPENPI_AUGMENT, PI0, DataConfig, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(model=PI0, robot="aloha", execute_steps=25),
    optim=OptimConfig(decay_steps=30_000),
    augment=OPENPI_AUGMENT,
    data=DataConfig("hf://physical-intelligence/aloha_pen_uncap_diverse"),
    init_from="checkpoints/pi0_base",
    run_dir="runs/pi0_aloha",
    batch_size=32,
    num_steps=20_000,
    keep_every=5000,
)
