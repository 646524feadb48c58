"""From latent shards to batches, in an order that nothing can disturb."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from data.order import OrderPlan
from data.shards import BadSample, BadShard, ShardSet

if TYPE_CHECKING:
    from data.targets import TargetSet


@dataclass
class LatentBatch:
    """Samples of one step on one rank."""

    latents: Tensor
    """Clean latents, float32 [B, F, C, H, W]."""
    text: Tensor
    """Text vectors, padded with zeros, float32 [B, T, E]."""
    keys: list[str]
    seeds: Tensor
    """Seed of each sample in this epoch, int64 >= 0 [B]: what its noise is drawn from."""
    meta: list[dict[str, Any]]
    """The samples' `json`, and `start`: the first pixel frame that the first latent shows."""

    def to(self, device: torch.device | str) -> Self:
        """The batch with its tensors on a device; seeds stay on the host, where they are used."""
        return replace(self, latents=self.latents.to(device), text=self.text.to(device))


@dataclass
class TargetBatch(LatentBatch):
    """The same with what a teacher has said of the samples."""

    targets: Tensor
    """Salience of every token in each layer, float32, NaN where undefined [B, L, S, 3]."""

    def to(self, device: torch.device | str) -> Self:
        """As for any batch."""
        return replace(super().to(device), targets=self.targets.to(device))


@dataclass
class SwitchBatch(LatentBatch):
    """The same with another prompt for each sample, which its video may go on with."""

    next_text: Tensor
    """Text vectors of some other sample, as `text` [B, T, E]."""

    def to(self, device: torch.device | str) -> Self:
        """As for any batch."""
        return replace(super().to(device), next_text=self.next_text.to(device))


@dataclass(frozen=True)
class Sample:
    """One clip of a set of latent shards."""

    key: str
    latents: Tensor
    """float32 [F, C, H, W]"""
    text: Tensor
    """Padded with zeros to the set's text length, float32 [T, E]."""
    meta: dict[str, Any]

    def num_windows(self, frames: int) -> int:
        """How many latent frames a window of `frames` frames may start at.

        If latent frames stand for several pixel frames, the first one stands for only one: then a
        window has such a first frame only at the clip's start, and what starts elsewhere is no
        video that the codec could have made.
        """
        return 1 if self.meta["time_stride"] > 1 else len(self.latents) - frames + 1

    def window(self, start: int, frames: int) -> Sample:
        """`frames` frames from latent frame `start` on; `meta` then says where that is."""
        pixel_frame = max(0, (start - 1) * self.meta["time_stride"] + 1)
        shown = self.meta["clip_start"] + pixel_frame * self.meta["every"]
        return replace(
            self,
            latents=self.latents[start : start + frames],
            meta={**self.meta, "start": shown},
        )


def read_sample(shards: ShardSet, index: int) -> Sample:
    """Read a clip and its text.

    Raises:
        BadSample: If it is damaged, or was not written by `encode`.
    """
    key = shards.entry(index).key
    members = shards.read(index)
    try:
        latents = load(members["latents.safetensors"])["latents"].float()
        text = padded_text(shards, members)
        meta: dict[str, Any] = json.loads(members["json"])
    except (KeyError, ValueError, SafetensorError) as error:
        raise BadSample(
            f"{shards.root}::{key} must be an encoded clip, reading it found: {error}; "
            f"give the folder that `encode` wrote"
        ) from error
    return Sample(key=key, latents=latents, text=text, meta=meta)


def padded_text(shards: ShardSet, members: Mapping[str, bytes]) -> Tensor:
    """The text vectors in a sample's `text.safetensors`, padded with zeros.

    Args:
        shards: Where the sample is from; its properties say how long texts are.
        members: Of the sample.

    Returns:
        float32 [T, E]
    """
    words, sizes = load(members["text.safetensors"])["text"].float(), shards.properties["text"]
    text = torch.zeros(sizes["length"], sizes["dim"])
    text[: len(words)] = words
    return text


def require_frames(shards: ShardSet, frames: int) -> None:
    """Raise `BadShard` if a clip has fewer than `frames` latent frames."""
    for index in range(len(shards)):
        entry = shards.entry(index)
        if entry.frames < frames:
            raise BadShard(
                f"{shards.root}::{entry.key} must have at least {frames} latent frames, found "
                f"{entry.frames}; lower the stage's `frames` or encode longer clips"
            )


class LatentBatches(Dataset[LatentBatch]):
    """The batches of one rank; item t is a pure function of the shards, the seed and t."""

    def __init__(
        self,
        shards: ShardSet,
        plan: OrderPlan,
        *,
        batch_size: int,
        frames: int,
        rank: int,
        world: int,
        targets: TargetSet | None = None,
        has_next_text: bool = False,
    ) -> None:
        """Keep what the batches follow from.

        Args:
            shards: What `encode` wrote.
            plan: The order of the samples.
            batch_size: Samples per batch, over all ranks; each has an equal share.
            frames: Latent frames per sample.
            rank: Number of this rank.
            world: Number of ranks.
            targets: What a teacher has said of the same shards and frames, for `TargetBatch`es.
            has_next_text: Whether to make `SwitchBatch`es.

        Raises:
            BadShard: If a clip has fewer than `frames` frames.
            ValueError: If `batch_size` is no multiple of `world`.
        """
        if batch_size % world:
            raise ValueError(f"batch_size must be a multiple of {world} ranks, found {batch_size}")
        self.shards = shards
        self.plan = plan
        self.batch_size = batch_size
        self.frames = frames
        self.rank = rank
        self.world = world
        self.targets = targets
        self.has_next_text = has_next_text
        require_frames(shards, frames)

    def __getitem__(self, number: int) -> LatentBatch:
        """This rank's share of batch number `number`, counted from the start of the stage."""
        share = self.batch_size // self.world
        first = number * self.batch_size + self.rank * share
        places = [self.plan.at(first + offset) for offset in range(share)]
        samples = [self._window(epoch, index) for epoch, index in places]
        batch = LatentBatch(
            latents=torch.stack([sample.latents for sample in samples]),
            text=torch.stack([sample.text for sample in samples]),
            keys=[sample.key for sample in samples],
            seeds=torch.tensor([self.plan.sample_seed(epoch, index) for epoch, index in places]),
            meta=[sample.meta for sample in samples],
        )
        if self.has_next_text:
            others = [self._other(epoch, index) for epoch, index in places]
            texts = [read_sample(self.shards, other).text for other in others]
            return SwitchBatch(**vars(batch), next_text=torch.stack(texts))
        if self.targets is None:
            return batch
        stored = torch.stack([self.targets.read(index) for _, index in places])
        return TargetBatch(**vars(batch), targets=stored)

    def _other(self, epoch: int, index: int) -> int:
        """A sample that is not this one, drawn anew in each epoch."""
        total = self.plan.num_samples
        step = self.plan.generator("next prompt", epoch, index).integers(1, max(2, total))
        return (index + int(step)) % total

    def _window(self, epoch: int, index: int) -> Sample:
        """A sample, cut to `frames` frames.

        They start at a place of their own in each epoch, or where the stored targets have them; if
        a latent frame stands for several pixel frames, at the clip's start.
        """
        sample = read_sample(self.shards, index)
        if self.targets is not None:
            return self.targets.window(sample)
        starts = sample.num_windows(self.frames)
        start = int(self.plan.generator("window", epoch, index).integers(starts))
        return sample.window(start, self.frames)
