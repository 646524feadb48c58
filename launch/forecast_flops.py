"""Floating-point operations of network passes, in closed form; counted as `train/flops.py` counts.

What a multiplication and an addition do counts as two; only matrix products, convolutions and
attention count, and masked pairs count, too. `train/flops.py` has no say in kernels that torch does
not dispatch (salience targets on CUDA), which are counted here.
"""

import itertools
import math
from dataclasses import dataclass

from configs.schema import LoraConfig, RunConfig
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass
from models.attention import teacher_forcing_spans
from models.salience import PARTS
from train.lora import is_named


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


class Tally:
    """Adds up the products of a pass in the order in which they run.

    A product has a backward pass for its weight if that is trained, and another one for its input
    if something before it is. Every method says whether the latter holds for what comes next.

    Args:
        lora: The adapter that is trained in place of the network, if there is one.

    Attributes:
        forward: Operations so far.
        backward: The same of the backward pass.
    """

    def __init__(self, lora: LoraConfig | None) -> None:
        self.lora = lora
        self.forward = self.backward = 0.0

    def product(self, name: str, rows: int, inputs: int, outputs: int, *, flows: bool) -> bool:
        """A linear layer over `rows` tokens, with its adapter if it has one."""
        if self.lora is None:
            self._add(2.0 * rows * inputs * outputs, trained=True, flows=flows)
            return True
        self._add(2.0 * rows * inputs * outputs, trained=False, flows=flows)
        if not any(is_named(name, target) for target in self.lora.targets):
            return flows
        self._add(2.0 * rows * inputs * self.lora.rank, trained=True, flows=flows)
        self._add(2.0 * rows * self.lora.rank * outputs, trained=True, flows=True)
        return True

    def attention(self, cost: float, *, flows: bool) -> bool:
        """Attention, whose backward pass is twice the forward pass."""
        self.forward += cost
        self.backward += 2 * cost * flows
        return flows

    def _add(self, cost: float, *, trained: bool, flows: bool) -> None:
        self.forward += cost
        self.backward += cost * (trained + flows)


def pass_flops(config: RunConfig, found: Pass, lora: LoraConfig | None = None) -> PassFlops:
    """What a pass costs per sample.

    Args:
        config: Of the run.
        found: The pass.
        lora: Of the network's adapter, if it has one.
    """
    scored = _head_forward(config, found)
    if found.network == "head":
        return PassFlops(scored, 2 * scored, 0)
    tally = Tally(lora)
    repeated = _walk(config, found, tally)
    if not found.with_grad:
        return PassFlops(tally.forward + scored, 0, 0)
    return PassFlops(tally.forward + scored, tally.backward, repeated)


def _walk(config: RunConfig, found: Pass, tally: Tally) -> float:
    """Add up all products of a pass; those of its layers alone, forward."""
    model, frames, rows = config.model, found.frames, config.text.length
    width, patch = model.num_heads * model.head_dim, math.prod(model.patch_size)
    tokens = frames * config.frame_seq_len
    wanted = tokens if found.wanted is None else found.wanted * config.frame_seq_len
    x = tally.product("patch_embedding", tokens, model.in_channels * patch, width, flows=False)
    text = tally.product("text_embedding.0", rows, model.text_dim, width, flows=False)
    text = tally.product("text_embedding.2", rows, width, width, flows=text)
    time = tally.product("time_embedding.0", frames, model.freq_dim, width, flows=False)
    time = tally.product("time_embedding.2", frames, width, width, flows=time)
    modulation = tally.product("time_projection.1", frames, width, 6 * width, flows=time)
    before = tally.forward
    for layer in range(model.num_layers):
        queries = tokens if layer < model.num_layers - 1 else wanted
        pairs = _pairs(config, found, queries, tokens)
        name, x = f"blocks.{layer}.self_attn", x or modulation
        read = [tally.product(f"{name}.{one}", tokens, width, width, flows=x) for one in "qkv"]
        mixed = tally.attention(4 * width * pairs, flows=any(read))
        x |= tally.product(f"{name}.o", queries, width, width, flows=mixed)
        if queries:
            x = _finish(config, tally, layer, queries, x=x, text=text)
    layers = tally.forward - before
    tally.product("head.head", wanted, width, patch * model.out_channels, flows=x or time)
    return layers


def _finish(
    config: RunConfig, tally: Tally, layer: int, queries: int, *, x: bool, text: bool
) -> bool:
    """What a layer does behind its self-attention."""
    model, rows = config.model, config.text.length
    width, name = model.num_heads * model.head_dim, f"blocks.{layer}"
    read = [
        tally.product(f"{name}.cross_attn.q", queries, width, width, flows=x),
        tally.product(f"{name}.cross_attn.k", rows, width, width, flows=text),
        tally.product(f"{name}.cross_attn.v", rows, width, width, flows=text),
    ]
    mixed = tally.attention(4.0 * width * queries * rows, flows=any(read))
    x |= tally.product(f"{name}.cross_attn.o", queries, width, width, flows=mixed)
    inner = tally.product(f"{name}.ffn.0", queries, width, model.ffn_dim, flows=x)
    return tally.product(f"{name}.ffn.2", queries, model.ffn_dim, width, flows=inner) or x


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
    spans = teacher_forcing_spans(tokens // 2 // block, block)
    halves = queries * 2 // tokens
    ends = itertools.accumulate(spans)
    pairs = sum(span * (end + span) for span, end in zip(spans, ends, strict=True))
    return halves * pairs * block**2


def _head_forward(config: RunConfig, found: Pass) -> float:
    model, hidden = config.model, config.head.hidden
    width = model.num_heads * model.head_dim
    return 2.0 * found.scored * model.num_layers * hidden * (width + len(PARTS))
