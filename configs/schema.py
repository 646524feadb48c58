"""What a run is: one dataclass per concern, with every default of the project.

The dataclasses are plain (not frozen) because OmegaConf merges into them. A field without a
default must be set in a YAML file or on the command line.
"""

from dataclasses import dataclass, field
from typing import Any

from configs.checks import check_run, require, require_choice, require_positive, require_unset

FREE_STAGE_KEYS = ("micro_batch", "checkpoint_every", "keep", "keep_every", "sample_every")
"""Of `StageConfig`: change no more than rounding, so they may change while a stage trains."""


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
    fps: float = 8
    """For `videos`: frames per second of the clips, and of what is generated. A video is read at
    `rate`; where it has more frames than that, the nearest to each moment are taken, as if they
    were evenly spaced; one that has fewer by more than 1 % is refused."""

    def __post_init__(self) -> None:
        require_choice("source.kind", self.kind, ("world", "videos"))
        require(
            len(self.size) == 2 and min(self.size) > 0,
            f"source.size must be [height, width] in pixels, found {self.size}",
        )
        require_positive(self, "frames", "every", "fps")
        require(self.stride >= 0, f"source.stride must not be negative, found {self.stride}")

    @property
    def rate(self) -> float | None:
        """Frames per second at which videos are read, `fps` x `every`; None for the world's own."""
        return None if self.kind == "world" else self.fps * self.every


@dataclass
class CodecConfig:
    """Pixels to latents and back."""

    name: str = "transform"
    """`transform` has no weights; `wan` is the VAE of Wan2.1, diffusers' `AutoencoderKLWan`."""
    path: str = ""
    """For `wan`: the folder of config.json and weights, or the diffusers folder around `vae`."""
    stride: int = 16
    """Pixels per latent cell, in both directions; 8 for `wan`."""
    time_stride: int = 1
    """Pixel frames that each latent frame but the first stands for; the first always stands for
    one. 4 for `wan`."""
    channels: int = 16
    precision: str = "fp32"
    """Of the network of `wan`; latents are float32 in any case."""

    def __post_init__(self) -> None:
        require_choice("codec.name", self.name, ("transform", "wan"))
        require_choice("codec.precision", self.precision, ("fp32", "bf16"))
        require_positive(self, "stride", "time_stride", "channels")
        if self.name == "transform":
            require_unset("codec", self, time_stride=1, path="", precision="fp32")

    def latent_frames(self, pixel_frames: int) -> int:
        """Latent frames of a clip.

        Raises:
            ConfigError: If no whole number of latent frames stands for `pixel_frames`.
        """
        require(
            pixel_frames > 0 and (pixel_frames - 1) % self.time_stride == 0,
            f"source.frames must be 1 + n x codec.time_stride = 1 + n x {self.time_stride}, "
            f"found {pixel_frames}; take {self.pixel_frames(pixel_frames // self.time_stride + 1)}",
        )
        return (pixel_frames - 1) // self.time_stride + 1

    def pixel_frames(self, latent_frames: int) -> int:
        """Pixel frames that a video's first `latent_frames` latent frames stand for."""
        return (latent_frames - 1) * self.time_stride + 1


@dataclass
class TextConfig:
    """Captions to vectors."""

    name: str = "hashed"
    """`hashed` has no weights; `umt5` is the text encoder of Wan2.1, transformers'
    `UMT5EncoderModel`."""
    path: str = ""
    """For `umt5`: the diffusers folder around `text_encoder` and `tokenizer`, or one folder that
    holds the files of both."""
    dim: int = 32
    """4096 for the `umt5` of Wan2.1."""
    length: int = 12
    """Most words of a caption, for `umt5` tokens, its end among them; what is missing is padded
    with zeros. 512 for Wan2.1."""
    precision: str = "fp32"
    """Of the network of `umt5`; vectors are float32 in any case."""
    negative: str = ""
    """Prompt that guidance leads away from, where a stage has `params.guidance_scale`; encoded as
    captions are. Empty: no prompt, for `hashed` a caption of zeros."""

    def __post_init__(self) -> None:
        require_choice("text.name", self.name, ("hashed", "umt5"))
        require_choice("text.precision", self.precision, ("fp32", "bf16"))
        require_positive(self, "dim", "length")
        if self.name == "hashed":
            require_unset("text", self, path="", precision="fp32")


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
    """Geometry of a run's networks; a teacher whose scores alone are read may have its own."""

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
            len(self.patch_size) == 3 and min(self.patch_size) > 0 and self.patch_size[0] == 1,
            "model.patch_size must be [1, height, width], as a token lies within one frame, found "
            f"{self.patch_size}",
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


def _linears_of_a_layer() -> list[str]:
    parts = [f"{which}.{part}" for which in ("self_attn", "cross_attn") for part in "qkvo"]
    return [*parts, "ffn.0", "ffn.2"]


@dataclass
class LoraConfig:
    """Small factors that are trained in place of whole networks, see `train/lora.py`."""

    rank: int = 16
    alpha: float = 16.0
    """What the factors add to a layer counts alpha / rank times."""
    targets: list[str] = field(default_factory=_linears_of_a_layer)
    """Linear layers that get factors, by the ends of their names; all of every block by default."""
    networks: list[str] = field(default_factory=lambda: ["student", "critic"])
    """The others of the stage are trained as a whole."""

    def __post_init__(self) -> None:
        require_positive(self, "rank", "alpha")
        for name in ("targets", "networks"):
            require(
                len(getattr(self, name)) > 0,
                f"stages.*.lora.{name} must not be empty; leave out stages.*.lora to train whole "
                "networks",
            )

    @property
    def scale(self) -> float:
        """How often what the factors add to a layer counts."""
        return self.alpha / self.rank


@dataclass
class StageConfig:
    """One stage of the plan."""

    kind: str
    """Which stage class runs, a name in `train.kinds.KINDS`."""
    steps: int
    batch: int
    """Samples of one optimiser step, over all ranks."""
    frames: int
    """Length of the training clips in latent frames."""
    micro_batch: int = 0
    """Samples per rank that pass through the networks together; a step adds up as many passes as it
    takes. 0 = all that the rank has."""
    seed: int | None = None
    """Of this stage; without one it follows from the seed of the run and the stage's name."""
    inputs: dict[str, str] = field(default_factory=dict)
    """Role to an earlier stage of the plan, or to the folder of an export."""
    optimizers: dict[str, OptimConfig] = field(default_factory=dict)
    """One entry per trainable network."""
    lora: LoraConfig | None = None
    """For stages of kind `distill` and `streaming`; without it networks are trained as a whole."""
    params: dict[str, Any] = field(default_factory=dict)
    """Fields of the stage's own dataclass, which checks them."""
    checkpoint_every: int = 100
    keep: int = 2
    """Newest checkpoints that stay on disk."""
    keep_every: int = 0
    """The first checkpoint at or behind every multiple of this stays for good; 0 = none."""
    sample_every: int = 0
    """Steps between sample videos; 0 = none. The VAE of `codec.name=wan` is loaded for them, where
    rank 0 trains."""
    log_every: int = 10

    def __post_init__(self) -> None:
        require_positive(self, "steps", "batch", "frames")
        require_positive(self, "checkpoint_every", "keep", "log_every")
        for name in ("micro_batch", "keep_every", "sample_every"):
            value = getattr(self, name)
            require(value >= 0, f"stages.*.{name} must not be negative, found {value}")

    @property
    def is_guided(self) -> bool:
        """Whether the teacher's estimate is led away from `text.negative`."""
        return bool(self.params.get("guidance_scale", 1) != 1)


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
    """`single` process; `ddp`: every rank holds all; `deepspeed`: ranks share by ZeRO."""
    zero_stage: int = 2
    """What `deepspeed` shards: 0 nothing, 1 optimiser states, 2 gradients, too, 3 all weights, too,
    those of frozen networks among them."""
    offload_optimizer: bool = False
    """Keep masters and optimiser states in host memory; for `deepspeed` above ZeRO-0."""
    persistent_params: int = 100_000
    """Under ZeRO-3, parameters with no more elements stay whole on every rank."""
    devices: int = 0
    """Processes per node; 0 = as many as the launcher started, one without a launcher."""
    num_nodes: int = 0
    """0 = what the launcher says."""
    accelerator: str = "auto"
    precision: str = "fp32"
    threads: int = 2
    """CPU threads of each process; 0 leaves the choice to torch."""
    hang_seconds: float = 1800.0
    """A job of several ranks ends if none has made progress for so long; 0 = never."""
    silence_seconds: float = 120.0
    """It ends if a rank has given no sign of life for so long."""
    activation_checkpointing: bool = False
    """Keep only the inputs of a trained transformer's layers for the backward pass and compute the
    rest again there: less memory, about a third more time, the same gradients."""
    compile: bool = False
    """Compile what the transformers' layers do before and behind self-attention, which itself, and
    all that touches a cache, stays as it is. The first steps then take minutes; numbers differ by
    rounding."""
    peak_tflops: float = 0.0
    """What `speed/mfu` is a share of, in TFLOP/s of one device; 0 = the bfloat16 peak of devices
    that `train/hardware.py` knows, and no `speed/mfu` on others."""

    def __post_init__(self) -> None:
        require_choice("trainer.strategy", self.strategy, ("single", "ddp", "deepspeed"))
        require_choice("trainer.precision", self.precision, ("fp32", "bf16"))
        require_choice("trainer.accelerator", self.accelerator, ("auto", "cpu", "gpu"))
        require_positive(self, "silence_seconds")
        for name in ("devices", "num_nodes", "hang_seconds"):
            value = getattr(self, name)
            require(value >= 0, f"trainer.{name} must not be negative, found {value}")
        require(
            self.zero_stage in (0, 1, 2, 3),
            f"trainer.zero_stage must be 0, 1, 2 or 3, found {self.zero_stage}",
        )
        require(
            self.peak_tflops >= 0,
            f"trainer.peak_tflops must not be negative, found {self.peak_tflops}",
        )
        require(
            not self.offload_optimizer or (self.strategy == "deepspeed" and self.zero_stage > 0),
            "trainer.offload_optimizer needs trainer.strategy=deepspeed and trainer.zero_stage "
            f"above 0, found {self.strategy} and {self.zero_stage}",
        )
        require(
            not self.compile or self.strategy != "deepspeed" or self.zero_stage < 3,
            "trainer.compile does not go together with trainer.zero_stage=3, which takes layers "
            "apart while they run; set one of the two to another value",
        )
        require(
            self.persistent_params >= 0,
            f"trainer.persistent_params must not be negative, found {self.persistent_params}",
        )
        require(
            self.strategy != "single" or (self.devices <= 1 and self.num_nodes <= 1),
            "trainer.strategy=single runs one process, found "
            f"trainer.devices={self.devices} and trainer.num_nodes={self.num_nodes}; set "
            "trainer.strategy to ddp or deepspeed",
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
    alarm_factor: float = 4.0
    """Growth of a loss over its best earlier mean that is an alarm, see `train/alarms.py`; 0 = no
    alarms."""
    alarm_rows: int = 5
    """Rows of metrics in each such mean; 0 = no alarms."""

    def __post_init__(self) -> None:
        require(
            self.alarm_factor == 0 or self.alarm_factor > 1,
            f"tracking.alarm_factor must be above 1, or 0 for no alarms, found {self.alarm_factor}",
        )
        require(
            self.alarm_rows >= 0,
            f"tracking.alarm_rows must not be negative, found {self.alarm_rows}",
        )
        require_choice("tracking.wandb", self.wandb, ("auto", "offline", "online", "disabled"))
        require_positive(self, "finish_seconds", "upload_seconds")


@dataclass
class RunConfig:
    """A whole run: data, network, the plan of stages, and its evaluation."""

    name: str
    seed: int = 0
    runs_dir: str = "runs"
    paths: dict[str, str] = field(default_factory=dict)
    """Paths that other keys refer to, as `${paths.NAME}`, so that a user sets them in one place."""
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
    def fps(self) -> float:
        """Frames per second of the videos that the run makes."""
        source = self.source
        return source.world.fps / source.every if source.kind == "world" else source.fps

    @property
    def frame_seq_len(self) -> int:
        """Tokens of one latent frame."""
        patch = self.model.patch_size
        height, width = (pixels // self.codec.stride for pixels in self.source.size)
        return (height // patch[1]) * (width // patch[2])
