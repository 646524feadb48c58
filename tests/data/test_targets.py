"""Stored targets belong to clips: any reader finds what was said of the frames it is shown."""

import os
import shutil
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from data.batches import LatentBatch, TargetBatch, read_sample
from data.datamodule import LatentDataModule
from data.shards import BadSample, BadShard, ShardSet
from data.targets import TargetSet, TargetSource, target_seed, target_window, write_targets

FRAMES, PLACES, CLIPS = 6, 8, 13


def source_of(shards: ShardSet, **changes) -> TargetSource:
    made = TargetSource(
        clips=shards.hash,
        teacher="t" * 64,
        sigma=0.85,
        frames=FRAMES,
        block_len=2 * PLACES,
        precision="fp32",
    )
    return replace(made, **changes)


def ask(batch: LatentBatch) -> torch.Tensor:
    """Two layers that show which frames and which seeds were asked about.  [2, B, S, 3]"""
    tokens = batch.latents.permute(0, 1, 3, 4, 2).flatten(1, 3)[..., :3]  # [B, S, 3]
    layers = torch.stack([tokens, tokens + (batch.seeds % 97 / 97)[:, None, None]])
    layers[:, :, -2 * PLACES :, 0] = torch.nan
    return layers


def write(latents: Path, out: Path, asked=ask, **changes) -> Path:
    shards = ShardSet(latents)
    source = source_of(shards, **changes)
    write_targets(shards, out, source=source, ask=asked, samples_per_shard=3, progress=False)
    return out


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def stored(sets, tmp_path_factory) -> Path:
    return write(sets / "latents", tmp_path_factory.mktemp("stored") / "targets")


def batches(sets: Path, stored: Path, **changes) -> list[LatentBatch]:
    targets = TargetSet(stored, source_of(ShardSet(sets / "latents")))
    settings = {"batch_size": 2, "frames": FRAMES, "seed": 5, "num_batches": 14} | changes
    return list(LatentDataModule(sets / "latents", targets=targets, **settings).train_dataloader())


@pytest.mark.parametrize(
    "changes",
    [{}, {"seed": 6, "batch_size": 3}, {"batch_size": 4, "workers": 2, "rank": 1, "world": 2}],
)
def test_whoever_reads_a_clip_gets_what_was_said_of_these_frames(sets, stored, changes):
    seen = set()
    for batch in batches(sets, stored, **changes):
        assert isinstance(batch, TargetBatch)
        seeds = torch.tensor([target_seed(key, 0.85) for key in batch.keys])
        expected = ask(replace(batch, seeds=seeds)).half().float().transpose(0, 1)
        torch.testing.assert_close(batch.targets, expected, rtol=0, atol=0, equal_nan=True)
        seen |= {(key, meta["start"]) for key, meta in zip(batch.keys, batch.meta, strict=True)}
    assert len(seen) == CLIPS, "a clip shows the same frames in every epoch"
    assert len({start for _, start in seen}) > 5, "and not all clips from the same frame on"


def test_the_readers_own_seeds_still_change_with_the_epoch(sets, stored):
    seeds = [seed for batch in batches(sets, stored) for seed in batch.seeds.tolist()]
    assert len(set(seeds)) == len(seeds) == 28


def test_noise_belongs_to_the_clip_and_the_noise_level():
    seeds = [target_seed(key, sigma) for key in ("a", "b") for sigma in (0.5, 1.0)]
    assert len(set(seeds)) == 4
    assert target_seed("a", 1) == target_seed("a", 1.0)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_undefined_targets_stay_undefined_and_move_with_the_batch(sets, stored):
    (batch,) = batches(sets, stored, num_batches=1)
    assert batch.targets.shape == (2, 2, FRAMES * PLACES, 3)
    assert batch.targets.dtype == torch.float32
    undefined = batch.targets.isnan()
    assert undefined[:, :, -2 * PLACES :, 0].all()
    assert not undefined[:, :, : -2 * PLACES].any()
    assert not undefined[..., 1:].any()
    moved = batch.to("meta")
    assert moved.targets.device.type == moved.latents.device.type == "meta"
    assert moved.seeds.device.type == "cpu"


def test_a_writer_that_was_killed_goes_on_after_its_last_whole_shard(sets, stored, tmp_path):
    asked = []

    def count(batch: LatentBatch) -> torch.Tensor:
        asked.extend(batch.keys)
        return ask(batch)

    def die_at_the_eighth(batch: LatentBatch) -> torch.Tensor:
        if len(asked) == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return count(batch)

    child = os.fork()
    if child == 0:
        try:
            write(sets / "latents", tmp_path / "half", die_at_the_eighth)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert list((tmp_path / "half").glob(".*.part-*"))
    with pytest.raises(BadShard, match="complete set"):
        TargetSet(tmp_path / "half", source_of(ShardSet(sets / "latents")))
    write(sets / "latents", tmp_path / "half", count)
    assert len(asked) == CLIPS - 6, "two shards of three clips were whole"
    assert files(tmp_path / "half") == files(stored)
    write(sets / "latents", tmp_path / "half", count)
    assert len(asked) == CLIPS - 6, "a complete set is left alone"


def test_a_damaged_target_is_named(sets, stored, tmp_path):
    shutil.copytree(stored, tmp_path / "targets")
    entry = ShardSet(stored).entry(4)
    offset, size, _ = entry.members["targets.safetensors"]
    content = bytearray((stored / "shard-000001.tar").read_bytes())
    content[offset + size // 2] ^= 1
    (tmp_path / "targets/shard-000001.tar").write_bytes(content)
    with pytest.raises(BadSample, match=rf"shard-000001\.tar::{entry.key}\.targets\.safetensors"):
        batches(sets, tmp_path / "targets")


@pytest.mark.parametrize(
    "changes",
    [
        {"teacher": "u" * 64},
        {"clips": "0"},
        {"sigma": 0.5},
        {"frames": 4},
        {"block_len": 8},
        {"precision": "bf16"},
    ],
)
def test_targets_of_another_source_are_refused_and_written_again(sets, stored, tmp_path, changes):
    wanted = source_of(ShardSet(sets / "latents"), **changes)
    (name,) = changes
    found = asdict(source_of(ShardSet(sets / "latents")))[name]
    with pytest.raises(BadShard, match=f"found {name} {found!r} in place of {changes[name]!r};"):
        TargetSet(stored, wanted)
    shutil.copytree(stored, tmp_path / "targets")
    write(sets / "latents", tmp_path / "targets", **changes)
    assert TargetSet(tmp_path / "targets", wanted).source == wanted


def test_other_shards_are_refused(sets):
    with pytest.raises(BadShard, match="found clips None in place of"):
        TargetSet(sets / "latents", source_of(ShardSet(sets / "latents")))


def test_a_clip_that_is_too_short_is_named_before_the_teacher_is_asked(sets, tmp_path):
    with pytest.raises(BadShard, match="at least 22 latent frames, found 21"):
        write(sets / "latents", tmp_path / "targets", frames=22)
    assert not (tmp_path / "targets").exists()
    whole = read_sample(ShardSet(sets / "latents"), 0)
    assert torch.equal(target_window(whole, 21).latents, whole.latents)
