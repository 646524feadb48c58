"""The real stages around small networks, with plain engines, for tests."""

import torch

from configs.schema import OptimConfig, StageConfig
from data.datamodule import LatentBatch
from models.salience import SalienceHead
from tests.models.small import small_transformer
from train.distill import Distill, DistillParams
from train.engine import build_single_engines
from train.streaming import Streaming, StreamingParams

FRAMES, PLACES = 12, 6


def batch(size: int = 2, first_seed: int = 10) -> LatentBatch:
    generator = torch.Generator().manual_seed(first_seed)
    return LatentBatch(
        latents=torch.randn(size, FRAMES, 16, 2, 3, generator=generator),
        text=torch.randn(size, 3, 8, generator=generator),
        keys=[str(i) for i in range(size)],
        seeds=torch.arange(first_seed, first_seed + size),
        meta=[{} for _ in range(size)],
    )


def build(cls, params, trained, frozen=None, *, lr=1e-3, accumulate=1):
    optimizers = {name: OptimConfig(lr=lr, warmup=0, schedule="constant") for name in trained}
    config = StageConfig(
        kind="test",
        steps=100,
        batch=2,
        frames=FRAMES,
        accumulate=accumulate,
        optimizers=optimizers,
    )
    stage = cls(
        config,
        seed=3,
        networks=trained,
        frozen=frozen,
        params=params,
        frames_per_block=2,
        frame_seq_len=PLACES,
    )
    stage.engines = build_single_engines(stage.engine_specs())
    return stage


def distill(lr: float = 1e-3, **params) -> Distill:
    settings = DistillParams(prefix_frames=[4], budgets=[30], student_every=1, **params)
    trained = {"student": small_transformer(0), "critic": small_transformer(1)}
    return build(Distill, settings, trained, {"teacher": small_transformer(2)}, lr=lr)


def streaming(**params) -> Streaming:
    settings = StreamingParams(
        budget_tokens=30, prefix_frames=4, chunk_frames=4, stream_frames=16, **params
    )
    head = SalienceHead(num_layers=2, width=24, hidden=8, grid=(2, 3))
    trained = {"student": small_transformer(0), "critic": small_transformer(1)}
    return build(Streaming, settings, trained, {"teacher": small_transformer(2), "head": head})
