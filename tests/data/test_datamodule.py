import json
import shutil

import lightning as L
import pytest
import torch

from data.batches import LatentBatch, SwitchBatch, read_sample
from data.codec import TransformCodec
from data.datamodule import LatentDataModule
from data.shards import BadSample, BadShard, ShardSet
from data.truth import Truth, measure


def module(root, **changes):
    settings = {"batch_size": 2, "frames": 6, "seed": 5, "num_batches": 9}
    return LatentDataModule(root / "latents", **(settings | changes))


def equal(one, other):
    return (
        one.keys == other.keys
        and torch.equal(one.latents, other.latents)
        and torch.equal(one.text, other.text)
        and torch.equal(one.seeds, other.seeds)
        and one.meta == other.meta
    )


def test_shapes_types_and_padding(sets):
    (batch,) = module(sets, num_batches=1).train_dataloader()
    assert isinstance(batch, LatentBatch)
    assert batch.latents.shape == (2, 6, 16, 2, 4)
    assert batch.latents.dtype == torch.float32
    assert batch.text.shape == (2, 12, 32)
    assert batch.text[:, 11].abs().max() == 0  # captions have 11 words
    assert batch.text[:, 10].abs().min() > 0
    assert batch.seeds.dtype == torch.int64
    assert batch.seeds.min() >= 0
    moved = batch.to("meta")
    assert moved.latents.device.type == "meta"
    assert moved.seeds.device.type == "cpu"


def test_a_window_matches_the_truth_at_its_start(sets):
    codec = TransformCodec(16, 16)
    starts = set()
    for batch in module(sets).train_dataloader():
        for latents, meta in zip(batch.latents, batch.meta, strict=True):
            starts.add(meta["start"])
            truth = Truth.from_json(meta["truth"])
            found = measure(codec.decode(latents)[None], [truth], meta["start"])
            assert found["identity_correct"].eq(1).all()
            assert found["position_correct"].eq(1).all()
    assert len(starts) > 5
    assert max(starts) <= 21 - 6


def test_the_next_prompt_belongs_to_the_sample_whoever_reads_it(sets):
    """A prompt switch goes to the caption of another clip, the same one on any number of ranks."""
    alone = list(module(sets, batch_size=4, has_next_text=True).train_dataloader())
    assert all(isinstance(batch, SwitchBatch) for batch in alone)
    texts = torch.cat([batch.text for batch in alone])
    others = torch.cat([batch.next_text for batch in alone])
    known = {tuple(text.flatten().tolist()) for text in texts}
    assert {tuple(text.flatten().tolist()) for text in others} <= known
    assert (texts != others).flatten(1).any(dim=1).float().mean() > 0.5
    second = module(sets, batch_size=4, has_next_text=True, rank=1, world=2).train_dataloader()
    for whole, share in zip(alone, second, strict=True):
        assert torch.equal(share.next_text, whole.next_text[2:])


def test_two_ranks_with_two_workers_see_every_sample_once_per_epoch(sets):
    """13 samples, 4 per step: 26 positions = two epochs after 6.5 steps; 13 steps = 4 epochs."""
    loaders = [
        iter(
            module(
                sets, batch_size=4, rank=rank, world=2, workers=2, num_batches=13
            ).train_dataloader()
        )
        for rank in (0, 1)
    ]
    stream = []
    for pair in zip(*loaders, strict=True):
        for batch in pair:
            stream += list(zip(batch.keys, batch.seeds.tolist(), strict=True))
    assert len(stream) == 52
    for epoch in range(4):
        assert len({key for key, _ in stream[13 * epoch : 13 * epoch + 13]}) == 13
    assert len({seed for _, seed in stream}) == 52  # a sample has another seed in every epoch
    # one rank alone sees the same stream
    alone = []
    for batch in module(sets, batch_size=4, num_batches=13).train_dataloader():
        alone += list(zip(batch.keys, batch.seeds.tolist(), strict=True))
    assert alone == stream


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_loader_goes_on_exactly(sets, workers):
    whole = list(module(sets).train_dataloader())
    rest = list(module(sets, start_batch=4, workers=workers).train_dataloader())
    assert len(whole) == 9
    assert len(rest) == 5
    assert all(equal(one, other) for one, other in zip(whole[4:], rest, strict=True))


def test_the_start_may_be_set_after_the_module_was_built(sets):
    late = module(sets)
    late.start_batch = 8
    (batch,) = late.train_dataloader()
    assert equal(batch, module(sets).batches()[8])


def test_under_a_trainer(sets):
    seen = []

    class Probe(L.LightningModule):
        def training_step(self, batch):
            seen.append(batch.keys)

        def configure_optimizers(self):
            return None

    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(Probe(), datamodule=module(sets, start_batch=2, num_batches=5))
    assert seen == [batch.keys for batch in module(sets).train_dataloader()][2:5]


def test_a_clip_that_is_too_short_is_named_before_the_first_step(sets):
    with pytest.raises(BadShard, match="at least 22 latent frames, found 21"):
        module(sets, frames=22)
    assert module(sets, frames=21).batches()[0].latents.shape[1] == 21


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_sample_is_named(sets, tmp_path, workers):
    shutil.copytree(sets / "latents", tmp_path / "latents")
    shards = ShardSet(tmp_path / "latents")
    key = shards.entry(4).key
    offset, size, _ = shards.entry(4).members["latents.safetensors"]
    content = bytearray((tmp_path / "latents/shard-000001.tar").read_bytes())
    content[offset + size // 2] ^= 1
    (tmp_path / "latents/shard-000001.tar").write_bytes(content)
    with pytest.raises(BadSample, match=rf"shard-000001\.tar::{key}\.latents\.safetensors"):
        list(module(tmp_path, workers=workers).train_dataloader())


def test_missing_and_raw_shards_are_refused(sets, tmp_path):
    with pytest.raises(BadShard, match="complete set"):
        module(tmp_path)
    with pytest.raises(BadSample, match="encoded clip"):
        read_sample(ShardSet(sets / "raw"), 0)


def test_meta_is_plain_json(sets):
    batch = module(sets).batches()[0]
    assert json.loads(json.dumps(batch.meta)) == batch.meta
