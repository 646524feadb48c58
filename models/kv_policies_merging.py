"""Cache policies that do not only choose: tokens are merged or pooled into fewer ones."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kv_policy import CachePolicy, nearest, pointed_at
from models.kv_tokens import Entering, Eviction, Tokens


@dataclass
class KeyMerge(CachePolicy):
    """Merge a token into the newer token that it resembles most, instead of dropping it.

    The tokens with the largest cosine to a newer one (keys before rotation, all heads joined) go
    first. Key and value of the newer become the mean over all tokens it stands for, and its
    attention score gains log(their number), so that merging exact copies read at one place changes
    nothing. Ties go oldest first.

    Source: TempCache of FAST-AR, arXiv:2602.01801 (temporally corresponding keys are merged). That
    similarity alone decides what corresponds, and that the merged token stands at the newer place,
    is our reading. On CUDA the order of the sums is fixed only under
    `torch.use_deterministic_algorithms`.
    """

    name: ClassVar[str] = "key_merge"
    changes_tokens: ClassVar[bool] = True

    def enter(self, entering: Entering) -> Tensor:
        """How many tokens each stands for.  [B, S, 1]."""
        return entering.hidden.new_ones((*entering.positions.shape[:2], 1), dtype=torch.float32)

    def logit_bias(self, tokens: Tokens) -> Tensor:
        """Log of the number of tokens merged."""
        return tokens.features[..., 0].log()

    def evict(self, eviction: Eviction) -> tuple[Tokens, Tensor]:
        """Merge as many as exceed the budget."""
        tokens, surplus = eviction.tokens, eviction.tokens.count - eviction.budget
        keys, values = tokens.read()
        similarity, target = nearest(keys, keys, frames=tokens.positions[..., 0])
        similarity = similarity.masked_fill(eviction.protected, -torch.inf)
        order = similarity.argsort(dim=1, descending=True, stable=True)
        goes = torch.zeros_like(eviction.protected).scatter(1, order[:, :surplus], True)
        for _ in range(math.ceil(math.log2(tokens.count))):  # a target may itself have one
            onward = goes.gather(1, target)
            target = torch.where(onward, target.gather(1, target), target)
        weight = tokens.features[..., 0]
        target = torch.where(goes, target, torch.arange(tokens.count, device=target.device))
        total = torch.zeros_like(weight).scatter_add(1, target, weight)
        kept = (~goes).long().argsort(dim=1, descending=True, stable=True)
        kept = kept[:, : eviction.budget]
        merged = replace(
            tokens.select(kept),
            parts=tokens.storage.encode(
                _mean_over(keys, target, weight, total, kept),
                _mean_over(values, target, weight, total, kept),
                tokens.calibration,
            ),
            features=total.gather(1, kept)[..., None],
        )
        return merged, order[:, :0]


def _mean_over(x: Tensor, target: Tensor, weight: Tensor, total: Tensor, kept: Tensor) -> Tensor:
    """Weighted mean of all tokens with the same target, at the kept ones.  [B, N, S, D]."""
    index = target[:, None, :, None].expand_as(x)
    summed = torch.zeros_like(x, dtype=torch.float32).scatter_add(
        2, index, x.float() * weight[:, None, :, None]
    )
    mean = summed / total.clamp(min=1)[:, None, :, None]
    chosen = kept[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return mean.gather(2, chosen).to(x.dtype)


@dataclass
class CompressedMid(CachePolicy):
    """First frames and newest frames whole, what lies between pooled, and the best of that kept.

    When a frame leaves the recent frames, the tokens of each window of `pool` rows and columns
    become one: mean key (before rotation) and mean value, at the window's centre. Of the pooled
    tokens those stay to which the newest block's queries point most (mean over queries and heads of
    q . k, both rotated).

    Source: PackForcing, arXiv:2603.25730 (sink, compressed mid, recent, top-k of mid). It
    compresses by a trained 3D convolution, 32 times; mean pooling in its place is ours, and so is
    that what is not among the best is gone, as the budget holds at all times.

    Attributes:
        pool: Token rows and columns of a window.
    """

    name: ClassVar[str] = "compressed_mid"
    changes_tokens: ClassVar[bool] = True
    acts_every_block: ClassVar[bool] = True
    pool: tuple[int, int] = (2, 2)

    def __post_init__(self) -> None:
        if min(self.pool) < 1:
            raise ValueError(
                f"pool of policy 'compressed_mid' must be at least 1 x 1, got {self.pool}"
            )

    def enter(self, entering: Entering) -> Tensor:
        """How much the block's own queries point at it.  [B, S, 1]."""
        return pointed_at(entering.projected.rotated_queries, entering.projected.rotated_keys)[
            ..., None
        ]

    def renew(self, held: Tokens, rotated_keys: Callable[[], Tensor], entering: Entering) -> Tensor:
        """How much the newest queries point at it."""
        return pointed_at(entering.projected.rotated_queries, rotated_keys())[..., None]

    def evict(self, eviction: Eviction) -> tuple[Tokens, Tensor]:
        """Pool the frames that have just left the recent ones, then keep the best of the middle."""
        tokens, spec = eviction.tokens, eviction.spec
        recent = spec.protected_frames
        left = [
            max(spec.sink_frames, end - recent)
            for end in (eviction.num_frames - eviction.new_frames, eviction.num_frames)
        ]
        per_frame = spec.tokens_per_frame
        sink = min(spec.sink_frames, eviction.num_frames) * per_frame
        newest = tokens.count - min(recent * per_frame, tokens.count - sink)
        leaving = max(sink, newest - (left[1] - left[0]) * per_frame)
        parts = [tokens.span(0, sink), tokens.span(sink, leaving)]
        if leaving < newest:
            parts.append(self._pool(tokens.span(leaving, newest), eviction.grid))
        middle = parts[1] if len(parts) == 2 else parts[1].extend(parts[2])
        room = eviction.budget - sink - (tokens.count - newest)
        if middle.count > room:
            order = middle.features[..., 0].argsort(dim=1, descending=True, stable=True)
            middle = middle.select(order[:, :room].sort(dim=1).values)
        kept = parts[0].extend(middle).extend(tokens.span(newest, tokens.count))
        return kept, kept.positions.new_zeros(len(kept.positions), 0)

    def _pool(self, tokens: Tokens, grid: tuple[int, int]) -> Tokens:
        """Whole frames to one token per window."""
        size = (min(self.pool[0], grid[0]), min(self.pool[1], grid[1]))
        keys, values = tokens.read()
        tall = positions_of_windows(tokens.positions, grid, size)
        return replace(
            tokens,
            parts=tokens.storage.encode(
                _mean_of_windows(keys, grid, size),
                _mean_of_windows(values, grid, size),
                tokens.calibration,
            ),
            positions=tall,
            features=_mean_of_windows(tokens.features[:, None], grid, size)[:, 0],
        )


def _mean_of_windows(x: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Mean over windows of a frame; those at the edge may be smaller.  [B, N, F * P, D]."""
    frames = x.unflatten(2, (-1, *grid)).flatten(0, 2).permute(0, 3, 1, 2).float()
    pooled = F.avg_pool2d(frames, size, ceil_mode=True, count_include_pad=False)
    return pooled.flatten(2).transpose(1, 2).unflatten(0, (*x.shape[:2], -1)).flatten(2, 3).to(x)


def positions_of_windows(positions: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """(frame, row, column) of the centre of each window of whole frames, rounded down.

    Args:
        positions: Of all tokens, frame slowest.  [B, F * rows * columns, 3]
        grid: Rows and columns of a frame.
        size: Rows and columns of a window.
    """
    rows, columns = (
        [(start + min(start + step, total) - 1) // 2 for start in range(0, total, step)]
        for total, step in zip(grid, size, strict=True)
    )
    places = [row * grid[1] + column for row in rows for column in columns]
    frames = positions.unflatten(1, (-1, grid[0] * grid[1]))
    return torch.stack([frames[:, :, place] for place in places], dim=2).flatten(1, 2)
