"""Clips of the built-in world that no stage was trained on, made the way the training data is."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import RunConfig
from data.batches import read_sample
from data.ingest import encode, ingest
from data.shards import ShardSet
from data.truth import Truth
from data.world import write_world
from train.randomness import derive_seed


@dataclass(frozen=True)
class HeldOut:
    """Clips of one or several evaluation seeds.

    Attributes:
        latents: True latents.  float32 [N, F, C, H, W]
        text: Captions.  [N, T, E]
        truth: One per clip, valid beyond the clip's end.
        noise_seeds: What rollouts of a clip draw their noise from.  int64 [N]
        groups: Evaluation seed of each clip.  [N]
    """

    latents: Tensor
    text: Tensor
    truth: list[Truth]
    noise_seeds: Tensor
    groups: list[int]

    def first(self, per_seed: int) -> "HeldOut":
        """The first clips of every seed."""
        taken: dict[int, int] = {}
        chosen = []
        for index, group in enumerate(self.groups):
            taken[group] = taken.get(group, 0) + 1
            if taken[group] <= per_seed:
                chosen.append(index)
        return self._choose(chosen)

    def split(self, size: int) -> "list[HeldOut]":
        """All clips in their order, `size` at a time; the last part may have fewer."""
        every = range(len(self.groups))
        return [self._choose([*every[start : start + size]]) for start in every[::size]]

    def _choose(self, indices: list[int]) -> "HeldOut":
        return HeldOut(
            latents=self.latents[indices],
            text=self.text[indices],
            truth=[self.truth[index] for index in indices],
            noise_seeds=self.noise_seeds[indices],
            groups=[self.groups[index] for index in indices],
        )

    def to(self, device: torch.device | str) -> "HeldOut":
        """With latents, text and seeds on a device."""
        return replace(
            self,
            latents=self.latents.to(device),
            text=self.text.to(device),
            noise_seeds=self.noise_seeds.to(device),
        )


def prepare(config: RunConfig, folder: Path) -> None:
    """Write the clips of all seeds below `folder`: mp4 files, raw shards, latents.

    Interrupted, it goes on where it stopped; whole, it does nothing.

    Raises:
        UserError: If the run is not about the built-in world, which alone knows its truth.
    """
    if config.source.kind != "world":
        raise UserError(
            f"evaluation needs videos whose truth is known, source.kind=world, found "
            f"{config.source.kind!r}; leave evaluate.stages empty"
        )
    settings = config.evaluate
    wanted = dict.fromkeys(settings.seeds, settings.clips_per_seed)
    wanted[settings.tune_seed] = settings.tune_clips
    for seed, clips in wanted.items():
        _prepare_seed(config, seed, clips=clips, folder=seed_folder(folder, seed))


def seed_folder(folder: Path, seed: int) -> Path:
    """Where the clips of an evaluation seed lie."""
    return folder / f"seed-{seed}"


def _prepare_seed(config: RunConfig, seed: int, *, clips: int, folder: Path) -> None:
    source = config.source
    frames = max(min(config.evaluate.frames), source.frames)
    # Below 2**31, so that no evaluation world is a training world with a small seed.
    world_seed = derive_seed(source.world.seed, "evaluate", seed) % 2**31
    folder.mkdir(parents=True, exist_ok=True)
    world = replace(source.world, seed=world_seed, clips=clips, frames=frames)
    write_world(world, folder / "world", progress=False)
    ingest(folder / "world", folder / "raw", min_frames=frames, progress=False)
    encode(
        folder / "raw",
        folder / "latents",
        codec=config.codec,
        text=config.text,
        size=(source.size[0], source.size[1]),
        frames=frames,
        progress=False,
    )


def load(folder: Path, seeds: Sequence[int]) -> HeldOut:
    """Read the clips of some seeds, in their order."""
    latents, texts, truth, noise_seeds, groups = [], [], [], [], []
    for seed in seeds:
        shards = ShardSet(seed_folder(folder, seed) / "latents")
        for index in range(len(shards)):
            sample = read_sample(shards, index)
            latents.append(sample.latents)
            texts.append(sample.text)
            truth.append(Truth.from_json(json.dumps(sample.meta["truth"])))
            noise_seeds.append(derive_seed(seed, "rollout", index))
            groups.append(seed)
    return HeldOut(
        latents=torch.stack(latents),
        text=torch.stack(texts),
        truth=truth,
        noise_seeds=torch.tensor(noise_seeds),
        groups=groups,
    )


def content_hash(folder: Path, seeds: Sequence[int]) -> list[str]:
    """One hash per seed of everything that `load` reads."""
    return [ShardSet(seed_folder(folder, seed) / "latents").hash for seed in seeds]
