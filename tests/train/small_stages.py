"""Every stage with networks small enough to train in milliseconds, and batches for them."""

import torch

from configs.schema import OptimConfig, StageConfig
from data.batches import LatentBatch
from models.salience import SalienceHead
from tests.models.small import random_transformer, small_transformer
from train.causal import Causal
from train.distill import Distill
from train.engine import SingleEngine, build_engines
from train.kinds import CausalParams, DistillParams, SalienceParams, StreamingParams, TeacherParams
from train.lora import add_adapter
from train.salience import SalienceStage
from train.stage import Stage
from train.streaming import Streaming
from train.teacher import Teacher

FRAMES, PLACES = 12, 6
KINDS = ("teacher", "causal", "distill", "salience", "streaming")


def batch(size: int = 2, first_seed: int = 10) -> LatentBatch:
    """Samples that follow from their seeds `first_seed`, `first_seed` + 1, ..."""
    seeds = torch.arange(first_seed, first_seed + size)
    generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]
    return LatentBatch(
        latents=torch.stack([torch.randn(FRAMES, 16, 2, 3, generator=g) for g in generators]),
        text=torch.stack([torch.randn(3, 8, generator=g) for g in generators]),
        keys=[str(int(seed)) for seed in seeds],
        seeds=seeds,
        meta=[{} for _ in range(size)],
    )


def unbuilt(cls, params, trained, frozen=None, negative_text=None, **changes) -> Stage:
    """A stage without engines; `changes` are fields of its config or of every optimiser."""
    if changes.get("lora") is not None:
        for number, name in enumerate(changes["lora"].networks):
            add_adapter(trained[name], changes["lora"], seed=number, key="lora")
    lr, clip = changes.pop("lr", 1e-3), changes.pop("clip", 1.0)
    optim = OptimConfig(
        lr=lr, warmup=0, schedule="constant", clip=clip, ema=changes.pop("ema", 0.0)
    )
    settings = {"kind": "test", "steps": 100, "batch": 2, "frames": FRAMES} | changes
    config = StageConfig(**settings, optimizers=dict.fromkeys(trained, optim))
    return cls(
        config,
        seed=3,
        networks=trained,
        frozen=frozen,
        params=params,
        frames_per_block=2,
        frame_seq_len=PLACES,
        negative_text=negative_text,
    )


def small_head(num_layers: int = 2) -> SalienceHead:
    torch.manual_seed(1)
    return SalienceHead(num_layers=num_layers, width=24, hidden=8, grid=(2, 3))


def small_stage(kind: str, params: dict | None = None, *, layers: int = 2, **changes) -> Stage:
    """One of `KINDS`, without engines; `params` are its own settings."""
    own, size = params or {}, {"num_layers": layers}
    pair = {"student": small_transformer(0, **size), "critic": small_transformer(1, **size)}
    judge = {"teacher": small_transformer(2, **size)}
    if kind == "teacher":
        return unbuilt(Teacher, TeacherParams(**own), judge, **changes)
    if kind == "causal":
        student = {"student": small_transformer(0, **size)}
        return unbuilt(Causal, CausalParams(**own), student, **changes)
    if kind == "distill":
        settings = DistillParams(**{"prefix_frames": [4], "budgets": [30]} | own)
        return unbuilt(Distill, settings, pair, judge, **changes)
    if kind == "salience":
        salience = SalienceParams(**{"statistics_steps": 2, "horizon": 1} | own)
        frozen = {"teacher": random_transformer(**size), "student": random_transformer(**size)}
        return unbuilt(SalienceStage, salience, {"head": small_head(layers)}, frozen, **changes)
    sizes = {"budget_tokens": 30, "prefix_frames": 4, "chunk_frames": 4, "stream_frames": 16}
    streaming = StreamingParams(**sizes | own)
    return unbuilt(Streaming, streaming, pair, judge | {"head": small_head(layers)}, **changes)


def with_engines(stage: Stage) -> Stage:
    """The stage with an engine of one process for every network that it trains."""
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    return stage


def build(kind: str, params: dict | None = None, **changes) -> Stage:
    """A small stage with engines."""
    return with_engines(small_stage(kind, params, **changes))
