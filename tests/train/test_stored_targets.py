"""The salience stage learns from stored targets what it would learn from the teacher itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from configs.errors import ConfigError
from configs.schema import OptimConfig, StageConfig
from data.batches import LatentBatch
from data.datamodule import LatentDataModule
from data.shard_writer import ShardSetWriter
from data.shards import ShardSet
from data.targets import TargetSet, TargetSource, target_seed, write_targets
from models.salience import SalienceHead
from tests.models.small import random_transformer
from train.engine import SingleEngine, build_engines
from train.kinds import SalienceParams
from train.salience import SalienceStage

FRAMES, PLACES, STEPS = 8, 6, 10
SIGMA = 0.7


def write_clips(root: Path) -> ShardSet:
    """Five clips of noise, longer than what the stage is shown, as `encode` writes them."""
    generator = torch.Generator().manual_seed(0)
    properties = {"text": {"length": 4, "dim": 8}}
    with ShardSetWriter(root, samples_per_shard=2, source_hash="x", properties=properties) as out:
        for number in range(5):
            latents = torch.randn(FRAMES + 3, 16, 2, 3, generator=generator)
            text = torch.randn(3, 8, generator=generator)
            members = {
                "latents.safetensors": save({"latents": latents}),
                "text.safetensors": save({"text": text}),
                "json": json.dumps({"clip_start": 0, "every": 1, "time_stride": 1}).encode(),
            }
            out.write(f"clip-{number}", members, caption="", frames=len(latents))
    return ShardSet(root)


def build(*, batch: int = 2, micro_batch: int = 0) -> SalienceStage:
    head = OptimConfig(lr=1e-2, warmup=0, schedule="constant")
    config = StageConfig(
        kind="salience",
        steps=STEPS,
        batch=batch,
        frames=FRAMES,
        micro_batch=micro_batch,
        optimizers={"head": head},
        log_every=100,
    )
    torch.manual_seed(1)
    trained = SalienceHead(num_layers=2, width=24, hidden=8, grid=(2, 3))
    stage = SalienceStage(
        config,
        seed=3,
        networks={"head": trained},
        frozen={"teacher": random_transformer(), "student": random_transformer()},
        params=SalienceParams(statistics_steps=3, sigma=SIGMA, horizon=1),
        frames_per_block=2,
        frame_seq_len=PLACES,
    )
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    return stage


def losses(stage: SalienceStage, batches: list[LatentBatch]) -> list[float]:
    found = []
    for step, batch in enumerate(batches):
        metrics = stage.update(batch, step)
        stage.completed += 1
        found += [float(metrics["loss/head"])] if step >= 3 else []
    return found


def as_online(batch: LatentBatch, seeds: torch.Tensor) -> LatentBatch:
    """The batch without what is stored, so that the teacher is asked with noise of `seeds`."""
    return LatentBatch(batch.latents, batch.text, batch.keys, seeds, batch.meta)


@pytest.mark.parametrize("batch", [2, 4])
def test_stored_targets_train_like_the_teacher_with_the_same_noise(tmp_path, batch):
    clips = write_clips(tmp_path / "latents")
    source = TargetSource(clips.hash, "teacher", SIGMA, FRAMES, 2 * PLACES, "fp32")
    write_targets(
        clips, tmp_path / "targets", source=source, ask=build().ask_teacher, progress=False
    )
    targets = TargetSet(tmp_path / "targets", source)
    settings = {"batch_size": batch, "frames": FRAMES, "seed": 5, "num_batches": STEPS}
    module = LatentDataModule(clips.root, targets=targets, **settings)
    stored = list(module.train_dataloader())
    own = [torch.tensor([target_seed(key, SIGMA) for key in batch.keys]) for batch in stored]
    online = [as_online(batch, seeds) for batch, seeds in zip(stored, own, strict=True)]
    other = [as_online(batch, batch.seeds) for batch in stored]

    found = losses(build(batch=batch, micro_batch=2), stored)
    # Float16 keeps 11 bits: targets that are off by 2^-12 of their size at most, about as large as
    # their deviation, change a loss of order 1 by less than a few times 2^-12.
    assert found == pytest.approx(losses(build(batch=batch, micro_batch=2), online), rel=1e-3)
    assert found != pytest.approx(losses(build(batch=batch, micro_batch=2), other), rel=1e-2)


def test_the_horizon_is_applied_to_what_is_stored(tmp_path):
    clips = write_clips(tmp_path / "latents")
    source = TargetSource(clips.hash, "teacher", SIGMA, FRAMES, 2 * PLACES, "fp32")
    stage = build()
    write_targets(clips, tmp_path / "t", source=source, ask=stage.ask_teacher, progress=False)
    targets = TargetSet(tmp_path / "t", source)
    batch = LatentDataModule(
        clips.root, targets=targets, batch_size=2, frames=FRAMES, seed=5, num_batches=1
    ).batches()[0]
    assert torch.equal(stage.targets(batch)[0].isnan(), batch.targets[:, 0].isnan())
    stage.params = replace(stage.params, horizon=3)
    later = stage.targets(batch)[..., 0]  # [L, B, S]
    assert later[:, :, 2 * PLACES :].isnan().all()
    assert not later[:, :, : 2 * PLACES].isnan().any()


def test_a_place_of_targets_that_does_not_exist_is_refused():
    config = StageConfig(kind="salience", steps=STEPS, batch=2, frames=FRAMES)
    params = SalienceParams(statistics_steps=3, horizon=1, targets="shard")
    with pytest.raises(ConfigError, match=r"x\.params\.targets must be one of .*found 'shard'"):
        SalienceStage.check(config, params, key="x", block=2)
