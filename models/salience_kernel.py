"""Triton kernel of the salience pass: running maxima over Q K^T, on tensor cores.

One program holds a tile of keys of one head and walks over all queries. A tile of scores lives in
registers only; per key three maxima remain. `models.salience_targets` says what they mean.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

IS_INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run as plain Python on CPU tensors (TRITON_INTERPRET=1 before the import)."""

CONFIGS = [
    triton.Config({"KEYS": keys, "QUERIES": queries}, num_warps=warps, num_stages=stages)
    for keys, queries, warps, stages in (
        (128, 128, 8, 3),
        (128, 64, 4, 3),
        (128, 64, 8, 4),
        (64, 128, 4, 3),
        (64, 64, 4, 4),
        (64, 32, 4, 2),  # fits float32, whose tiles are twice as large
    )
]
SMALL = [triton.Config({"KEYS": 32, "QUERIES": 16})]
"""The interpreter has nothing to tune by."""


@triton.jit
def _strongest(
    read: Any,
    queries: Any,
    lse: Any,
    start: Any,
    stop: Any,
    stride: Any,
    scale: Any,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
    UPCAST: tl.constexpr,
) -> Any:
    """Largest log probability that queries from `start` to `stop` give each key of a tile."""
    best = tl.full((KEYS,), float("-inf"), tl.float32)
    channels = tl.arange(0, WIDTH)
    for first in range(start, stop, QUERIES):
        rows = first + tl.arange(0, QUERIES)
        is_inside = rows < stop
        places = rows[None, :] * stride + channels[:, None]
        tile = tl.load(
            queries + places, mask=is_inside[None, :] & (channels[:, None] < HEAD_DIM), other=0.0
        )  # [WIDTH, QUERIES]
        if UPCAST:
            tile = tile.to(tl.float32)
        # An infinite log-sum-exp makes the probability of a row outside 0, without any mask.
        norm = tl.load(lse + rows, mask=is_inside, other=float("inf"))
        scores = tl.dot(read, tile, input_precision="ieee") * scale - norm[None, :]
        best = tl.maximum(best, tl.max(scores, 1))
    return best


@triton.autotune(configs=SMALL if IS_INTERPRETED else CONFIGS, key=["HEAD_DIM"])
@triton.jit
def _strongest_reads(
    queries: Any,
    keys: Any,
    lse: Any,
    best: Any,
    heads: Any,
    num_tokens: Any,
    block_len: Any,
    sample_stride_q: Any,
    head_stride_q: Any,
    stride_q: Any,
    sample_stride_k: Any,
    head_stride_k: Any,
    stride_k: Any,
    scale: Any,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    UPCAST: tl.constexpr,
    KEYS: tl.constexpr,
    QUERIES: tl.constexpr,
) -> None:
    """Maxima of one tile of keys: queries before its blocks, after them, then block by block.

    Queries of earlier and later blocks than any of the tile need no mask; where the tile straddles
    bounds of blocks, each block in it makes one maximum, which goes to the part that it is for each
    key.
    """
    head = tl.program_id(1).to(tl.int64)
    sample, within_sample = head // heads, head % heads
    queries += sample * sample_stride_q + within_sample * head_stride_q
    keys += sample * sample_stride_k + within_sample * head_stride_k
    lse += head * num_tokens
    begin = tl.program_id(0) * KEYS
    tokens = begin + tl.arange(0, KEYS)
    channels = tl.arange(0, WIDTH)
    read = tl.load(
        keys + tokens[:, None].to(tl.int64) * stride_k + channels[None, :],
        mask=(tokens < num_tokens)[:, None] & (channels < HEAD_DIM)[None, :],
        other=0.0,
    )  # [KEYS, WIDTH]
    if UPCAST:
        read = read.to(tl.float32)
    last = tl.minimum(begin + KEYS, num_tokens) - 1
    first_block, last_block = begin // block_len, last // block_len
    before = first_block * block_len
    after = tl.minimum((last_block + 1) * block_len, num_tokens)
    earlier = _strongest(read, queries, lse, 0, before, stride_q, scale,
                         HEAD_DIM, WIDTH, KEYS, QUERIES, UPCAST)  # fmt: skip
    later = _strongest(read, queries, lse, after, num_tokens, stride_q, scale,
                       HEAD_DIM, WIDTH, KEYS, QUERIES, UPCAST)  # fmt: skip
    within = tl.full((KEYS,), float("-inf"), tl.float32)
    own = tokens // block_len
    for block in range(first_block, last_block + 1):
        start = block * block_len
        found = _strongest(read, queries, lse, start, tl.minimum(start + block_len, num_tokens),
                           stride_q, scale,
                           HEAD_DIM, WIDTH, KEYS, QUERIES, UPCAST)  # fmt: skip
        later = tl.where(own < block, tl.maximum(later, found), later)
        within = tl.where(own == block, found, within)
        earlier = tl.where(own > block, tl.maximum(earlier, found), earlier)
    part = tl.num_programs(1).to(tl.int64) * num_tokens
    best += head * num_tokens + tokens
    tl.store(best, later, mask=tokens < num_tokens)
    tl.store(best + part, within, mask=tokens < num_tokens)
    tl.store(best + 2 * part, earlier, mask=tokens < num_tokens)


def strongest_reads(queries: Tensor, keys: Tensor, lse: Tensor, block_len: int) -> Tensor:
    """Same as `models.salience_targets.strongest_reads`, in one kernel.

    Half types are multiplied as they are and summed in float32. In the interpreter they are raised
    to float32 first: its arithmetic in bfloat16 is wrong.

    Args:
        queries: [B, N, S, D]
        keys: [B, N, S, D]
        lse: Of the rows of the scaled scores.  [B, N, S]
        block_len: Tokens of a block.

    Returns:
        Later, within, earlier; minus infinity where there is no query.  [3, B, N, S]

    Raises:
        ValueError: If the tensors are not on a CUDA device and the interpreter is off.
    """
    if queries.device.type != "cuda" and not IS_INTERPRETED:
        raise ValueError(
            f"tensors of backend 'triton' must be on a CUDA device, found {queries.device}; take "
            "'torch' or set TRITON_INTERPRET=1"
        )
    queries, keys = (x if x.stride(-1) == 1 else x.contiguous() for x in (queries, keys))
    batch, heads, num_tokens, head_dim = queries.shape
    best = lse.new_empty(3, batch, heads, num_tokens)
    _strongest_reads[lambda chosen: (triton.cdiv(num_tokens, chosen["KEYS"]), batch * heads)](
        queries.detach(),
        keys.detach(),
        lse.contiguous(),
        best,
        heads,
        num_tokens,
        block_len,
        *queries.stride()[:3],
        *keys.stride()[:3],
        head_dim**-0.5,
        HEAD_DIM=head_dim,
        WIDTH=max(16, triton.next_power_of_2(head_dim)),
        UPCAST=IS_INTERPRETED or queries.dtype == torch.float64,
    )
    return best
