"""Salience targets, exact, from one attention forward of a bidirectional teacher.

The attention forward already knows the log-sum-exp of every row of its scores, so that
log max_i P[i, j] = max_i (s[i, j] - lse[i]) needs the scores once more and nothing else: one pass
of tiles over Q K^T that keeps a running maximum per key and part. The probabilities never exist;
memory is O(S).

Source of the three parts: PaFu-KV, arXiv:2601.21896 (s_low, s_diag, s_up); the streaming is ours.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from types import TracebackType
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from models.transformer import VideoTransformer

BACKENDS = ("auto", "torch", "triton")
TILE = 1024
"""Queries and keys of a tile in plain torch: 4 MB of scores, which the caches of a core hold."""


def attend_with_targets(
    queries: Tensor, keys: Tensor, values: Tensor, block_len: int, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Softmax attention, and how strongly every key was read.

    Autocast changes nothing: none of these operators heeds it. Gradients reach the output as they
    do through plain attention; the targets carry none.

    Args:
        queries: Rotated.  [B, N, S, D]
        keys: Rotated, same dtype as the queries.  [B, N, S, D]
        values: [B, N, S, D]
        block_len: Tokens of a block; the last block may be shorter.
        backend: `torch` works on any device, `triton` is the kernel for CUDA; `auto` takes
            `triton` for CUDA tensors where the package is installed, else `torch`.

    Returns:
        The output, dtype of the values  [B, N, S, D]; and the mean over heads of the maximum over
        queries of the probability for `later`, `within` and `earlier`, float32, NaN where no query
        of that part exists (`later` in the last block, `earlier` in the first): an empty set has
        no salience, not salience 0.  [B, S, 3]

    Raises:
        ValueError: If shapes, dtypes, block length or back end do not fit.
    """
    _check(queries, keys, values, block_len)
    backend = _chosen(backend, queries.device)
    attended, lse = attend_with_lse(queries, keys, values.to(queries.dtype))
    if backend == "triton":
        from models.salience_kernel import strongest_reads as strongest_reads_triton

        best = strongest_reads_triton(queries, keys, lse, block_len)
    else:
        best = strongest_reads(queries, keys, lse, block_len)
    targets = best.exp().mean(dim=2).permute(1, 2, 0)  # [B, S, 3]
    empty = best.isneginf().all(dim=2).permute(1, 2, 0)
    return attended.to(values.dtype), targets.masked_fill(empty, torch.nan)


def _check(queries: Tensor, keys: Tensor, values: Tensor, block_len: int) -> None:
    if queries.dim() != 4 or not queries.shape == keys.shape == values.shape:
        shapes = [tuple(x.shape) for x in (queries, keys, values)]
        raise ValueError(
            f"queries, keys and values must have one shape [B, N, S, D], found {shapes}; targets "
            "need every query of a bidirectional pass, without a cache"
        )
    if queries.dtype != keys.dtype or not queries.is_floating_point():
        raise ValueError(
            f"queries and keys must have one floating dtype, found {queries.dtype} and "
            f"{keys.dtype}; convert one of them"
        )
    if block_len < 1:
        raise ValueError(f"block_len must be at least 1 token, found {block_len}; raise it")


def _chosen(backend: str, device: torch.device) -> str:
    """The back end that a name stands for on a device."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {list(BACKENDS)}, found {backend!r}; choose one")
    installed = find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise ValueError(
            "backend 'triton' needs the package triton, found none; install it or take 'torch'"
        )
    if backend == "auto":
        return "triton" if device.type == "cuda" and installed else "torch"
    return backend


def attend_with_lse(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax attention and the natural log-sum-exp of every row of its scaled scores.

    These are the operators behind `F.scaled_dot_product_attention`, which drops the second result.

    Args:
        queries: [B, N, S, D]
        keys: [B, N, S, D]
        values: [B, N, S, D]

    Returns:
        Output  [B, N, S, D] and log-sum-exp, float32  [B, N, S]
    """
    num_tokens, head_dim = queries.shape[-2:]
    scale = head_dim**-0.5
    if queries.device.type == "cpu":
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries, keys, values, scale=scale
        )
        return attended, lse.float()
    # The CUDA operators want a head dimension in whole vectors of 8; zeros change no score.
    padded = (F.pad(x, (0, -head_dim % 8)) for x in (queries, keys, values))
    if queries.dtype in (torch.bfloat16, torch.float16):
        attended, lse = torch.ops.aten._scaled_dot_product_flash_attention(*padded, scale=scale)[:2]
    else:
        attended, lse = torch.ops.aten._scaled_dot_product_efficient_attention(
            *padded, attn_bias=None, compute_log_sumexp=True, scale=scale
        )[:2]
    return attended[..., :head_dim], lse[..., :num_tokens].float()  # lse comes in rows of 32


@torch.no_grad()
def strongest_reads(
    queries: Tensor, keys: Tensor, lse: Tensor, block_len: int, *, tile: int = TILE
) -> Tensor:
    """Log of the largest probability with which each part reads a key, in plain torch.

    Scores are made in float32 whatever the dtype of the inputs.

    Args:
        queries: [B, N, S, D]
        keys: [B, N, S, D]
        lse: Of the rows of the scaled scores.  [B, N, S]
        block_len: Tokens of a block.
        tile: Most queries and keys of a tile; with few tokens a tile spans several heads.

    Returns:
        Later, within, earlier; minus infinity where there is no query.  [3, B, N, S]
    """
    batch, heads, num_tokens, _ = queries.shape
    best = lse.new_full((3, batch * heads, num_tokens), -torch.inf)
    queries, keys, lse = (x.flatten(0, 1) for x in (queries, keys, lse))
    at_once = max(1, tile**2 // min(tile, num_tokens) ** 2)
    scores = best.new_empty(min(at_once, batch * heads) * min(tile, num_tokens) ** 2)
    for first in range(0, batch * heads, at_once):
        some = slice(first, first + at_once)
        readers, read = _fold_lse(queries[some], keys[some], lse[some])
        for start, stop, num_blocks in query_tiles(num_tokens, block_len, tile):
            strongest = _strongest_by_block(
                readers[:, start:stop], read, num_blocks, tile=tile, scores=scores
            )
            _update(best[:, some], strongest, start=start, stop=stop, block_len=block_len)
    return best.unflatten(1, (batch, heads))


def _fold_lse(queries: Tensor, keys: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys in float32 whose products are log probabilities.  [G, S, D + 1]."""
    scaled = queries.float() * queries.shape[-1] ** -0.5
    readers = torch.cat([scaled, -lse[..., None]], dim=-1)
    return readers, F.pad(keys.float(), (0, 1), value=1.0)


def query_tiles(num_tokens: int, block_len: int, tile: int) -> Iterator[tuple[int, int, int]]:
    """First query, end and number of blocks of each tile: even pieces of a block, or whole blocks.

    Whole blocks are at most 64, so that a maximum per block and key stays small beside a tile.
    """
    if block_len > tile:
        for block in range(0, num_tokens, block_len):
            size = min(block_len, num_tokens - block)
            pieces = -(-size // tile)
            bounds = [block + size * i // pieces for i in range(pieces + 1)]
            yield from zip(bounds, bounds[1:], [1] * pieces, strict=False)
        return
    whole = num_tokens - num_tokens % block_len
    step = min(tile // block_len, 64) * block_len
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        yield start, stop, (stop - start) // block_len
    if whole < num_tokens:
        yield whole, num_tokens, 1


def _strongest_by_block(
    readers: Tensor, read: Tensor, num_blocks: int, *, tile: int, scores: Tensor
) -> Tensor:
    """Largest log probability that a query of each block gives each key.

    Args:
        readers: Queries of a tile, from `_fold_lse`.  [G, Q, D + 1]
        read: All keys, from `_fold_lse`.  [G, S, D + 1]
        num_blocks: Equal blocks that the queries are.
        tile: Keys of a tile.
        scores: Memory for the scores of a tile.

    Returns:
        [G, S, num_blocks]
    """
    num_heads, num_queries, _ = readers.shape
    num_tokens = read.shape[1]
    strongest = read.new_empty(num_heads, num_tokens, num_blocks)
    for start in range(0, num_tokens, tile):
        stop = min(start + tile, num_tokens)
        shape = (num_heads, stop - start, num_queries)
        # Keys are rows, so that the maximum runs over values that lie side by side.
        product = scores[: shape[0] * shape[1] * shape[2]].view(shape)
        # With `out`, autocast keeps away.
        torch.bmm(read[:, start:stop], readers.transpose(1, 2), out=product)
        by_block = product.unflatten(-1, (num_blocks, -1))
        torch.amax(by_block, dim=-1, out=strongest[:, start:stop])
    return strongest


def _update(best: Tensor, strongest: Tensor, *, start: int, stop: int, block_len: int) -> None:
    """Raise the running maxima by those of the blocks of queries from `start` to `stop`.

    Args:
        best: [3, G, S]
        strongest: [G, S, number of blocks]
        start: First query, in the first of the blocks.
        stop: End of the queries, in the last of the blocks.
        block_len: Tokens of a block.
    """
    first = start // block_len * block_len
    end = min(-(-stop // block_len) * block_len, best.shape[-1])
    for part, span in ((0, slice(0, first)), (2, slice(end, None))):
        torch.maximum(best[part, :, span], strongest[:, span].amax(-1), out=best[part, :, span])
    own = torch.arange(first, end, device=best.device) // block_len
    age = torch.arange(strongest.shape[-1], device=best.device) + first // block_len - own[:, None]
    for part, is_outside in enumerate((age <= 0, age != 0, age >= 0)):
        inside = strongest[:, first:end].masked_fill(is_outside, -torch.inf).amax(-1)
        torch.maximum(best[part, :, first:end], inside, out=best[part, :, first:end])


def mask_short_future(targets: Tensor, block_len: int, horizon: int) -> Tensor:
    """Drop `later` where a key has fewer than `horizon` later blocks.

    The maximum over a set that shrinks with time falls by construction; keys that hardly have a
    future would teach that the present is worthless.

    Args:
        targets: [..., S, 3]
        block_len: Tokens of a block.
        horizon: Later blocks a key must have.

    Returns:
        A copy with NaN in the dropped places.
    """
    targets = targets.clone()
    num_tokens = targets.shape[-2]
    num_blocks = -(-num_tokens // block_len)
    kept = max(0, (num_blocks - horizon) * block_len)
    targets[..., kept:, 0] = torch.nan
    return targets


class SalienceCapture:
    """Salience targets of every layer, from a forward pass that the teacher makes anyway.

    Within the context the teacher's self-attention is `attend_with_targets`:

        with SalienceCapture(teacher, block_len) as captured:
            teacher(noisy, sigma, text)
        captured.targets

    Args:
        network: The teacher; gets this object as its `probe` for the time of the context.
        block_len: Tokens of a block.
        backend: See `attend_with_targets`.
    """

    def __init__(self, network: VideoTransformer, block_len: int, *, backend: str = "auto") -> None:
        self.network, self.block_len, self.backend = network, block_len, backend
        self._found: dict[int, Tensor] = {}

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Output of a layer's self-attention, whose targets are kept.  [B, N, S, D].

        Raises:
            ValueError: If the layer has been asked before, that is, in a second forward pass.
        """
        if layer in self._found:
            raise ValueError(
                f"one SalienceCapture must see one forward pass, found layer {layer} a second "
                "time; open a new one for each pass"
            )
        attended, self._found[layer] = attend_with_targets(
            queries, keys, values, self.block_len, backend=self.backend
        )
        return attended

    @property
    def targets(self) -> Tensor:
        """Of all layers, in their order, NaN where undefined.  [L, B, S, 3].

        Raises:
            ValueError: If no forward pass without mask and cache has been made.
        """
        if not self._found:
            raise ValueError(
                "targets need a forward pass without mask and cache within the context, found "
                "none; call the teacher there"
            )
        return torch.stack([self._found[layer] for layer in sorted(self._found)])

    def __enter__(self) -> Self:
        if self.network.probe is not None:
            raise ValueError(
                "a network must have one probe at a time, found another in its place; leave the "
                "other context first"
            )
        self.network.probe = self
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.network.probe = None
