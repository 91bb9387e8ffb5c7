r"""π0 on LIBERO, with openpi's hyperparameters (`pi0_libero` in its training/config.py).

    pi0 convert gs://openpi-assets/checkpoints/pi0_base checkpoints/pi0_base --horizon 50 \
        --tokenizer paligemma_tokenizer.model
    pi0 train configs/pi0_libero.py

Its dataset of four suites without idle frames is on the hub. openpi's own checkpoint `pi0_libero` learned changes of
the pose minus the pose, a slip that it keeps for the sake of that checkpoint; `--policy.robot` of this configuration
takes the changes as they are. To go on from it, set `action_semantics` to RELATIVE.
"""

from pi0_jax.config import OPENPI_AUGMENT, PI0, DataConfig, PolicyConfig, TrainConfig

RELATIVE = {"libero": (*["relative"] * 6, "gripper")}

config = TrainConfig(
    policy=PolicyConfig(model=PI0, robot="libero", execute_steps=10),
    augment=OPENPI_AUGMENT,
    data=DataConfig("hf://physical-intelligence/libero"),
    init_from="checkpoints/pi0_base",
    run_dir="runs/pi0_libero",
    batch_size=32,
    num_steps=30_000,
    keep_every=5000,
)
