"""What passes between a KV cache and its policy: tokens, a block that enters, an eviction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import Projected
from models.kv_storage import Storage

if TYPE_CHECKING:
    from models.kv_spec import CacheSpec
    from models.salience import SalienceHead


@dataclass
class Tokens:
    """Cached tokens of one layer: those of the budget oldest first, others as they were evicted.

    Attributes:
        parts: Keys before rotation and values as they are stored, token axis 2.  [B, N, S, *]
        positions: (frame, row, column).  [B, S, 3]
        features: Columns the policy gave each token.  [B, S, K]
        storage: What `parts` are to keys and values.
        calibration: Of the storage, made from the layer's first tokens.
        dtype: Of keys and values when they are read.
    """

    parts: dict[str, Tensor]
    positions: Tensor
    features: Tensor
    storage: Storage
    calibration: dict[str, Tensor]
    dtype: torch.dtype

    @property
    def count(self) -> int:
        """Tokens of a sample."""
        return self.positions.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of keys and values as stored."""
        return sum(part.numel() * part.element_size() for part in self.parts.values())

    def read(self) -> tuple[Tensor, Tensor]:
        """Keys before rotation and values.  [B, N, S, D] each."""
        return self.storage.decode(self.parts, self.calibration, self.dtype)

    def select(self, indices: Tensor) -> Tokens:
        """The tokens at `indices` of each sample.  [B, k]."""
        return replace(
            self,
            parts={name: _gather(part, indices, 2) for name, part in self.parts.items()},
            positions=_gather(self.positions, indices, 1),
            features=_gather(self.features, indices, 1),
        )

    def span(self, start: int, stop: int) -> Tokens:
        """The tokens from `start` to before `stop`: views."""
        return replace(
            self,
            parts={name: part[:, :, start:stop] for name, part in self.parts.items()},
            positions=self.positions[:, start:stop],
            features=self.features[:, start:stop],
        )

    def extend(self, newer: Tokens) -> Tokens:
        """These tokens and then `newer` ones of the same storage."""
        return replace(
            self,
            parts={
                name: torch.cat([part, newer.parts[name]], 2) for name, part in self.parts.items()
            },
            positions=torch.cat([self.positions, newer.positions], 1),
            features=torch.cat([self.features, newer.features], 1),
        )

    def to(self, device: torch.device | str) -> Tokens:
        """The same tokens on a device."""
        return replace(
            self,
            parts={name: part.to(device) for name, part in self.parts.items()},
            positions=self.positions.to(device),
            features=self.features.to(device),
            calibration={name: part.to(device) for name, part in self.calibration.items()},
        )

    def stored_as(self, storage: Storage, calibration: dict[str, Tensor]) -> Tokens:
        """The same tokens in another storage."""
        parts = storage.encode(*self.read(), calibration)
        return replace(self, parts=parts, storage=storage, calibration=calibration)


def _gather(x: Tensor, indices: Tensor, axis: int) -> Tensor:
    if len(indices) == 1:  # whole rows at once, several times faster
        return x.index_select(axis, indices[0])
    shape = [1] * x.dim()
    shape[0], shape[axis] = indices.shape
    expanded = indices.view(shape).expand(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return x.gather(axis, expanded)


@dataclass
class Entering:
    """One block's tokens of one layer as they enter the cache, after its clean pass.

    Attributes:
        layer: Number of the layer.
        hidden: The layer's input.  [B, S, E]
        positions: (frame, row, column).  [B, S, 3]
        seeds: Seed of each sample.  [B]
        projected: Queries, keys and values.
        match_prompt: Makes the similarity of each token to the prompt.  [B, S]
        head: The salience head, or None where no policy needs it.
        targets: True salience of the tokens, or None where no policy needs it.  [B, S, 3]
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    seeds: Tensor
    projected: Projected
    match_prompt: Callable[[], Tensor]
    head: SalienceHead | None = None
    targets: Tensor | None = None


@dataclass
class Eviction:
    """One layer's tokens that exceed the budget, and what a policy may know when it decides.

    Attributes:
        tokens: Oldest first; those in 4 bits in the order in which they were evicted.
        budget: How many may stay.
        age: Blocks since each token's block, 0 for the newest.  [B, S]
        protected: Tokens that must stay: sink and recent frames.  [B, S]
        num_frames: Of the video so far.
        new_frames: How many of them the newest block has.
        grid: Token (rows, columns) of a frame.
        spec: Of the cache.
        memory: What `remember` keeps of the layer; None if nothing.
        key_angles: With which the coming block will read the tokens.  [B, S, D / 2]
        query_angles: Of the coming block's queries.  [Q, D / 2]
    """

    tokens: Tokens
    budget: int
    age: Tensor
    protected: Tensor
    num_frames: int
    new_frames: int
    grid: tuple[int, int]
    spec: CacheSpec
    memory: Tensor | None
    key_angles: Callable[[], Tensor]
    query_angles: Callable[[], Tensor]
