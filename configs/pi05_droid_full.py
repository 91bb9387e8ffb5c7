r"""π0.5 on all of DROID from RLDS, joint positions, with openpi's hyperparameters (`pi05_full_droid_finetune`).

    pi0 convert gs://openpi-assets/checkpoints/pi05_base checkpoints/pi05_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi05_droid_full.py --data.path /data/droid/1.0.1

Batch 256 takes 8 large GPUs (`pi0 plan configs/pi05_droid_full.py --topology h100:8`). Failed attempts are
left out, by the path of their files. To leave out idle frames too, as openpi does, name its file of ranges:
`datasets=(DatasetConfig("/data/droid/1.0.1", sample_ranges="droid_sample_ranges_v1_0_1.json"),)` in place of the path.
"""

import dataclasses

from pi0_jax.config import OPENPI_AUGMENT, PI05, DataConfig, MeshConfig, OptimConfig, PolicyConfig, TrainConfig

config = TrainConfig(
    policy=PolicyConfig(
        model=dataclasses.replace(PI05, action_horizon=16), robot="droid", normalization="quantile", execute_steps=8
    ),
    optim=OptimConfig(peak_lr=5e-5, end_lr=5e-5, warmup_steps=1000, decay_steps=1_000_000),
    augment=OPENPI_AUGMENT,
    data=DataConfig(shuffle="shards"),
    mesh=MeshConfig(data=1, fsdp=-1),
    init_from="checkpoints/pi05_base",
    run_dir="runs/pi05_droid_full",
    batch_size=256,
    num_steps=100_000,
    log_every=100,
    save_every=5000,
    keep_every=10_000,
)
