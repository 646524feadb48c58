"""Disk, traffic and time of a forecast: real folders, a ring played here, and sums by hand."""

from pathlib import Path

import pytest

from configs.load import load_config
from configs.schema import TrainerConfig
from data.shards import ShardSet
from launch.forecast import forecast
from launch.forecast_knobs import Cluster
from launch.forecast_sizes import clip_count, data_bytes
from launch.plan import run_one
from train.hardware import PEAK_FLOPS
from train.shares import exchanged_bytes, update_bytes

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")


@pytest.mark.parametrize("stride", [0, 7])
def test_encoded_shards_hold_what_was_planned_of_every_clip(tmp_path, stride):
    words = ["source.world.clips=2", "source.world.frames=40", "source.frames=24", "text.length=30"]
    words += [f"source.stride={stride}", "stages={}", "evaluate.stages=[]"]
    config = load_config([TINY, f"runs_dir={tmp_path}", *words])
    for step in ("world", "ingest", "encode"):
        run_one(config, step)
    latents = ShardSet(tmp_path / "tiny" / "data" / "latents")
    planned = data_bytes(config)
    assert len(latents) == clip_count(config)
    for index in range(len(latents)):
        header = 200  # of a safetensors file, at most
        sizes = {key: size for key, (_, size, _) in latents.entry(index).members.items()}
        assert 0 < sizes["latents.safetensors"] - planned["latents"] < header
        assert 0 < sizes["text.safetensors"] <= planned["text"] + header


class Ring:
    """Ranks in a circle, each of which hands one chunk at a time to the next."""

    def __init__(self, elements: int, ranks: int) -> None:
        assert elements % ranks == 0
        self.ranks, self.chunk = ranks, elements // ranks
        self.sent = [0] * ranks

    def reduce_scatter(self) -> None:
        held = [[{rank} for _ in range(self.ranks)] for rank in range(self.ranks)]
        for step in range(self.ranks - 1):
            for rank in range(self.ranks):
                self._hand_on(held, rank, (rank - step) % self.ranks)
        for rank in range(self.ranks):
            assert len(held[rank][(rank + 1) % self.ranks]) == self.ranks

    def all_gather(self) -> None:
        held = [[set() for _ in range(self.ranks)] for _ in range(self.ranks)]
        for rank in range(self.ranks):
            held[rank][rank] = {rank}
        for step in range(self.ranks - 1):
            for rank in range(self.ranks):
                self._hand_on(held, rank, (rank - step) % self.ranks)
        assert all(chunk for chunks in held for chunk in chunks)

    def _hand_on(self, held: list[list[set[int]]], rank: int, chunk: int) -> None:
        held[(rank + 1) % self.ranks][chunk] |= held[rank][chunk]
        self.sent[rank] += self.chunk


COLLECTIVES = {
    "ddp": ["reduce_scatter", "all_gather"],
    "zero0": ["reduce_scatter", "all_gather"],
    "zero1": ["reduce_scatter", "all_gather", "all_gather"],  # gradients all-reduced; new weights
    "zero2": ["reduce_scatter", "all_gather", "all_gather"],
    "zero3": ["reduce_scatter"],
}


def trainer(strategy: str) -> TrainerConfig:
    if strategy == "ddp":
        return TrainerConfig(strategy="ddp")
    return TrainerConfig(strategy="deepspeed", zero_stage=int(strategy[-1]), persistent_params=0)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("strategy", COLLECTIVES)
def test_an_update_sends_what_a_ring_of_ranks_sends(strategy, ranks):
    sizes = [24 * 5, 24 * 7, 24]
    ring = Ring(sum(sizes), ranks)
    for collective in COLLECTIVES[strategy]:
        getattr(ring, collective)()
    assert set(ring.sent) == {update_bytes(sizes, trainer(strategy), ranks) // 4}


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_only_under_zero_3_a_pass_gathers_weights(ranks):
    sizes = [24 * 5, 24 * 7, 24]
    ring = Ring(sum(sizes), ranks)
    ring.all_gather()
    assert set(ring.sent) == {exchanged_bytes(sizes, trainer("zero3"), ranks) // 4}
    for strategy in ("ddp", "zero0", "zero1", "zero2"):
        assert exchanged_bytes(sizes, trainer(strategy), ranks) == 0


def planned(*words: str, ranks: int = 1, efficiency: float = 0.5):
    config = load_config([TINY, *words])
    (found,) = forecast(config, Cluster("H100", 1, ranks, efficiency), stage="teacher")
    return config, found


def test_traffic_of_a_step_is_that_of_its_passes_and_its_update():
    words = ["trainer.strategy=deepspeed", "trainer.persistent_params=0", "trainer.devices=2"]
    _, found = planned(*words, "trainer.zero_stage=3", "stages.teacher.batch=8", ranks=2)
    whole = 4 * found.networks["teacher"]
    # Two ranks: half of the weights come for the forward and the backward pass, and half of the
    # gradients go.
    assert found.sent_bytes == 3 * whole // 2
    words += ["trainer.zero_stage=3", "stages.teacher.batch=8", "stages.teacher.micro_batch=1"]
    _, found = planned(*words, ranks=2)
    assert found.sent_bytes == (4 * 2 + 1) * whole // 2


def layer_flops(config, samples: int) -> float:
    """Of a layer's products and attention, forward: two for each pair of numbers."""
    width, rows = config.model.num_heads * config.model.head_dim, config.text.length
    tokens = config.stages["teacher"].frames * config.frame_seq_len
    own = 4 * tokens * width**2 + 2 * tokens**2 * width
    text = 2 * tokens * width**2 + 2 * rows * width**2 + 2 * tokens * rows * width
    return 2.0 * samples * (own + text + 2 * tokens * width * config.model.ffn_dim)


def test_time_is_operations_over_speed_and_checkpointing_repeats_the_layers():
    config, plain = planned()
    samples = config.stages["teacher"].batch
    peak = PEAK_FLOPS["H100"]
    assert plain.executed == plain.flops == plain.step_seconds * peak * 0.5
    assert plain.hours == plain.step_seconds * config.stages["teacher"].steps / 3600
    _, repeated = planned("trainer.activation_checkpointing=true")
    layers = config.model.num_layers * layer_flops(config, samples)
    assert repeated.flops == plain.flops > 3 * layers
    assert repeated.executed - repeated.flops == pytest.approx(layers, rel=1e-12)
    _, slower = planned(efficiency=0.25)
    assert slower.step_seconds == 2 * plain.step_seconds
    _, longer = planned("stages.teacher.steps=90")
    assert longer.hours == pytest.approx(plain.hours * 90 / config.stages["teacher"].steps)
    assert longer.step_seconds == plain.step_seconds
