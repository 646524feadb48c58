"""Where a layer's cached tokens lie, and how one pass of attention reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from models.attention import attend
from models.ispa import GapStatistics, modulate
from models.kv_tokens import Tokens


class TokenMemory:
    """Tokens of one layer, oldest first.

    Without a capacity every change makes new tensors and none is ever written to, so that autograd
    and the recomputation of a forward pass see the past as it was. With one, memory is taken once
    and filled in place, for generation; a growing one doubles when it is full.

    Args:
        capacity: Tokens that fit; None for new tensors at every change.
        is_growing: Whether `capacity` is only the first one.
    """

    def __init__(self, capacity: int | None = None, *, is_growing: bool = False) -> None:
        self.capacity, self.is_growing = capacity, is_growing
        self.tokens: Tokens | None = None
        self.room: Tokens | None = None

    @property
    def count(self) -> int:
        """Tokens held."""
        return 0 if self.tokens is None else self.tokens.count

    def extend(self, newer: Tokens) -> None:
        """Add tokens behind those that are there."""
        if self.capacity is None:
            self.tokens = newer if self.tokens is None else self.tokens.extend(newer)
            return
        total = self.count + newer.count
        if self.room is None or total > self.room.positions.shape[1]:
            self._take_room(newer, total)
        assert self.room is not None
        if self.tokens is None:  # cleared memory may be measured anew
            self.room = replace(self.room, calibration=newer.calibration)
        _write(self.room.span(self.count, total), newer)
        self.tokens = self.room.span(0, total)

    def replace(self, tokens: Tokens) -> None:
        """Hold these tokens, none of whose tensors may be part of this memory."""
        if self.capacity is None:
            self.tokens = tokens
            return
        assert self.room is not None
        _write(self.room.span(0, tokens.count), tokens)
        self.tokens = self.room.span(0, tokens.count)

    def set_features(self, features: Tensor) -> None:
        """Give the tokens new features."""
        assert self.tokens is not None
        if self.capacity is None:
            self.tokens = replace(self.tokens, features=features)
        elif features is not self.tokens.features:
            self.tokens.features.copy_(features)

    def clear(self) -> None:
        """Forget the tokens; memory that was taken is kept."""
        self.tokens = None

    def _take_room(self, like: Tokens, needed: int) -> None:
        assert self.capacity is not None
        if needed > self.capacity:
            assert self.is_growing, "a bounded layer holds its budget and a block"
            self.capacity = max(needed, 2 * self.capacity)
        old = self.tokens
        self.room = _empty_like(like, self.capacity)
        if old is not None:
            _write(self.room.span(0, old.count), old)


def _empty_like(tokens: Tokens, count: int) -> Tokens:
    def sized(x: Tensor, axis: int) -> Tensor:
        return x.new_zeros((*x.shape[:axis], count, *x.shape[axis + 1 :]))

    return replace(
        tokens,
        parts={name: sized(part, 2) for name, part in tokens.parts.items()},
        positions=sized(tokens.positions, 1),
        features=sized(tokens.features, 1),
    )


def _write(target: Tokens, tokens: Tokens) -> None:
    for name, part in tokens.parts.items():
        target.parts[name].copy_(part)
    target.positions.copy_(tokens.positions)
    target.features.copy_(tokens.features)


@dataclass
class Attending:
    """What happens around attention over the past besides attention.

    Attributes:
        observe: Called with the attention that each past token receives, summed over queries and
            mean over heads, [B, P]; None where nobody asks.
        modulation: ISPA's, applied to the output.  [B, E, E]
        gap: Where the gap between full and local attention is gathered; None outside the warm-up.
        is_local: Past tokens within the local window, while a gap is gathered.  [B, P]
    """

    observe: Callable[[Tensor], None] | None = None
    modulation: Tensor | None = None
    gap: GapStatistics | None = None
    is_local: Tensor | None = None


@dataclass(frozen=True)
class Past:
    """What one forward pass reads of one layer's past.

    Attributes:
        keys: Rotated.  [B, N, P, D]
        values: [B, N, P, D]
        bias: Added to the scores of the past tokens, or None.  [B, P]
        extras: See `Attending`.
        room: Preallocated keys and values that begin with `keys` and `values` and have room for a
            block behind them; None where joining makes new tensors.
    """

    keys: Tensor
    values: Tensor
    bias: Tensor | None
    extras: Attending
    room: tuple[Tensor, Tensor] | None = None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the current block over the past and its own tokens.

        Args:
            queries: Rotated; the last ones of the block, or none.  [B, N, Q, D]
            keys: Rotated, of the whole block.  [B, N, S, D]
            values: Of the whole block.  [B, N, S, D]
        """
        if not queries.shape[2]:
            return queries
        extras, own, held = self.extras, keys.shape[2], self.keys.shape[2]
        all_keys, all_values = self._joined(keys, values)
        bias = None
        if self.bias is not None:
            bias = F.pad(self.bias, (0, own))[:, None, None].to(queries.dtype)
        # A recomputation within the backward pass must not count twice.
        counts = torch._C._current_graph_task_id() == -1

        def observe(mass: Tensor) -> None:
            assert extras.observe is not None
            extras.observe(mass[..., :held].mean(1))

        watched = observe if extras.observe is not None and counts else None
        attended = attend(queries, all_keys, all_values, mask=bias, observe=watched)
        if extras.gap is not None and counts:
            assert extras.is_local is not None
            near = F.pad(extras.is_local, (0, own), value=True)[:, None, None]
            with torch.no_grad():
                local = F.scaled_dot_product_attention(
                    queries, all_keys, all_values, attn_mask=near
                )
            extras.gap.update(full=attended, local=local)
        if extras.modulation is not None:
            attended = modulate(attended, extras.modulation)
        return attended

    def _joined(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.room is None:
            return torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        if keys.requires_grad:
            raise ValueError(
                "a preallocated cache must be read without gradients, got keys that require one; "
                "set preallocate=False for training, or use torch.no_grad"
            )
        held, total = self.keys.shape[2], self.keys.shape[2] + keys.shape[2]
        self.room[0][:, :, held:total].copy_(keys)
        self.room[1][:, :, held:total].copy_(values)
        return self.room[0][:, :, :total], self.room[1][:, :, :total]
