"""What a run is: one dataclass per concern, with every default of the project.

The dataclasses are plain (not frozen) because OmegaConf merges into them. A field without a
default must be set in a YAML file or on the command line.
"""

from dataclasses import dataclass, field
from typing import Any

from configs.checks import check_run, require, require_choice, require_positive

FREE_STAGE_KEYS = ("checkpoint_every", "keep", "sample_every")
"""Of `StageConfig`: do not change what a stage computes, so they may change while it trains."""


@dataclass
class WorldConfig:
    """The built-in procedural video world; every clip follows from `seed` and its index."""

    clips: int = 768
    frames: int = 72
    """Pixel frames of each clip."""
    identities: int = 10
    """Gondolas on the wheel, each with its own colour and shape."""
    period: int = 20
    """Frames of one revolution; each gondola shows for 2 of them."""
    decoys: float = 0.6
    """Chance that a bird appears in a frame in which none is in the sky."""
    noise: float = 0.03
    """Standard deviation of the pixel noise, on the scale [-1, 1]."""
    fps: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(self, "clips", "frames", "identities", "fps")
        require(
            self.period == 2 * self.identities,
            "source.world.period must be 2 x source.world.identities (each gondola shows for two "
            f"frames) = {2 * self.identities}, found {self.period}; change one of the two",
        )
        require(
            0 <= self.decoys <= 1,
            f"source.world.decoys must be a chance in [0, 1], found {self.decoys}",
        )
        require(self.noise >= 0, f"source.world.noise must not be negative, found {self.noise}")


@dataclass
class SourceConfig:
    """Where the pixels come from and how they are cut."""

    kind: str = "world"
    """`world` renders the built-in world, `videos` reads `path`."""
    path: str = ""
    """For `videos`: a folder with captions.jsonl, or a JSON-lines file of {"file", "caption"}."""
    folder: str = ""
    """Where the files of a list lie, if not beside it; `package:NAME/PATH` means in an installed
    Python package."""
    world: WorldConfig = field(default_factory=WorldConfig)
    size: list[int] = field(default_factory=lambda: [32, 64])
    """Height and width in pixels; other videos are scaled and cropped to it."""
    frames: int = 72
    """Pixel frames of each clip that is cut from a video."""
    stride: int = 0
    """Pixel frames between the starts of two clips of one video; 0 = one clip per video."""
    every: int = 1
    """Keep every n-th frame of a video."""

    def __post_init__(self) -> None:
        require_choice("source.kind", self.kind, ("world", "videos"))
        require(
            len(self.size) == 2 and min(self.size) > 0,
            f"source.size must be [height, width] in pixels, found {self.size}",
        )
        require_positive(self, "frames", "every")
        require(self.stride >= 0, f"source.stride must not be negative, found {self.stride}")


@dataclass
class CodecConfig:
    """Pixels to latents and back."""

    name: str = "transform"
    stride: int = 16
    """Pixels per latent cell, in both directions."""
    channels: int = 16

    def __post_init__(self) -> None:
        require_positive(self, "stride", "channels")


@dataclass
class TextConfig:
    """Captions to vectors."""

    name: str = "hashed"
    dim: int = 32
    length: int = 12
    """Words per caption; shorter captions are padded with zeros."""

    def __post_init__(self) -> None:
        require_positive(self, "dim", "length")


@dataclass
class DataConfig:
    """Shards and the readers of them."""

    samples_per_shard: int = 64
    workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""
    window_shards: int = 4
    """Shards that are open at once; samples are shuffled within such a window."""

    def __post_init__(self) -> None:
        require_positive(self, "samples_per_shard", "window_shards")
        require(self.workers >= 0, f"data.workers must not be negative, found {self.workers}")


@dataclass
class ModelConfig:
    """Geometry of teacher, critic and student, which are the same network."""

    num_layers: int = 3
    num_heads: int = 2
    head_dim: int = 32
    ffn_dim: int = 256
    freq_dim: int = 64
    patch_size: list[int] = field(default_factory=lambda: [1, 1, 1])
    """Latent cells per token along time, height and width."""
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 32
    rope_theta: float = 100.0
    eps: float = 1e-6
    frames_per_block: int = 2
    """Latent frames that the student denoises together."""

    def __post_init__(self) -> None:
        require_positive(self, "num_layers", "num_heads", "head_dim", "ffn_dim", "freq_dim")
        require(
            self.head_dim % 2 == 0,
            f"model.head_dim must be even, for rotary pairs, found {self.head_dim}",
        )
        require_positive(self, "in_channels", "out_channels", "text_dim", "frames_per_block")
        require(
            len(self.patch_size) == 3 and min(self.patch_size) > 0,
            f"model.patch_size must be [time, height, width], found {self.patch_size}",
        )


@dataclass
class HeadConfig:
    """The salience head (S-MLP): one small network per layer."""

    hidden: int = 32

    def __post_init__(self) -> None:
        require_positive(self, "hidden")


@dataclass
class OptimConfig:
    """AdamW, its schedule, and the moving average of one network."""

    lr: float
    betas: list[float] = field(default_factory=lambda: [0.9, 0.98])
    weight_decay: float = 0.01
    clip: float = 1.0
    """Largest norm of the gradient; 0 = no clipping."""
    warmup: int = 40
    """Steps over which the learning rate rises from 0."""
    schedule: str = "cosine"
    floor: float = 0.05
    """Where the cosine ends, as a share of `lr`."""
    ema: float = 0.0
    """Decay of the moving average of the weights per step; 0 = none."""

    def __post_init__(self) -> None:
        require(self.lr >= 0, f"stages.*.optimizers.*.lr must not be negative, found {self.lr}")
        require(
            len(self.betas) == 2 and all(0 <= beta < 1 for beta in self.betas),
            f"stages.*.optimizers.*.betas must be two numbers in [0, 1), found {self.betas}",
        )
        require_choice("stages.*.optimizers.*.schedule", self.schedule, ("cosine", "constant"))
        require(0 <= self.ema < 1, f"stages.*.optimizers.*.ema must be in [0, 1), found {self.ema}")
        require(
            0 <= self.floor <= 1,
            f"stages.*.optimizers.*.floor must be in [0, 1], found {self.floor}",
        )
        for name in ("clip", "warmup", "weight_decay"):
            value = getattr(self, name)
            require(value >= 0, f"stages.*.optimizers.*.{name} must not be negative, found {value}")


@dataclass
class StageConfig:
    """One stage of the plan."""

    kind: str
    """Which stage class runs, a name in the table of `launch/build.py`."""
    steps: int
    batch: int
    """Samples per rank and micro-batch."""
    frames: int
    """Length of the training clips in latent frames."""
    accumulate: int = 1
    """Micro-batches per optimiser step."""
    seed: int | None = None
    """Of this stage; without one it follows from the seed of the run and the stage's name."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role to an earlier stage of the plan, or to the folder of an export."""
    optimizers: dict[str, OptimConfig] = field(default_factory=dict)
    """One entry per trainable network."""
    params: dict[str, Any] = field(default_factory=dict)
    """Fields of the stage's own dataclass, which checks them."""
    checkpoint_every: int = 100
    keep: int = 2
    """Checkpoints that stay on disk."""
    sample_every: int = 0
    """Steps between sample videos; 0 = none."""
    log_every: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "frames", "accumulate")
        require_positive(self, "checkpoint_every", "keep", "log_every")
        require(
            self.sample_every >= 0,
            f"stages.*.sample_every must not be negative, found {self.sample_every}",
        )


@dataclass
class EvaluateConfig:
    """The rollouts that compare cache policies; budgets are tokens per layer."""

    stages: list[str] = field(default_factory=list)
    """Student stages to evaluate; empty = no evaluation."""
    frames: list[int] = field(default_factory=lambda: [96, 240, 480])
    """Lengths of the rollouts, prefix included."""
    prefix_frames: int = 24
    budgets: list[int] = field(default_factory=lambda: [96, 128])
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    clips_per_seed: int = 24
    tune_seed: int = 100
    """Of the clips on which age weights are chosen; never one of `seeds`."""
    tune_clips: int = 12
    age_weights: list[float] = field(default_factory=lambda: [0.0, 0.05, 0.1])
    """Grid of the age term of every scored policy, per block in standardised units."""
    weights: list[list[float]] = field(default_factory=lambda: [[1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])
    """Weights of `later`, `within` and `earlier` that are reported for the salience policy."""
    steps: int = 4
    """Denoising steps of a student that has no few-step schedule of its own."""
    quality_steps: list[int] = field(default_factory=lambda: [1, 2])
    """Numbers of denoising steps at which stages are compared for sharpness; empty = not at all."""
    reference_steps: int = 32
    """Denoising steps of the first stage's student in that comparison, besides these."""
    shift: float = 5.0
    """Of the noise schedule: larger spends more steps at high noise."""
    sink_frames: int = 1
    recent_frames: int = 2
    time: str = "relative"
    """`relative` shows no lag above `max_lag`, which no training clip had; or `absolute`."""
    max_lag: int = 47
    videos: int = 2
    """Clips per policy that the report shows."""
    policies: list[str] = field(default_factory=list)
    """Policies that take part, by their names in the results; empty = all there are."""
    forms: list[str] = field(default_factory=list)
    """Other ways to store and share a budget that also compete; [all] = all there are."""
    contenders: list[str] = field(default_factory=list)
    """Policies that also run on stages after the first, and beyond the shortest length; empty =
    all."""
    long_stages: list[str] = field(default_factory=list)
    """Stages rolled out beyond the shortest length; empty = all."""
    long_budgets: list[int] = field(default_factory=list)
    """Budgets on stages after the first, and beyond the shortest length; empty = all."""
    long_clips_per_seed: int = 8
    """Clips of each seed there, at `reference_steps` and in rollouts from the caption alone."""
    unbounded_frames: int = 240
    """Longest rollout of the policy that keeps everything; its time grows with the square."""

    def __post_init__(self) -> None:
        require_positive(self, "clips_per_seed", "tune_clips", "prefix_frames", "steps", "max_lag")
        require_positive(self, "reference_steps")
        require(
            all(length > self.prefix_frames for length in self.frames),
            f"evaluate.frames must all be above evaluate.prefix_frames={self.prefix_frames}, "
            f"found {self.frames}",
        )
        require(
            self.tune_seed not in self.seeds,
            f"evaluate.tune_seed={self.tune_seed} must not be one of evaluate.seeds={self.seeds}; "
            "age weights are chosen on clips that are not reported",
        )
        require(
            all(len(weights) == 3 for weights in self.weights),
            f"evaluate.weights must be triples [later, within, earlier], found {self.weights}",
        )
        require_choice("evaluate.time", self.time, ("absolute", "relative"))
        require_positive(self, "long_clips_per_seed", "unbounded_frames", "shift")
        require(
            all(steps > 0 for steps in self.quality_steps),
            f"evaluate.quality_steps must all be above 0, found {self.quality_steps}",
        )
        for name in ("frames", "budgets", "seeds", "weights", "age_weights"):
            require(
                len(getattr(self, name)) > 0,
                f"evaluate.{name} must not be empty; leave out evaluate.stages to evaluate nothing",
            )


@dataclass
class TrainerConfig:
    """Processes, devices, precision."""

    strategy: str = "single"
    zero_stage: int = 2
    devices: int = 1
    """Processes per node."""
    num_nodes: int = 1
    accelerator: str = "auto"
    precision: str = "fp32"
    threads: int = 2
    """CPU threads of each process; 0 leaves the choice to torch."""
    peak_tflops: float = 0.0
    """What `speed/mfu` is a share of, in TFLOP/s of one device; 0 = the bfloat16 peak of devices
    that `train/hardware.py` knows, and no `speed/mfu` on others."""

    def __post_init__(self) -> None:
        require_choice("trainer.strategy", self.strategy, ("single", "deepspeed"))
        require_choice("trainer.precision", self.precision, ("fp32", "bf16"))
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require_positive(self, "devices", "num_nodes")
        require(
            self.peak_tflops >= 0,
            f"trainer.peak_tflops must not be negative, found {self.peak_tflops}",
        )
        require(
            self.zero_stage in (0, 1, 2),
            f"trainer.zero_stage must be 0, 1 or 2, found {self.zero_stage}; "
            "ZeRO-3 is not supported here",
        )
        require(
            self.strategy != "single" or self.devices * self.num_nodes == 1,
            "trainer.strategy=single runs one process, found trainer.devices x trainer.num_nodes = "
            f"{self.devices * self.num_nodes}; set trainer.strategy=deepspeed",
        )


@dataclass
class TrackingConfig:
    """Where metrics go besides metrics.jsonl."""

    wandb: str = "auto"
    """`auto` is online with a key and offline without one."""
    project: str = "pafukv"
    group: str = ""
    """Of the W&B runs, one per stage; empty = the name of the run."""
    artifacts: bool = True
    """Whether the exports go to W&B, as artifacts of type `model`."""
    finish_seconds: int = 20
    """Longest wait for the W&B server at the end of a stage; what it has not taken by then stays
    on disk for `wandb sync`."""
    upload_seconds: int = 1800
    """The same for the upload of an export."""

    def __post_init__(self) -> None:
        require_choice("tracking.wandb", self.wandb, ("auto", "offline", "online", "off"))
        require_positive(self, "finish_seconds", "upload_seconds")


@dataclass
class RunConfig:
    """A whole run: data, network, the plan of stages, and its evaluation."""

    name: str
    seed: int = 0
    runs_dir: str = "runs"
    source: SourceConfig = field(default_factory=SourceConfig)
    codec: CodecConfig = field(default_factory=CodecConfig)
    text: TextConfig = field(default_factory=TextConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    head: HeadConfig = field(default_factory=HeadConfig)
    stages: dict[str, StageConfig] = field(default_factory=dict)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        check_run(self)

    @property
    def frame_seq_len(self) -> int:
        """Tokens of one latent frame."""
        patch = self.model.patch_size
        height, width = (pixels // self.codec.stride for pixels in self.source.size)
        return (height // patch[1]) * (width // patch[2])
