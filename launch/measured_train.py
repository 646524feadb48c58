"""A stage in training under a stop-watch: random networks and latents, all else as in `fit`."""

import gc
import json
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from configs.load import load_config, to_dict
from configs.schema import RunConfig
from data.files import json_sha256
from data.shard_writer import ShardSetWriter
from launch.build import build_data, latents_folder, new_stage
from train.fit import fit
from train.hardware import peak_flops, peak_gigabytes
from train.kinds import stage_kind
from train.ranks import barrier, gather_objects
from train.spans import SPANS
from train.speed import FLOPS, SAMPLES, Speedometer
from train.stage import Stage

CONFIGS = Path(__file__).parents[1] / "configs"
PRODUCT_SIZE = 2048
"""Rows and columns of the matrices whose product gives a CPU's peak."""
STAGES = ("teacher", "causal", "salience_causal", "distill", "salience", "streaming", "control")
"""Of the demo's plan."""
SHAPES: dict[str, list[str]] = {
    "demo": [str(CONFIGS / "demo.yaml")],
    "tiny": [str(CONFIGS / "tiny.yaml")],
    "1.3b": [
        str(CONFIGS / "demo.yaml"),
        "source.size=[480,832]",
        "codec.stride=8",
        "text.dim=4096",
        "text.length=512",
        "model.num_layers=30",
        "model.num_heads=12",
        "model.head_dim=128",
        "model.ffn_dim=8960",
        "model.freq_dim=256",
        "model.text_dim=4096",
        "model.patch_size=[1,2,2]",
        "model.rope_theta=10000.0",
        "model.frames_per_block=3",
        "trainer.precision=bf16",
        *(f"stages.{name}.params.prefix_frames=[3]" for name in ("distill", "control")),
        *(f"stages.{name}.params.budgets=[14040]" for name in ("distill", "control")),
        "stages.streaming.params.budget_tokens=14040",
        "stages.streaming.params.prefix_frames=3",
        "stages.streaming.params.chunk_frames=6",
        "stages.streaming.params.stream_frames=45",
        "stages.streaming.params.max_lag=20",
        *(f"stages.{name}.{size}" for name in STAGES for size in ("batch=1", "frames=21")),
    ],
}
"""Plans by name. `demo` is what a laptop trains; a step of `tiny` is too short to mean anything;
`1.3b` is Wan2.1 1.3B on 21 latent frames of 480 x 832 pixels, 9 of them in the cache."""


class Recorder(Speedometer):
    """Keeps what every step cost.

    Attributes:
        steps: `Speedometer.latest` of each.
    """

    def __init__(self, stage: Stage) -> None:
        super().__init__(stage)
        self.steps: list[dict[str, float]] = []

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Measure the block and note it down."""
        with super().step(batch):
            yield
        self.steps.append(self.latest)


def measured_config(
    words: Sequence[str], *, ranks: int, stage_name: str, num_steps: int, checkpoint_step: int
) -> RunConfig:
    """The config of a measurement: one checkpoint within it, no videos, no W&B, no evaluation.

    Args:
        words: YAML files and overrides.
        ranks: Processes; each does what one would do alone.
        stage_name: Of the stage that is measured.
        num_steps: Of the whole training, warm-up included.
        checkpoint_step: Steps before the checkpoint.
    """
    config = load_config([*words, "evaluate.stages=[]", "tracking.wandb=disabled"])
    if stage_name not in config.stages:
        return config
    stage = config.stages[stage_name]
    stage.steps, stage.batch = num_steps, stage.batch * ranks
    stage.checkpoint_every, stage.keep = checkpoint_step, 1
    stage.sample_every, stage.log_every = 0, num_steps
    if stage.kind == "salience":
        stage.params |= {"statistics_steps": 1, "targets": "online"}
    return config


def write_latents(config: RunConfig, *, frames: int, count: int) -> None:
    """Write shards of random clips where the stages of `config` look for them."""
    height, width = (pixels // config.codec.stride for pixels in config.source.size)
    properties = {"text": to_dict(config.text), "codec": to_dict(config.codec)}
    writer = ShardSetWriter(
        latents_folder(config),
        samples_per_shard=config.data.samples_per_shard,
        source_hash=json_sha256([properties, height, width, frames, count]),
        properties=properties,
    )
    generator = torch.Generator().manual_seed(config.seed)
    about = {"clip_start": 0, "every": 1, "time_stride": config.codec.time_stride}
    meta = json.dumps(about).encode()
    shape = (frames, config.model.in_channels, height, width)
    with writer:
        for number in range(count):
            latents = torch.randn(shape, generator=generator)
            text = torch.randn(config.text.length, config.text.dim, generator=generator)
            members = {
                "latents.safetensors": save({"latents": latents}),
                "text.safetensors": save({"text": text}),
                "json": meta,
            }
            writer.write(f"clip-{number:06d}", members, caption="", frames=frames)


def train_measured(config: RunConfig, stage_name: str, *, warmup: int) -> dict[str, Any]:
    """Train a stage of random networks by `fit` and say what its steps cost; all ranks together.

    The same training runs once before, so that no FLOPs need be counted while the clock runs.

    Args:
        config: From `measured_config`, with shards from `write_latents`.
        stage_name: Of the stage.
        warmup: First steps, which are not measured.

    Returns:
        See `launch.benchmark_train.run`.
    """
    is_cuda = config.trainer.accelerator == "gpu"
    counters = _train(config, stage_name, {}).counters
    gc.collect()  # a stage and its stop-watch refer to each other
    if is_cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    stage = _train(config, stage_name, counters)
    assert isinstance(stage.speed, Recorder)
    own = summary(stage.speed.steps[warmup:], stage)
    own["peak_memory_gb"] = peak_gigabytes(stage.device)
    peak = peak_flops(stage.device, config.trainer.peak_tflops)
    own["mfu"] = None if peak is None else own["tflops_per_second"] * 1e12 / peak
    if not is_cuda:
        barrier()  # ranks share the machine here as they did in training
        product = product_tflops()
        own["product_tflops_per_second"] = product
        own["ratio_to_product"] = own["tflops_per_second"] / product
    return together(gather_objects(own))


def _train(config: RunConfig, stage_name: str, counters: Mapping[str, int]) -> Stage:
    """The stage after a training from scratch, its steps in a `Recorder`."""
    kind = stage_kind(config.stages[stage_name].kind)
    stage = new_stage(
        config,
        stage_name,
        {},
        frozen=kind.frozen_sources,
        is_fresh=True,
        negative_text=torch.zeros(config.text.length, config.text.dim),
    )
    stage.counters |= counters
    stage.speed = Recorder(stage)
    if config.trainer.accelerator == "gpu":
        stage.spans.synchronise = torch.cuda.synchronize
    folder = Path(config.runs_dir) / ("measured" if counters else "counted")
    fit(stage, build_data(config, stage), folder=folder, config=config, stage_name=stage_name)
    return stage


def summary(steps: Sequence[Mapping[str, float]], stage: Stage) -> dict[str, Any]:
    """What measured steps cost on one rank.

    Args:
        steps: `Recorder.steps`; one checkpoint falls between two of them.
        stage: Whose they are.
    """
    parts = {
        name: sum(values[f"speed/{name}_seconds"] for values in steps) for name in (*SPANS, "other")
    }
    # A checkpoint stands between two steps. In training it is rarer than here.
    plain = [_seconds(values) - values["speed/checkpoint_seconds"] for values in steps]
    median, mean = statistics.median(plain), statistics.mean(plain)
    samples = statistics.mean(values[SAMPLES] for values in steps)
    return {
        "seconds_per_step": median,
        "mean_seconds_per_step": mean,
        "share": {name: seconds / sum(parts.values()) for name, seconds in parts.items()},
        "tokens_per_second": samples * stage.config.frames * stage.frame_seq_len / mean,
        "samples_per_step": samples,
        "tflops_per_second": statistics.mean(values[FLOPS] for values in steps) / mean / 1e12,
        "checkpoint_stall": {
            "seconds": parts["checkpoint"],
            "steps": parts["checkpoint"] / median,
        },
    }


def _seconds(values: Mapping[str, float]) -> float:
    return values["speed/step_seconds"] + values["speed/wait_seconds"]


def together(ranks: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One summary of those of all ranks: means, and the largest memory."""
    found: dict[str, Any] = {}
    for key, value in ranks[0].items():
        values = [rank[key] for rank in ranks]
        if isinstance(value, dict):
            found[key] = together(values)
        elif value is None:
            found[key] = None
        else:
            found[key] = max(values) if key == "peak_memory_gb" else statistics.mean(values)
    return found


def product_tflops(size: int = PRODUCT_SIZE, repeats: int = 5) -> float:
    """Speed of the fastest of some float32 matrix products on this CPU, in TFLOP/s."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds) / 1e12
