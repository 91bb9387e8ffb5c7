"""One experiment."""

from __future__ import annotations

import dataclasses
from typing import Literal

from pi0_jax.config.data import AugmentConfig, DataConfig
from pi0_jax.config.mesh import HostsConfig, MeshConfig
from pi0_jax.config.optim import OptimConfig, TuneConfig
from pi0_jax.config.policy import PolicyConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """One experiment."""

    policy: PolicyConfig
    optim: OptimConfig = OptimConfig()
    tune: TuneConfig = TuneConfig()
    augment: AugmentConfig = AugmentConfig()
    data: DataConfig = DataConfig()
    mesh: MeshConfig = MeshConfig()
    hosts: HostsConfig = HostsConfig()
    run_dir: str = "runs/default"
    """Folder for checkpoints, metrics and logs. Refused if it holds a run, unless --resume or --overwrite."""
    resume: bool = False
    """Continue the run in `run_dir` from its last checkpoint."""
    overwrite: bool = False
    """Delete the run in `run_dir` and start anew."""
    init_from: str | None = None
    """Checkpoint whose weights the run starts from; None means random weights."""
    init_parts: tuple[str, ...] = ()
    """Beginnings of the parameter paths that are taken from `init_from`, such as `image_encoder`; the others start from
    random weights. Empty: all are taken."""
    seed: int = 0
    batch_size: int = 32
    """Observations per update, over all devices."""
    grad_accum_steps: int = 1
    """Microbatches that each device computes its examples in, one after another; divides activation memory by this.
    Losses and weights are those of one batch, within rounding."""
    num_steps: int = 30_000
    max_consecutive_skips: int = 5
    """Consecutive updates that are skipped, because their loss or gradient is NaN or infinite, before the run stops. A
    skipped update leaves weights, average and optimizer as they were. 0: the first one stops the run."""
    max_total_skips: int = 50
    """Skipped updates of the whole run before it stops."""
    compilation_cache: str | None = "default"
    """Folder where compiled programs are kept for the next run; default: `compiled` in PI0_CACHE, or in
    pi0_jax of XDG_CACHE_HOME or ~/.cache, unless JAX's own variables say otherwise; None: nowhere."""
    profile: str | None = None
    """START:STOP: writes a trace of the updates from START up to, and without, STOP to `profile` in the run's folder.
    Look at it with xprof."""
    log_every: int = 20
    tracker: Literal["wandb", "trackio"] | None = None
    """Draw losses and rates there too, besides TensorBoard's event files (pip install -e '.[wandb]' or '.[trackio]').
    A resumed run goes on in the same curves. The project is pi0_jax, or WANDB_PROJECT, TRACKIO_PROJECT."""
    validate_every: int = 500
    save_every: int = 1000
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of it are kept for good; None: none are."""
    keep_best: int = 0
    """Checkpoints kept besides, those with the lowest validation loss; `save_every` has to be a multiple of
    `validate_every`, so that it is known when one is saved."""
