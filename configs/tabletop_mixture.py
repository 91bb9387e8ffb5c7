"""The tabletop's demonstrations from two datasets: half of them LeRobot, half RLDS under other names (docs/data.md).

Run:     python benchmarks/mixture.py data/tabletop data/tabletop-halves
         python train.py configs/tabletop_mixture.py
         pi0 evaluate runs/tabletop-mixture --episodes 200

The policy listens to the instruction only after some time at the mean velocity, which differs from seed to seed; with
the steps of `configs/tabletop.py` two of three seeds of this mixture had not begun to. So there are more of them here.
"""

import dataclasses
import runpy
from pathlib import Path

from pi0_jax.config import DatasetConfig

base = runpy.run_path(str(Path(__file__).with_name("tabletop.py")))["config"]
config = dataclasses.replace(
    base,
    data=dataclasses.replace(
        base.data,
        datasets=(
            DatasetConfig("data/tabletop-halves/lerobot", weight=0.5),
            DatasetConfig(
                "data/tabletop-halves/rlds",
                weight=0.5,
                robot="data/tabletop-halves/robot.py",
                stats="tabletop",  # the same robot under other names: one set of statistics
                keys={"observation.state": "observation/ring + observation/command"},
            ),
        ),
    ),
    flow=dataclasses.replace(base.flow, mean_steps=1600),
    num_steps=3400,
    run_dir="runs/tabletop-mixture",
)
