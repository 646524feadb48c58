"""Batches of latents as a Trainer takes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
from torch.utils.data import DataLoader

from data.batches import LatentBatch, LatentBatches
from data.order import OrderPlan
from data.shards import ShardSet

if TYPE_CHECKING:
    from data.targets import TargetSet

WORKER_TIMEOUT = 300
"""Seconds after which a silent loader process is an error and no longer a wait."""


class LatentDataModule(L.LightningDataModule):
    """Latent shards for a Trainer; the whole resume state is the number of the next batch.

    The Trainer must be built with `use_distributed_sampler=False`: ranks are dealt with here.
    """

    def __init__(
        self,
        root: Path | str,
        *,
        batch_size: int,
        frames: int,
        seed: int,
        num_batches: int,
        start_batch: int = 0,
        workers: int = 0,
        window_shards: int = 4,
        rank: int | None = None,
        world: int | None = None,
        targets: TargetSet | None = None,
        has_next_text: bool = False,
    ) -> None:
        """Open the shards, so that a damaged set is found before training starts.

        Args:
            root: Folder that `encode` wrote.
            batch_size: Samples per batch, over all ranks; each has an equal share.
            frames: Latent frames per sample; longer clips are cut to a window.
            seed: Fixes order, windows and sample seeds.
            num_batches: The loader ends before this batch.
            start_batch: The loader starts at this batch; may be set until the loader is made.
            workers: Loader processes; 0 reads in this process.
            window_shards: Shards that are read at the same time.
            rank: Number of this rank; None = the Trainer's, or 0 without one.
            world: Number of ranks; None = the Trainer's, or 1 without one.
            targets: As in `LatentBatches`.
            has_next_text: The same.

        Raises:
            BadShard: If the set is missing or damaged, or a clip is too short.
        """
        super().__init__()
        self.shards = ShardSet(Path(root))
        self.batch_size = batch_size
        self.frames = frames
        self.seed = seed
        self.num_batches = num_batches
        self.start_batch = start_batch
        self.workers = workers
        self.window_shards = window_shards
        self.rank = rank
        self.world = world
        self.targets = targets
        self.has_next_text = has_next_text
        self.batches()

    def batches(self) -> LatentBatches:
        """This rank's batches, by number."""
        attached = self.trainer
        rank = self.rank if self.rank is not None else attached.global_rank if attached else 0
        world = self.world if self.world is not None else attached.world_size if attached else 1
        plan = OrderPlan(self.shards.sizes, self.seed, window=self.window_shards)
        return LatentBatches(
            self.shards,
            plan,
            batch_size=self.batch_size,
            frames=self.frames,
            rank=rank,
            world=world,
            targets=self.targets,
            has_next_text=self.has_next_text,
        )

    def train_dataloader(self) -> DataLoader[LatentBatch]:
        """Batches start_batch .. num_batches - 1 of this rank, in order."""
        numbers: Sequence[int] = range(self.start_batch, self.num_batches)
        return DataLoader(
            self.batches(),
            batch_size=None,
            sampler=numbers,
            num_workers=self.workers,
            timeout=WORKER_TIMEOUT if self.workers else 0,
        )
