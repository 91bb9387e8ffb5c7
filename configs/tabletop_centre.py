"""The tabletop's policy, fine-tuned on three tasks that are new to it: to bring an object to the table's centre.

Run:     make demo                                           # the policy to start from, runs/tabletop
         pi0 record data/centre --env tabletop_centre --episodes 300
         pi0 record data/centre-validation --env tabletop_centre --episodes 30 --split validation
         pi0 train configs/tabletop_centre.py
         pi0 train configs/tabletop_centre.py --tune.recipe lora --run-dir runs/centre-lora
         pi0 evaluate runs/centre-lora --env tabletop_centre --episodes 200 --seed 1
"""

import dataclasses
import runpy
from pathlib import Path

from pi0_jax.config import TuneConfig

base = runpy.run_path(str(Path(__file__).with_name("tabletop.py")))["config"]
config = dataclasses.replace(
    base,
    flow=dataclasses.replace(base.flow, mean_steps=0),
    optim=dataclasses.replace(base.optim, peak_lr=1e-3, end_lr=1e-5, warmup_steps=40, ema_decay=0.99),
    tune=TuneConfig(lora_ranks=(8, 8)),
    data=dataclasses.replace(
        base.data,
        path="data/centre",
        validation_path="data/centre-validation",
        # The weights know state and actions in the units of their own demonstrations.
        norm_stats="runs/tabletop/checkpoints/2800/assets/norm_stats.json",
    ),
    init_from="runs/tabletop",
    run_dir="runs/centre",
    num_steps=400,
)
