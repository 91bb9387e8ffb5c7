"""Every knob of the project, as frozen dataclasses.

Two layers: `PolicyConfig` is what a robot needs and travels inside each checkpoint; `TrainConfig` is one experiment
and holds it. Files in `configs/` build a `TrainConfig`; the command line overrides any field by its dotted name. Where
there is a choice of kinds (objective, path, time distribution, coupling, sampler, head), the kind is a class, and the
fields are those that it has. Defaults are those of the released π0 weights unless a comment says otherwise.
"""

# ruff: noqa: F401
from pi0_jax.config.data import OPENPI_AUGMENT, AugmentConfig, DataConfig, DatasetConfig
from pi0_jax.config.mesh import HostsConfig, MeshConfig
from pi0_jax.config.model import PI0, PI05, Compact, Expert, ExpertConfig, Head, ModelConfig, VisionConfig
from pi0_jax.config.objective import (
    Autoregressive,
    Condition,
    ConditionDropout,
    Fast,
    Gaussian,
    Joint,
    ObjectiveConfig,
    Reflow,
    Shortcut,
    Tokens,
)
from pi0_jax.config.optim import OptimConfig, TuneConfig
from pi0_jax.config.policy import Guidance, PolicyConfig, RealTimeConfig
from pi0_jax.config.run import TrainConfig
from pi0_jax.flow.coupling import Independent, OptimalTransport, Sinkhorn
from pi0_jax.flow.path import Cosine, Straight
from pi0_jax.flow.time import Beta, LogitNormal, Uniform
