"""Every knob of the project, as frozen dataclasses. No behaviour, and no imports of ours.

Two layers: `PolicyConfig` is what a robot needs and travels inside each checkpoint; `TrainConfig` is one experiment
and holds it. Files in `configs/` build a `TrainConfig`; the command line overrides any field by its dotted name.
Defaults are those of the released π0 weights unless a comment says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """SigLIP image encoder; the defaults are So400m/14 at 224 px (Zhai et al. 2023, arXiv 2303.15343)."""

    width: int = 1152
    depth: int = 27
    mlp_dim: int = 4304
    num_heads: int = 16
    image_size: int = 224
    """Side of the square input image, pixels."""
    patch_size: int = 14
    """Side of the image patch that becomes one token, pixels (with a stem: of the whole stack of convolutions)."""
    stem_width: int = 0
    """Channels of a convolution before the patch embedding (Xiao et al. 2021, arXiv 2106.14881); 0 means none, as in
    the released weights. Small encoders trained from scratch learn faster with one."""
    stem_stride: int = 4
    """Kernel size and stride of that convolution, pixels; divides `patch_size`."""
    position: Literal["learned", "sincos2d"] = "learned"
    """Position embedding: learned (released weights) or fixed two-dimensional sine and cosine."""


@dataclasses.dataclass(frozen=True)
class ExpertConfig:
    """One set of Gemma weights. Experts differ in width; depth and attention heads are shared (`ModelConfig`)."""

    width: int
    mlp_dim: int
    lora_attn_rank: int = 0
    """Rank of the low-rank adapters of the attention weights, one a head (`model.lora`); 0 means none."""
    lora_mlp_rank: int = 0
    """Rank of those of the feed-forward weights."""
    lora_scale: float = 1.0
    """Factor of attention's adapters, alpha / rank. Feed-forward adapters have none, as in openpi."""


@dataclasses.dataclass(frozen=True)
class CompactConfig:
    """The compact head: an MLP from the pooled observation, the noisy chunk and the time."""

    width: int = 1024
    depth: int = 3
    """Hidden layers."""
    time_width: int = 256
    """Width of the time embedding, sine and cosine, before its linear layer and SiLU."""
    pooling: Literal["last", "mean", "attention"] = "last"
    """How the backbone's tokens become one vector: the last valid one, their mean, or a learned query's attention."""
    conditioning: Literal["concat", "adaln"] = "concat"
    """concat: observation and time go in beside the chunk. adaln: they scale, shift and gate every layer."""


@dataclasses.dataclass(frozen=True)
class BinConfig:
    """Discretised actions."""

    count: int = 256
    """Bins in each dimension, uniform between its 1st and 99th percentile."""
    dims: int | None = None
    """Action dimensions that are predicted, the first ones; None: all, padding included."""


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The velocity network: image encoder, language expert, action expert."""

    variant: Literal["pi0", "pi05", "pi0_fast"] = "pi0"
    """pi0: a state token, and the time mixed into the action tokens by an MLP (arXiv 2410.24164).
    pi05: the state is part of the prompt, the time modulates the action expert's norms (arXiv 2504.16054).
    pi0_fast: image encoder and language expert alone (arXiv 2501.09747); weights that convert, but do not run yet."""
    head: Literal["expert", "compact"] = "expert"
    """expert: π0's action expert. compact: a small MLP on the pooled observation, `compact`."""
    prediction: Literal["velocity", "average_velocity", "epsilon", "v", "bins", "bin_sequence"] = "velocity"
    """What the network gives, and with it the objective and the sampler: velocity, flow matching; average_velocity,
    a shortcut model for few steps; epsilon and v, denoising diffusion; bins, discretised actions all at once, and
    bin_sequence, one after another."""
    vision: VisionConfig = VisionConfig()
    language: ExpertConfig = ExpertConfig(width=2048, mlp_dim=16_384)
    """Gemma 2B, which reads images and text."""
    action: ExpertConfig = ExpertConfig(width=1024, mlp_dim=4096)
    """The 300M action expert."""
    depth: int = 18
    num_heads: int = 8
    num_kv_heads: int = 1
    head_dim: int = 256
    vocab_size: int = 257_152
    cameras: tuple[str, ...] = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    """Cameras in token order. A camera that is not listed is never computed."""
    action_dim: int = 32
    """Width of state and action vectors inside the model; a robot's own are zero-padded to it."""
    action_horizon: int = 50
    """Actions in one chunk."""
    prompt_length: int = 48
    """Tokens the prompt is padded or cut to (the π0.5 release: 200)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Activations. Parameters, statistics of norms, softmax, RoPE and time embedding are float32 regardless."""
    max_delay: int = 0
    """Training-time real-time chunking (arXiv 2512.05964): the network learns to go on from a prefix of up to so many
    clean actions, whose number is drawn uniformly from 0 to this for each draw. 0: no such training. Velocity networks
    with an action expert only."""
    compact: CompactConfig = CompactConfig()
    bins: BinConfig = BinConfig()
    remat: Literal["full", "gate_up", "matmuls", "none"] = "full"
    """What the backward pass computes again instead of storing it. full: each layer, from its input; least memory, 1.23
    times the compute. gate_up: the wide half of the feed-forward, and norms. matmuls: norms and other cheap parts.
    none: nothing."""
    attention: Literal["xla", "cudnn"] = "xla"
    """Kernel of attention among image patches and among the prefix's tokens, in training and inference. cudnn: fused,
    for NVIDIA GPUs (heads of 256: Hopper and later) and bfloat16; elsewhere it is xla. The numbers are the same within
    bfloat16's rounding."""


PI0 = ModelConfig()
PI05 = ModelConfig(variant="pi05", prompt_length=200)


@dataclasses.dataclass(frozen=True)
class RealTimeConfig:
    """How a chunk is made to go on where the previous one leads, for policies that act while they compute."""

    method: Literal["guidance", "identity", "trained"] = "guidance"
    """guidance: real-time chunking as in arXiv 2506.07339, by the vector-Jacobian product through the network.
    identity: LeRobot's variant without that product. trained: the network was trained for it (`ModelConfig.max_delay`),
    and goes on from the actions that are certain without any guidance."""
    schedule: Literal["exp", "linear", "ones", "zeros"] = "exp"
    """Weights of the previous actions that are not certain (`flow.guidance.prefix_weights`). LeRobot: linear."""
    max_guidance: float = 5.0
    """Bound of the guidance. LeRobot: 10."""


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """What it takes to turn a raw observation into raw actions, besides weights, statistics and tokenizer."""

    model: ModelConfig = PI0
    robot: str = "tabletop"
    """Name of the robot in `pi0_jax.data.robots`: its cameras, its state and action dimensions."""
    action_semantics: dict[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    """For robots by name, what each action dimension means (`data.robots.SEMANTICS`), where it is not what the robot
    declares. A checkpoint keeps the meaning that it was trained with beside its statistics."""
    normalization: Literal["zscore", "quantile"] = "zscore"
    """zscore: mean and standard deviation (π0). quantile: 1 % and 99 % quantiles to [-1, 1] (π0.5)."""
    solver: Literal["euler", "midpoint", "heun", "rk4", "ddim", "ddpm"] = "euler"
    """From noise to actions: the first four integrate a flow, ddim and ddpm run a diffusion backwards. Discretised
    actions need none."""
    num_steps: int = 10
    """Solver steps from noise to actions."""
    grid_power: float = 1.0
    """Times of the steps are (1 - i / num_steps) to this power: above 1 more of them are near the data."""
    guidance_scale: float = 1.0
    """Classifier-free guidance: 1 is none, and costs nothing; other values evaluate the network with and without the
    condition. The weights have to be trained with `FlowConfig.drop_prompt`, `drop_images` or `drop_both`."""
    guidance_without: Literal["prompt", "images", "both"] = "prompt"
    """What the unguided half is not told."""
    execute_steps: int = 4
    """Actions of each chunk that are executed before the policy is asked again."""
    real_time: RealTimeConfig = RealTimeConfig()
    """Used where a chunk is asked for with what is left of the previous one."""


@dataclasses.dataclass(frozen=True)
class FlowConfig:
    """The training objective."""

    time: Literal["beta", "uniform", "logit_normal"] = "beta"
    """Distribution of the flow time; beta is π0's, Beta(alpha, 1) shifted by 0.001."""
    beta_alpha: float = 1.5
    """Larger values train more at noisy times, where the instruction has to decide between ways to act: less noisy
    chunks give that away. 1 is uniform."""
    samples_per_observation: int = 1
    """Draws of (noise, time) for each observation in a step; they share the prefix, so more draws cost little."""
    mean_draw: bool = False
    """Make one of the draws (x, t) = (0, 1) instead of a random one. There x is all noise and says nothing about the
    actions, so the velocity is x minus their conditional mean, for any x; at x = 0 the network sees that mean without
    the noise."""
    mean_steps: int = 0
    """Train on that draw alone for so many steps at first. A network that starts from random weights has to find out
    which object the instruction means, and noisy actions among its inputs hide that for long."""
    coupling: Literal["independent", "optimal", "sinkhorn"] = "independent"
    """Which noise goes with which actions of a batch: any; or by minibatch optimal transport, exact or entropic."""
    condition_weight: float = 1.0
    """Cost of pairing noise with the actions of another observation, for each unit of squared distance between state,
    prompt and images, beside the mean squared difference of noise and actions. At 0 the coupling is the plain one,
    which biases the actions given the observation."""
    drop_prompt: float = 0.0
    drop_images: float = 0.0
    drop_both: float = 0.0
    """Shares of examples that are trained without the prompt, the images, or both, for classifier-free guidance. What
    is dropped is masked, so that no token attends to it: that is the null condition. The state stays (π0.5 has it in
    the prompt)."""
    shortcut_share: float = 0.25
    """Share of examples that teach a shortcut model to make one step of two; the rest teach the velocity."""
    reflow_steps: int = 20
    """Euler steps in which the teacher makes actions from noise, where `TrainConfig.reflow_from` names one."""
    mask_padded_steps: bool = True
    """Leave steps after the episode's end out of the loss. openpi counts them: set False to match it."""
    mask_padded_dims: bool = False
    """Leave zero-padded action dimensions out of the loss. The released weights were trained with them in it."""


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Optimizer and learning-rate schedule: linear warm-up, then cosine decay."""

    name: Literal["adamw", "adamw_8bit", "adafactor", "muon"] = "adamw"
    """adamw_8bit: both moments in blocks of 8-bit codes (Dettmers et al. 2022). adafactor: the second moment as rows
    and columns (Shazeer & Stern 2018), without scaling by the parameters' size. muon: orthogonalised momentum for
    hidden matrices (Jordan et al. 2024), Adam for the rest."""
    peak_lr: float = 2.5e-5
    end_lr: float = 2.5e-6
    warmup_steps: int = 1000
    decay_steps: int | None = None
    """Step at which the rate reaches `end_lr`, counted from step 0; None means the last step of the run."""
    b1: float = 0.9
    """Decay of the first moment. Under adafactor 0 means that there is none, which saves its memory."""
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 1e-10
    moment_dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the first moment (muon: of its momentum and of Adam's first moment); adamw_8bit has its own form."""
    clip_norm: float = 1.0
    """Largest global norm of the gradient."""
    ema_decay: float | None = 0.99
    """Exponential moving average of the weights, which is what inference uses; None turns it off."""
    ema_dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16 is rounded at random, up or down in proportion, so that steps too small for it still add up."""


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Which parameters are trained.

    The others are frozen: they are stored in bfloat16, have no gradient, no optimizer state and no moving average, and
    stay what they are, bit for bit. Patterns are of parameter paths, and * stands for anything:
    "backbone/layers/language/*", "*/attn/*", "*norm*".
    """

    recipe: Literal["full", "expert", "vision_frozen", "lora"] = "full"
    """full: all. expert: the action expert, or whichever head, and the projections around it; image encoder and
    language expert are frozen. vision_frozen: all but the image encoder. lora: adapters of both experts, and what is
    not of the experts, as in openpi; their weights, norms and the embedding are frozen. Adapters are trained under any
    recipe."""
    lora_ranks: tuple[int, int] = (16, 32)
    """Under the recipe lora, ranks of the adapters that the language and the action expert get if the model has none,
    for attention and feed-forward alike; 0: that expert has none, and is trained. For adapters on chosen parts let the
    model name them (`--policy.model.action.lora-attn-rank 8`): then it gets no others, and only the weights of experts
    with adapters are frozen."""
    frozen: tuple[str, ...] = ()
    """Patterns of what is frozen besides."""
    trained: tuple[str, ...] = ()
    """Patterns of what is trained whatever the two above say."""


@dataclasses.dataclass(frozen=True)
class AugmentConfig:
    """Random changes to a training batch, made on the device. All off by default."""

    crop: float = 1.0
    """Side of a random crop as a share of the image, resized back (openpi: 0.95, all but wrist cameras)."""
    rotate_degrees: float = 0.0
    """Largest rotation of the image, degrees (openpi: 5, all but wrist cameras)."""
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    """Largest relative change of each (openpi: 0.3, 0.4, 0.5, all cameras)."""
    fixed_cameras: tuple[str, ...] = ()
    """Cameras that crop and rotation leave alone, because they move with the hand."""
    square_symmetries: bool = False
    """Turn or mirror images, state and actions together by one of the square's eight symmetries. Valid only with
    straight-down cameras and no left or right in the language; needs a robot that names its planar axes."""


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture."""

    path: str
    """Folder of a LeRobot dataset (2.0, 2.1 or 3.0) or of an RLDS dataset; or hf://owner/name for one on the hub."""
    weight: float | None = None
    """Share of the samples, relative to the other weights; None for all datasets: each by its number of frames."""
    robot: str | None = None
    """Name of its robot; None: `policy.robot`."""
    stats: str | None = None
    """Datasets of one name here are normalised by their common statistics; None: the robot's name. A policy normalises
    by the statistics that are called like its robot."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """The robot's name of a feature → the dataset's; "a + b" puts two side by side."""
    preset: Literal["droid", "droid_velocity", "bridge", "fractal"] | None = None
    """Published RLDS dataset whose keys, rate and instruction are known (`data.rlds.PRESETS`)."""
    without_episodes: tuple[int, ...] = ()
    """Episodes of a LeRobot dataset to leave out, by their `episode_index`."""
    split: str = "train"
    """Split of an RLDS dataset."""
    task: str | None = None
    """Feature of an RLDS dataset with the instruction; None: the preset's, or language_instruction."""
    fps: float | None = None
    """Frames per second of an RLDS dataset, which does not store it; None: the preset's, or the robot's."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where demonstrations come from and how they are read."""

    path: str = "data/tabletop"
    """Folder of a LeRobot or RLDS dataset of `policy.robot`; not used where `datasets` names some."""
    validation_path: str | None = None
    """Folder of held-out demonstrations for the validation loss; None skips it, unless `validation_share` says more."""
    datasets: tuple[DatasetConfig, ...] = ()
    """A mixture of datasets."""
    validation_share: float = 0.0
    """Share of the episodes that is held out for the validation loss, by a hash of their states and actions: copies of
    an episode are on the same side."""
    norm_stats: str | None = None
    """File of statistics (`pi0 data stats`, or openpi's norm_stats.json); None: computed from the demonstrations."""
    frames: Literal["once", "random"] = "once"
    """once: video is decoded at its first use, uncompressed, into the dataset's folder. random: frames are decoded when
    they are needed, which takes no room."""
    cache: str | None = None
    """Folder that `pi0 data cache` made, with frames at the model's resolution; None: `frames` says where they are."""
    shuffle: Literal["frames", "shards"] = "frames"
    """frames: all frames in random order. shards: files in random order, and frames at random within a few files at a
    time, for datasets on disks that are slow to jump."""
    shuffle_window: int = 8
    """Files whose frames are mixed where `shuffle` is shards."""
    skip_bad_episodes: bool = False
    """Leave out episodes that cannot be read, and log them, instead of stopping."""
    num_workers: int = 0
    """Processes that prepare batches; 0: threads of the training process alone."""
    num_threads: int = 2
    """Reader threads, in each process."""
    prefetch: int = 8
    """Batches prepared ahead, in each process."""
    prompt_buckets: tuple[int, ...] = ()
    """Lengths, ascending, of which a batch's prompts are padded to the first that holds all of them, in place of
    `prompt_length`. Losses are the same within rounding; each length is a program of its own, compiled when it is met
    first. Empty: always `prompt_length`."""
    offline: bool = False
    """Never ask the network. Only datasets given as hf://owner/name do so, and are then taken from the hub's cache."""
    tokenizer: str | None = None
    """SentencePiece model file (PaliGemma's for released weights); None trains a small one on the instructions."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged; -1 takes all that remain. configs/sharding/ has the usual ways."""

    data: int = -1
    """Replicas of the parameters; each sees its part of the batch."""
    fsdp: int = 1
    """Devices that parameters and optimizer state are divided over; they divide the batch too."""
    tensor: int = 1
    """Devices that heads, feed-forward widths and vocabulary are divided over; they work on the same examples, and
    exchange activations in each layer, so they have to be the nearest neighbours."""
    slices: int = 1
    """Groups of devices with a slow network between them: slices of a TPU, nodes of GPUs without a fast fabric. Each
    holds whole replicas of data x fsdp x tensor devices, and gradients alone cross the slow network."""


@dataclasses.dataclass(frozen=True)
class HostsConfig:
    """Which processes train together.

    Without any setting they are found in the environment: in JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID, or as SLURM, Open MPI and GKE describe them; otherwise this process trains alone.
    """

    coordinator: str | None = None
    """HOST:PORT of process 0, which any free port there will do for."""
    count: int | None = None
    """Processes."""
    index: int | None = None
    """Number of this process, from 0."""
    cluster: Literal["auto", "none", "slurm", "ompi", "mpi4py", "gcetpu", "gketpu"] = "auto"
    """How the three above are found: auto looks at the environment; none does not; the others are the methods of
    jax.distributed.initialize, of which gcetpu and mpi4py have to be asked for."""
    start_timeout: int = 300
    """Seconds to wait for the others at the start."""
    heartbeat_timeout: int = 60
    """Seconds without a sign of life after which a process counts as lost, and the others end with a message."""


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One experiment."""

    policy: PolicyConfig = PolicyConfig()
    flow: FlowConfig = FlowConfig()
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
    reflow_from: str | None = None
    """Checkpoint of a teacher whose flow this run straightens: the actions of each example are those that the teacher
    makes from the example's noise (rectified flow, arXiv 2209.03003)."""
    seed: int = 0
    batch_size: int = 32
    """Observations a step, over all devices."""
    parts: int = 1
    """Parts that each device computes its share of a batch in, one after another: so many times fewer activations in
    memory. Losses and weights are those of one part, within rounding."""
    num_steps: int = 30_000
    skip_in_row: int = 5
    """Updates in a row that are skipped, because their loss or gradient is NaN or infinite, before the run stops. They
    leave weights, average and optimizer as they were. 0: the first one stops it."""
    skip_in_total: int = 50
    """The same for all skipped updates of the run."""
    compilation_cache: str | None = "default"
    """Folder where compiled programs are kept for the next run; default: `compiled` in PI0_CACHE, or in
    ~/.cache/pi0_jax, unless JAX's own variables say otherwise; None: nowhere."""
    profile: str | None = None
    """START:STOP: writes a trace of the updates from START up to, and without, STOP to `profile` in the run's folder.
    Look at it with xprof."""
    log_every: int = 20
    validate_every: int = 500
    save_every: int = 1000
    keep_checkpoints: int = 2
    """Checkpoints kept, the newest ones."""
    keep_every: int | None = None
    """Checkpoints whose step is a multiple of it are kept for good; None: none are."""
    keep_best: int = 0
    """Checkpoints kept besides, those with the lowest validation loss; `save_every` has to be a multiple of
    `validate_every`, so that it is known when one is saved."""
