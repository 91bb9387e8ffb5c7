r"""π0.5 on LIBERO, with openpi's hyperparameters (`pi05_libero` in its training/config.py). The state is not read.

    pi0 convert gs://openpi-assets/checkpoints/pi05_base checkpoints/pi05_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi05_libero.py

openpi's finished one, to serve as it is, needs to be told the same:

    pi0 convert gs://openpi-assets/checkpoints/pi05_libero checkpoints/pi05_libero --robot libero --horizon 10 \
        --state-in-prompt False --tokenizer paligemma_tokenizer.model

Batch 256 takes 8 large GPUs (`pi0 plan configs/pi05_libero.py --topology h100:8`).
"""

import dataclasses

from pi0_jax.config import OPENPI_AUGMENT, PI05, DataConfig, MeshConfig, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(
        model=dataclasses.replace(PI05, action_horizon=10),
        robot="libero",
        normalization="quantile",
        state_in_prompt=False,
        execute_steps=5,
    ),
    optim=OptimConfig(peak_lr=5e-5, end_lr=5e-5, warmup_steps=10_000, decay_steps=1_000_000, ema_decay=0.999),
    augment=OPENPI_AUGMENT,
    data=DataConfig("hf://physical-intelligence/libero"),
    mesh=MeshConfig(data=1, fsdp=-1),
    init_from="checkpoints/pi05_base",
    run_dir="runs/pi05_libero",
    batch_size=256,
    num_steps=30_000,
    keep_every=5000,
)
