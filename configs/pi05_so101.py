r"""π0.5 on an SO-101, by LoRA, which fits a GPU of 24 GB (`pi0 plan configs/pi05_so101.py --topology rtx4090:1`).

    pi0 convert gs://openpi-assets/checkpoints/pi05_base checkpoints/pi05_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi05_so101.py --data.path data/mine

Neither openpi nor the released weights know this arm; the hyperparameters are openpi's for LoRA. Cameras of other names
than the robot's (`pi0_jax/data/robots/so100.py`): `pi0 data robot data/mine --output my_so101.py`, then
`--policy.robot my_so101.py`.
"""

from pi0_jax.config import OPENPI_AUGMENT, PI05, OptimConfig, PolicyConfig, TrainConfig, TuneConfig

config = TrainConfig(
    policy=PolicyConfig(model=PI05, robot="so101", normalization="quantile", execute_steps=25),
    optim=OptimConfig(decay_steps=30_000, ema_decay=None),
    tune=TuneConfig(recipe="lora"),
    augment=OPENPI_AUGMENT,
    init_from="checkpoints/pi05_base",
    run_dir="runs/pi05_so101",
    batch_size=32,
    num_steps=20_000,
    keep_every=5000,
)
