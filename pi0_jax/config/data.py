"""Demonstrations, and random changes to them."""

from __future__ import annotations

import dataclasses
from typing import Literal


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


OPENPI_AUGMENT = AugmentConfig(
    crop=0.95,
    rotate_degrees=5.0,
    brightness=0.3,
    contrast=0.4,
    saturation=0.5,
    fixed_cameras=("left_wrist_0_rgb", "right_wrist_0_rgb"),
)
"""Augmentation that the released weights were trained with, and that openpi fine-tunes with."""


PromptFrom = Literal["task", "subtask", "both", "predict"]


@dataclasses.dataclass(frozen=True)
class DatasetConfig:
    """One dataset of a mixture."""

    path: str
    """Folder of a LeRobot dataset (2.0, 2.1 or 3.0), of an RLDS dataset, or of pictures with questions and answers in
    *.jsonl files (`data.pairs`); or hf://owner/name for one on the hub."""
    weight: float | None = None
    """Share of the samples, relative to the other weights; None for all datasets: each by its number of frames."""
    robot: str | None = None
    """Name of its robot; None: `policy.robot`."""
    stats: str | None = None
    """Datasets of one name here are normalised by their common statistics; None: the robot's name. A policy normalises
    by the statistics that are called like its robot."""
    keys: dict[str, str] = dataclasses.field(default_factory=dict)
    """The robot's name of a feature → the dataset's; "a + b" puts two side by side."""
    preset: str | None = None
    """Robot whose published RLDS dataset this is, so that keys, rate and instruction are known (`Robot.rlds`); None:
    its own robot, if the features are there."""
    without_episodes: tuple[int, ...] = ()
    """Episodes of a LeRobot dataset to leave out, by their `episode_index`."""
    sample_ranges: str | None = None
    """JSON file of the ranges of frames to sample, such as DROID's droid_sample_ranges, which leaves out idle ones;
    held-out episodes and statistics keep all frames. None: all frames."""
    split: str = "train"
    """Split of an RLDS dataset."""
    task: str | None = None
    """Feature of an RLDS dataset with the instruction; None: the preset's, language_instruction, or the only text."""
    prompt: str | None = None
    """Instruction of episodes that have none, which may be empty; None: they are left out, and the log names them."""
    prompt_from: PromptFrom = "task"
    """Prompt of a LeRobot dataset's frames. task: the instruction. subtask: the subtask that a frame belongs to, by
    LeRobot's language columns or `subtask_index`. both: "TASK. Subtask: SUBTASK". Frames without a subtask have the
    instruction. A policy wants prompts of the same form. predict: the instruction, and the policy learns to write the
    subtask itself before it acts (objective Joint)."""
    fps: float | None = None
    """Frames per second of an RLDS dataset, which does not store it; None: the preset's, or the robot's."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where demonstrations come from and how they are read."""

    path: str | None = None
    """Folder of a LeRobot or RLDS dataset of `policy.robot`; not used where `datasets` names some."""
    validation_path: str | None = None
    """Folder of held-out demonstrations for the validation loss; None skips it, unless `validation_share` says more."""
    datasets: tuple[DatasetConfig, ...] = ()
    """A mixture of datasets."""
    resample_fps: float | None = None
    """Frames per second that all datasets are brought to: positions are interpolated, changes summed, pictures those of
    the nearest frame. None: as they were recorded, and they have to agree."""
    mixed_rates: bool = False
    """Mix datasets of different frames per second as they are: the same number of actions then takes longer in one."""
    validation_share: float = 0.0
    """Share of the episodes that is held out for the validation loss, by a hash of their states and actions: copies of
    an episode are on the same side."""
    success_only: bool = False
    """Leave episodes that failed out of training, statistics and validation: those whose column `next.success` is 0
    throughout (rollouts of `pi0 evaluate --record` have it; a dataset's `keys` name another one). Of a mixture,
    datasets without the column are taken whole."""
    norm_stats: str | None = None
    """File of statistics (`pi0 data stats`, or openpi's norm_stats.json); None: computed from the demonstrations."""
    trust_norm_stats: bool = False
    """Train by the statistics of `norm_stats` even where the demonstrations are far off them."""
    frames: Literal["auto", "random"] = "auto"
    """random: frames are decoded when they are needed, which takes no room. auto: the same, but where a video has few
    key frames, which makes that slow, what is decoded is kept at the model's resolution in the user's cache
    (PI0_CACHE, XDG_CACHE_HOME), and the log says so. Nothing is written into a dataset."""
    kept_gb: float = 50.0
    """Largest size of the frames that are kept of a dataset, 1e9 bytes."""
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
    codec: str | None = None
    """Folder of a FAST codec (`pi0 data fast`, or physical-intelligence/fast), for objectives that write action tokens;
    None: that of the weights, or one fitted to the demonstrations."""
    codes: int = 1024
    """Codes of a codec that is fitted when a training begins: fewer leave room in a small vocabulary, and make chunks
    longer."""
