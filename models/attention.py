"""Rotary positions over (frame, row, column), self- and cross-attention of Wan2.1, causal masks."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def rotary_axis_sizes(head_dim: int) -> tuple[int, int, int]:
    """Channels of a head that encode frame, row and column: Wan's rule, 44/42/42 of 128."""
    spatial = 2 * (head_dim // 6)
    return head_dim - 2 * spatial, spatial, spatial


def rotary_angles(positions: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angle of every channel pair at every position; no table, hence no longest video.

    Args:
        positions: (frame, row, column) of each token, any integer or float dtype.  [..., 3]
        head_dim: Channels of a head, even.
        theta: Base of the frequencies; each axis uses theta ** (-2 i / channels of the axis).

    Returns:
        Unit complex numbers, computed in float64.  [..., head_dim / 2]
    """
    parts = []
    for axis, size in enumerate(rotary_axis_sizes(head_dim)):
        exponent = torch.arange(0, size, 2, dtype=torch.float64, device=positions.device) / size
        parts.append(positions[..., axis : axis + 1].double() * theta**-exponent)
    angles = torch.cat(parts, dim=-1)
    return torch.polar(torch.ones_like(angles), angles).to(torch.complex64)


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate interleaved channel pairs (2 i, 2 i + 1).

    Args:
        x: Queries or keys.  [B, N, S, D]
        angles: From `rotary_angles`.  [S, D / 2] or [B, S, D / 2]

    Returns:
        Same shape and dtype as `x`; computed in float32.
    """
    if angles.dim() == 3:
        angles = angles[:, None]  # one set of angles for all heads of a sample
    pairs = torch.view_as_complex(split_pairs(x))
    return torch.view_as_real(pairs * angles).flatten(-2).to(x.dtype)


def split_pairs(x: Tensor) -> Tensor:
    """The channel pairs that are rotated together, float32.  [..., D] to [..., D / 2, 2]."""
    return x.float().unflatten(-1, (-1, 2))


def grid_positions(frames: Tensor, height: int, width: int) -> Tensor:
    """(frame, row, column) of the tokens of some frames, frame slowest.

    Args:
        frames: Number of each frame in the video.  [F]
        height: Token rows of a frame.
        width: Token columns of a frame.

    Returns:
        int64.  [F * height * width, 3]
    """
    rows = torch.arange(height, device=frames.device)
    columns = torch.arange(width, device=frames.device)
    return torch.cartesian_prod(frames, rows, columns)


def block_causal_mask(num_blocks: int, block_len: int) -> Tensor:
    """True where query i may read key j: j's block is not after i's.  [S, S]."""
    block = torch.arange(num_blocks).repeat_interleave(block_len)
    return block[:, None] >= block[None, :]


SPAN_BLOCKS, SPAN_TOKENS = 4, 512
"""Most blocks of a span of queries, and most tokens if it has several blocks."""


@dataclass
class QueryGroup:
    """The queries of one span of [clean | noisy]: a sparse mask is a list of these.

    Clean and noisy queries of the span read the clean tokens up to its end and its own noisy
    tokens.

    Attributes:
        size: Tokens of the span in either half.
        mask: True where a query of the group may read a key of the group.  [B, 1, Q, K]
    """

    size: int
    mask: Tensor


def teacher_forcing_spans(num_blocks: int, block_len: int) -> list[int]:
    """How many blocks each span of queries has under teacher forcing.

    The keys of a span are those of its last block: longer spans mean fewer calls, and more pairs
    that are computed and masked.
    """
    most = min(SPAN_BLOCKS, max(1, SPAN_TOKENS // block_len))
    count = -(-num_blocks // most)
    bounds = [num_blocks * i // count for i in range(count + 1)]
    return [stop - start for start, stop in itertools.pairwise(bounds)]


def group_teacher_forcing(
    visible: Tensor, block_len: int, spans: Sequence[int]
) -> list[QueryGroup]:
    """Mask of the sequence [clean | noisy] that trains all blocks of a video in one pass.

    A clean query reads the clean tokens of its own and earlier blocks; a noisy query reads the
    clean tokens of earlier blocks and the noisy tokens of its own. `visible` takes old clean
    tokens away, as an evicting cache would.

    Args:
        visible: Whether a query may read an earlier clean token.  [B, S, S] or [1, S, S]
        block_len: Tokens of a block.
        spans: Blocks of each group of queries, such as `teacher_forcing_spans`.
    """
    block = torch.arange(visible.shape[-1], device=visible.device) // block_len
    groups, start = [], 0
    for blocks in spans:
        stop = start + blocks * block_len
        age = block[start:stop, None] - block[:stop]
        earlier, own = visible[:, start:stop, :stop] & (age > 0), age == 0
        unread = torch.zeros_like(earlier[..., start:])
        clean = torch.cat([earlier | own, unread], dim=2)
        noisy = torch.cat([earlier, own[:, start:].expand_as(unread)], dim=2)
        groups.append(QueryGroup(stop - start, torch.cat([clean, noisy], dim=1)[:, None]))
        start = stop
    return groups


@dataclass(frozen=True)
class Projected:
    """What self-attention makes of a layer's tokens; [B, N, S, D] each.

    Attributes:
        queries: Before rotation.
        rotated_queries: As they read.
        keys: Before rotation.
        rotated_keys: As they are read.
        values: Never rotated.
    """

    queries: Tensor
    rotated_queries: Tensor
    keys: Tensor
    rotated_keys: Tensor
    values: Tensor

    def detached(self) -> "Projected":
        """Without gradient."""
        return Projected(*(getattr(self, entry.name).detach() for entry in fields(self)))


class RMSNorm(nn.Module):
    """Root-mean-square norm with statistics in float32 and a learned weight."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise the last axis; the result has the precision of `x`, also under autocast."""
        scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + self.eps)
        return (x.float() * scale).to(x.dtype) * self.weight.to(x.dtype)


class Attention(nn.Module):
    """Projections shared by self- and cross-attention: q, k, v, o and the norms of q and k.

    The norms run over the full width, all heads together, as in Wan2.1.
    """

    def __init__(self, num_heads: int, head_dim: int, eps: float) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads = num_heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)
        self.norm_q = RMSNorm(width, eps)
        self.norm_k = RMSNorm(width, eps)

    def split_heads(self, x: Tensor) -> Tensor:
        """[B, S, E] to [B, N, S, D]."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def project(self, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalised queries of `x`, normalised keys and raw values of `context`.  [B, N, S, D]."""
        queries = self.split_heads(self.norm_q(self.q(x)))
        keys = self.split_heads(self.norm_k(self.k(context)))
        return queries, keys, self.split_heads(self.v(context))

    def merge(self, attended: Tensor) -> Tensor:
        """Output projection of [B, N, S, D], as [B, S, E]."""
        return self.o(attended.transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Cross-attention of `x` over `context`, no mask: padded text rows are attended too."""
        queries, keys, values = self.project(x, context)
        return self.merge(F.scaled_dot_product_attention(queries, keys, values))


def attend(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    mask: Tensor | list[QueryGroup] | None = None,
    observe: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Softmax attention.

    Args:
        queries: [B, N, Q, D]
        keys: [B, N, S, D]
        values: [B, N, S, D]
        mask: Added to the scores, broadcastable to [B, N, Q, S], see `additive_mask`; or groups
            with such masks. The queries may be the last ones only.
        observe: Called with what each key received, summed over queries, without gradient.
            [B, N, S]
    """
    if not queries.shape[2]:
        return queries
    if isinstance(mask, list):
        return _attend_in_groups(queries, keys, values, mask)
    if mask is not None:
        mask = mask[..., -queries.shape[2] :, :]
    if observe is not None:
        observe(attention_received(queries, keys, mask))
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)


@torch.no_grad()
def attention_received(
    queries: Tensor, keys: Tensor, mask: Tensor | None = None, *, max_tile_values: int = 1 << 24
) -> Tensor:
    """Attention probability of each key summed over queries, streamed over tiles of queries.

    Args:
        queries: [B, N, Q, D]
        keys: [B, N, S, D]
        mask: Added to the scores, alike for all queries.  [B, 1, 1, S]
        max_tile_values: Probabilities held at once.

    Returns:
        float32.  [B, N, S]
    """
    received = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
    rows = max(1, max_tile_values // received.numel())
    scaled = queries.detach() * queries.shape[-1] ** -0.5
    for tile in scaled.split(rows, dim=2):
        scores = (tile @ keys.detach().transpose(-1, -2)).float()  # as precise as attention itself
        if mask is not None:
            scores += mask.float()
        received += scores.softmax(dim=-1).sum(dim=2)
    return received


def _attend_in_groups(
    queries: Tensor, keys: Tensor, values: Tensor, groups: list[QueryGroup]
) -> Tensor:
    # Splits rather than slices: a slice costs a zero-filled gradient of the whole sequence.
    sizes = [group.size for group in groups]
    halves = queries.shape[2] // sum(sizes)  # 2, or 1: noisy queries only
    spans = queries.unflatten(2, (halves, -1)).split(sizes, dim=3)
    clean_keys, noisy_keys = (half.split(sizes, dim=2) for half in keys.chunk(2, dim=2))
    clean_values, noisy_values = (half.split(sizes, dim=2) for half in values.chunk(2, dim=2))
    attended = [
        F.scaled_dot_product_attention(
            span.flatten(2, 3),
            torch.cat([*clean_keys[: i + 1], noisy_keys[i]], dim=2),
            torch.cat([*clean_values[: i + 1], noisy_values[i]], dim=2),
            attn_mask=group.mask[:, :, -halves * group.size :],
        ).unflatten(2, (halves, -1))
        for i, (span, group) in enumerate(zip(spans, groups, strict=True))
    ]
    return torch.cat(attended, dim=3).flatten(2, 3)


def additive_mask(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where a query may read a key, minus infinity elsewhere."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
