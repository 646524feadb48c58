"""One layer of the Wan2.1 video transformer."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.attention import Attention, Projected, QueryGroup, attend, rotate

if TYPE_CHECKING:
    from models.kv_memory import Past


class Probe(Protocol):
    """Does the self-attention of a bidirectional pass itself, and may look at it."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of all rotated queries; arguments and result [B, N, S, D]."""


@dataclass(frozen=True)
class Surroundings:
    """What the self-attention of a layer works with besides the tokens themselves.

    Attributes:
        angles: Rotation of the tokens.  [S, D / 2]
        mask: For `attend`, or None.
        probe: Does the attention, if there is one.
        layer: Number of the layer.
        past: Of a cache, or None.
        first: Tokens of the layer's output that nobody needs, counted from the first.
    """

    angles: Tensor
    mask: Tensor | list[QueryGroup] | None
    probe: Probe | None
    layer: int = 0
    past: Past | None = None
    first: int = 0


@cache
def _compiled(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, compiled once for all layers of all networks."""
    return torch.compile(method)


class Block(nn.Module):
    """One layer: modulated self-attention, cross-attention to the text, modulated feed-forward.

    Attributes:
        is_compiled: Compile what comes before and behind the self-attention, where nothing depends
            on masks or on a cache. Compiling all of `forward` breaks at the cache, and its lengths,
            masks and layer numbers ask for more variants than the compiler keeps.
    """

    def __init__(self, num_heads: int, head_dim: int, ffn_dim: int, eps: float) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.eps = eps
        self.is_compiled = False
        self.self_attn = Attention(num_heads, head_dim, eps)
        self.norm3 = nn.LayerNorm(width, eps)
        self.cross_attn = Attention(num_heads, head_dim, eps)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, width)
        )
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / math.sqrt(width))

    def forward(
        self, x: Tensor, time: Tensor, text: Tensor, around: Surroundings
    ) -> tuple[Tensor, Projected]:
        """Output of the layer for the tokens that are needed, and its projections of all.

        Args:
            x: The layer's input.  [B, S, E]
            time: Modulation of each frame.  [B, F, 6, E]
            text: Embedded caption.  [B, T, E]
            around: The rest.
        """
        begin, finish = Block.begin, Block.finish
        if self.is_compiled:
            begin, finish = _compiled(begin), _compiled(finish)
        parts, raw_queries, raw_keys, values = begin(self, x, time)
        queries, keys = rotate(raw_queries, around.angles), rotate(raw_keys, around.angles)
        projected = Projected(raw_queries, queries, raw_keys, keys, values)
        first = around.first
        if around.probe is not None:
            attended = around.probe.attend(around.layer, queries, keys, values)[:, :, first:]
        elif around.past is not None:
            attended = around.past.attend(queries[:, :, first:], keys, values)
        else:
            attended = attend(queries[:, :, first:], keys, values, mask=around.mask)
        if first:
            unneeded = first * time.shape[1] // x.shape[1]  # frames
            x, parts = x[:, first:], tuple(part[:, unneeded:] for part in parts)
        if x.shape[1]:
            x = finish(self, x, attended, text, parts)
        return x, projected

    def begin(self, x: Tensor, time: Tensor) -> tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor]:
        """All that precedes the self-attention of a layer.

        Args:
            x: The layer's input.  [B, S, E]
            time: Modulation of each frame.  [B, F, 6, E]

        Returns:
            Parts of the modulation; queries, keys and values before rotation, [B, N, S, D] each.
        """
        parts = self.split_modulation(time)
        normed = self.modulate(x, parts[0], parts[1])
        return parts, *self.self_attn.project(normed, normed)

    def match_prompt(self, x: Tensor, text: Tensor) -> Tensor:
        """Largest cosine of each token's cross-attention query with a text row's key, head mean.

        Args:
            x: The layer's input.  [B, S, E]
            text: Embedded caption.  [B, T, E]

        Returns:
            float32.  [B, S]
        """
        queries, keys, _ = self.cross_attn.project(self.norm3(x), text)
        queries, keys = (F.normalize(part.float(), dim=-1) for part in (queries, keys))
        return (queries @ keys.transpose(-1, -2)).amax(dim=-1).mean(dim=1)

    def split_modulation(self, time: Tensor) -> tuple[Tensor, ...]:
        """Shift, scale, gate of attention, then of the feed-forward; each [B, F, 1, E], float32."""
        return (self.modulation[:, None].float() + time.float()).chunk(6, dim=2)

    def modulate(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """Layer norm without weights, then scale and shift per frame, in float32.  [B, S, E]."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        frames = normed.unflatten(1, (shift.shape[1], -1))  # [B, F, P, E]
        return torch.addcmul(shift, frames, 1 + scale).flatten(1, 2).to(x.dtype)

    def add_gated(self, x: Tensor, update: Tensor, gate: Tensor) -> Tensor:
        """Add gate * update, gate per frame, in float32.  [B, S, E]."""
        frames = x.float().unflatten(1, (gate.shape[1], -1))
        update = update.float().unflatten(1, (gate.shape[1], -1))
        return torch.addcmul(frames, gate, update).flatten(1, 2).to(x.dtype)

    def finish(
        self, x: Tensor, attended: Tensor, text: Tensor, modulation: tuple[Tensor, ...]
    ) -> Tensor:
        """All that follows the self-attention of a layer.

        Args:
            x: The layer's input.  [B, S, E]
            attended: Output of softmax attention before its projection.  [B, N, S, D]
            text: Embedded caption.  [B, T, E]
            modulation: From `split_modulation`.
        """
        x = self.add_gated(x, self.self_attn.merge(attended), modulation[2])
        x = x + self.cross_attn(self.norm3(x), text)
        update = self.ffn(self.modulate(x, modulation[3], modulation[4]))
        return self.add_gated(x, update, modulation[5])
