"""The order in which samples are read."""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from data.shards import BadShard


class OrderPlan:
    """The order of samples, for ever: a pure function of the shards' sizes, the seed and the epoch.

    Each epoch holds each sample once: the shards are permuted, then the samples within every
    `window` consecutive shards. Epochs follow each other without a gap, so a batch may hold the
    end of one and the start of the next. A position counts the samples of the whole job.
    """

    def __init__(self, sizes: Sequence[int], seed: int, *, window: int = 4) -> None:
        """Keep the sizes.

        Args:
            sizes: Samples in each shard.
            seed: Another seed, another order.
            window: Shards that are read at the same time.

        Raises:
            BadShard: If there is no sample.
        """
        if sum(sizes) == 0:
            raise BadShard("a data set must hold at least one sample, found none; write it again")
        self.num_samples = sum(sizes)
        self.seed = seed
        self._window = window
        self._starts = np.concatenate([[0], np.cumsum(sizes)])
        self._epochs: OrderedDict[int, NDArray[np.int64]] = OrderedDict()

    def at(self, position: int) -> tuple[int, int]:
        """Epoch and sample index at a position."""
        epoch, place = divmod(position, self.num_samples)
        return epoch, int(self._order(epoch)[place])

    def generator(self, *tags: str | int) -> np.random.Generator:
        """A generator of its own for every combination of tags."""
        key = hashlib.sha256(repr((self.seed, *tags)).encode()).digest()[:16]
        return np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))

    def sample_seed(self, epoch: int, index: int) -> int:
        """The seed of a sample in an epoch, in [0, 2^63)."""
        return int(self.generator("sample", epoch, index).integers(2**63))

    def _order(self, epoch: int) -> NDArray[np.int64]:
        """All sample indices in the order of an epoch."""
        if epoch not in self._epochs:
            draw = self.generator("epoch", epoch)
            shards = draw.permutation(len(self._starts) - 1)
            windows = [
                draw.permutation(
                    np.concatenate(
                        [
                            np.arange(self._starts[shard], self._starts[shard + 1])
                            for shard in shards[first : first + self._window]
                        ]
                    )
                )
                for first in range(0, len(shards), self._window)
            ]
            self._epochs[epoch] = np.concatenate(windows)
            if len(self._epochs) > 2:  # a batch touches two epochs at most, or a few if tiny
                self._epochs.popitem(last=False)
        return self._epochs[epoch]
