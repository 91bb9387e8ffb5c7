"""Ways to act while the policy computes, where two answers are right and only the chunk in execution tells which.

Run:     pi0 record data/swerve --env tabletop_swerve --episodes 1000
         pi0 record data/swerve-validation --env tabletop_swerve --episodes 60 --split validation
         pi0 compare configs/compare_swerve.py --jobs 2
"""

from configs.compare_detour import config as base
from configs.compare_detour import contenders
from pi0_jax.compare.config import Changes, Contender
from pi0_jax.config import Gaussian
from pi0_jax.config.replace import replace

config = replace(
    base,
    {
        "train.data.path": "data/swerve",
        "train.data.validation_path": "data/swerve-validation",
        "env": "tabletop_swerve",
        "run_dir": "runs/compare-swerve",
        "quick": Changes(seeds=(0,), num_steps=400, evaluations=(1, 10)),
    },
)
ways = ("synchronous", "asynchronous", "ensemble", "guidance", "identity")
model = config.train.policy.model
# Trained to go on from the actions that are being executed.
trained = Contender(model, Gaussian(draws=4, max_delay=3), evaluations=(10,), ways=("trained",))
few = {name: c for name, c in contenders(model, ways).items() if name in ("flow", "bins")}
config = replace(config, {"contenders": {**few, "flow-rtc": trained}})
