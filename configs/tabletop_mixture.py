"""The tabletop's demonstrations from two datasets: half of them LeRobot, half RLDS under other names (docs/data.md).

Run:     python benchmarks/mixture.py data/tabletop data/tabletop-halves
         python train.py configs/tabletop_mixture.py
         pi0 evaluate runs/tabletop-mixture --episodes 200

The policy follows the language instruction only after some time of regression warm-up, which differs from seed to seed;
with the steps of `configs/tabletop.py` two of three seeds of this mixture ignored it. So there are more of them here.
"""

from configs.tabletop import config as base
from pi0_jax.config import DatasetConfig
from pi0_jax.config.replace import replace

lerobot = DatasetConfig("data/tabletop-halves/lerobot", weight=0.5)
rlds = DatasetConfig(
    "data/tabletop-halves/rlds",
    weight=0.5,
    robot="data/tabletop-halves/robot.py",
    stats="tabletop",  # the same robot under other names: one set of statistics
    keys={"observation.state": "observation/ring + observation/command"},
)
config = replace(
    base,
    {
        "data.datasets": (lerobot, rlds),
        "policy.objective.regression_warmup_steps": 1600,
        "num_steps": 3400,
        "run_dir": "runs/tabletop-mixture",
    },
)
