"""Floating-point operations of network passes, in closed form; counted as `train/flops.py` counts.

What a multiplication and an addition do counts as two; only matrix products, convolutions and
attention count, and masked pairs count, too. `train/flops.py` has no say in kernels that torch does
not dispatch (salience targets on CUDA), which are counted here.
"""

import itertools
import math
from dataclasses import dataclass

from configs.schema import RunConfig
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass
from models.salience import PARTS


@dataclass(frozen=True)
class PassFlops:
    """Operations of one forward pass of one sample, and of the backward pass that follows.

    Attributes:
        forward: Of the pass.
        backward: 0 without gradients.
        repeated: Of what activation checkpointing computes once more.
    """

    forward: float
    backward: float
    repeated: float


def pass_flops(config: RunConfig, found: Pass) -> PassFlops:
    """What a pass costs per sample."""
    if found.network == "head":
        scored = _head_forward(config, found)
        return PassFlops(scored, 2 * scored, 0)
    forward, entry, layers = _forward(config, found)
    scored = _head_forward(config, found)
    if not found.with_grad:
        return PassFlops(forward + scored, 0, 0)
    # Latents, text and time want no gradient of their own: their first products have one backward.
    return PassFlops(forward + scored, 2 * forward - entry, layers)


def _forward(config: RunConfig, found: Pass) -> tuple[float, float, float]:
    """Operations of a forward pass; of its products with what has no gradient; of its layers."""
    model, frames, rows = config.model, found.frames, config.text.length
    width = model.num_heads * model.head_dim
    tokens = frames * config.frame_seq_len
    wanted = tokens if found.wanted is None else found.wanted * config.frame_seq_len
    patch = math.prod(model.patch_size)
    entry = 2 * width * (tokens * model.in_channels * patch + rows * model.text_dim)
    entry += 2 * width * frames * model.freq_dim
    rest = 2 * width * width * (rows + frames * (1 + 6))
    rest += 2 * wanted * width * patch * model.out_channels
    layers = 0.0
    for queries in [tokens] * (model.num_layers - 1) + [wanted]:
        layers += 6 * tokens * width**2 + 2 * queries * width**2  # q, k, v; o
        layers += 4 * width * _pairs(config, found, queries, tokens)
        if queries:
            layers += 4 * (queries + rows) * width**2 + 4 * width * queries * rows
            layers += 4 * queries * width * model.ffn_dim
    return entry + rest + layers, entry, layers


def _pairs(config: RunConfig, found: Pass, queries: int, tokens: int) -> float:
    """Query-key pairs of a layer's self-attention, with those of salience targets."""
    if found.attention == PROBED:
        # All queries, whether wanted or not; then the scores once more, with the log-sum-exp as one
        # more channel, which is half of what attention does with a pair.
        return tokens**2 * (1 + (1 + 1 / config.model.head_dim) / 2)
    if found.attention == PAIRED:
        return _paired_pairs(config, queries, tokens)
    if found.attention == CAUSAL:
        return queries * tokens
    return queries * (tokens + (found.past or 0))


def _paired_pairs(config: RunConfig, queries: int, tokens: int) -> float:
    """Of teacher forcing in groups, see `models.attention.group_teacher_forcing`."""
    block = config.model.frames_per_block * config.frame_seq_len
    spans, halves = group_spans(tokens // 2 // block), queries * 2 // tokens
    ends = [sum(spans[: i + 1]) for i in range(len(spans))]
    pairs = sum(span * (end + span) for span, end in zip(spans, ends, strict=True))
    return halves * pairs * block**2


def group_spans(num_blocks: int) -> list[int]:
    """Blocks of each span of `train.causal.Causal.mask`."""
    groups = max(1, num_blocks // 4)
    bounds = [num_blocks * i // groups for i in range(groups + 1)]
    return [end - start for start, end in itertools.pairwise(bounds)]


def _head_forward(config: RunConfig, found: Pass) -> float:
    model, hidden = config.model, config.head.hidden
    width = model.num_heads * model.head_dim
    return 2.0 * found.scored * model.num_layers * hidden * (width + len(PARTS))
