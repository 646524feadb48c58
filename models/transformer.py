"""The Wan2.1 video transformer: teacher and critic (bidirectional), student (block-causal)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from models.attention import (
    Projected,
    QueryGroup,
    additive_mask,
    grid_positions,
    rotary_angles,
)
from models.block import Block, Probe, Surroundings
from models.kv_tokens import Entering

if TYPE_CHECKING:
    from models.kv_cache import KVCache

# Called once per layer with (layer, hidden, queries, keys): the layer's input [B, S, E] and the
# rotated queries and keys [B, N, S, D] of its self-attention.
Capture = Callable[[int, Tensor, Tensor, Tensor], None]


def timestep_embedding(timestep: Tensor, width: int) -> Tensor:
    """Sinusoids of a timestep on the scale 0..1000, cosines first, computed in float64.

    Args:
        timestep: Any shape.  [...]
        width: Size of the embedding, even.

    Returns:
        float32.  [..., width]
    """
    half = width // 2
    exponent = torch.arange(half, dtype=torch.float64, device=timestep.device) / half
    angles = timestep.double()[..., None] * 10000.0**-exponent
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


class Head(nn.Module):
    """Final modulated norm and projection of tokens to patches."""

    def __init__(self, width: int, patch_values: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.head = nn.Linear(width, patch_values)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / math.sqrt(width))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        """Patches of each token.

        Args:
            x: Tokens.  [B, S, E]
            time: Time embedding of each frame.  [B, F, E]
        """
        shift, scale = (self.modulation[:, None].float() + time.float()[:, :, None]).chunk(2, 2)
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=self.eps)
        frames = normed.unflatten(1, (time.shape[1], -1))
        return self.head(torch.addcmul(shift, frames, 1 + scale).flatten(1, 2).to(x.dtype))


class VideoTransformer(nn.Module):
    """Velocity of video latents: Wan2.1's mathematics and parameter names, any size.

    One class serves all roles. Without a mask or a cache it is bidirectional (teacher, critic);
    with a mask it trains a block-causal student on whole videos; with a cache it generates block
    by block. Every frame has a noise level of its own.

    Args:
        num_layers: Blocks.
        num_heads: Attention heads.
        head_dim: Channels of a head; the width is num_heads * head_dim.
        ffn_dim: Hidden width of the feed-forward.
        freq_dim: Width of the sinusoidal time embedding.
        text_dim: Width of the text rows given.
        in_channels: Channels of the latents.
        out_channels: Channels of the velocity.
        patch_size: Latent (frames, rows, columns) of a token; one frame per token.
        rope_theta: Base of the rotary frequencies; 10000 in Wan2.1.
        eps: Of every norm.

    Attributes:
        probe: If set, does the self-attention of passes without mask and cache.
        recomputes_activations: Keep only the inputs of layers for the backward pass.

    Source: Wan2.1 technical report, arXiv:2503.20314, section 4.2.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        ffn_dim: int,
        freq_dim: int,
        text_dim: int,
        in_channels: int = 16,
        out_channels: int = 16,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        rope_theta: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_layers, self.num_heads, self.head_dim = num_layers, num_heads, head_dim
        self.width, self.freq_dim, self.rope_theta = width, freq_dim, rope_theta
        self.out_channels = out_channels
        self.patch_size = patch_size
        if self.patch_size[0] != 1:
            raise ValueError(
                f"a token must lie within one frame, got patch_size {self.patch_size}; "
                "its first value must be 1"
            )
        self.patch_embedding = nn.Conv3d(
            in_channels, width, kernel_size=self.patch_size, stride=self.patch_size
        )
        self.text_embedding = nn.Sequential(
            nn.Linear(text_dim, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.time_embedding = nn.Sequential(
            nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width)
        )
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = nn.ModuleList(
            Block(num_heads, head_dim, ffn_dim, eps) for _ in range(num_layers)
        )
        self.head = Head(width, math.prod(self.patch_size) * out_channels, eps)
        self.probe: Probe | None = None
        self.recomputes_activations = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initial weights of Wan2.1 but for two choices that small networks from scratch need.

        Xavier for linears, small normals for embeddings, zero output, as Wan2.1; the norm of the
        self-attention queries starts at 1.5 and both gates of a block at 0.5, which make attention
        selective and blocks active from the first step. Loaded weights replace all of it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Block):
                nn.init.constant_(module.self_attn.norm_q.weight, 1.5)
                nn.init.constant_(module.modulation[:, 2], 0.5)
                nn.init.constant_(module.modulation[:, 5], 0.5)
        nn.init.xavier_uniform_(self.patch_embedding.weight.flatten(1))
        for embedding in (self.text_embedding, self.time_embedding):
            for module in embedding:
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.head.weight)

    def token_grid(self, latents: Tensor) -> tuple[int, int]:
        """Token rows and columns of a frame of these latents.

        Raises:
            ValueError: If a patch does not divide the latent size.
        """
        height, width = latents.shape[-2:]
        rows, columns = self.patch_size[1:]
        if height % rows or width % columns:
            raise ValueError(
                f"latent rows and columns must be multiples of the patch {(rows, columns)}, "
                f"got {(height, width)}; resize the video or change model.patch_size"
            )
        return height // rows, width // columns

    def embed_time(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Time embedding [B, F, E] and modulation [B, F, 6, E] of noise levels [B, F]."""
        sinusoid = timestep_embedding(1000 * sigma, self.freq_dim)
        time = self.time_embedding(sinusoid.to(self.patch_embedding.weight.dtype))
        return time, self.time_projection(time).unflatten(-1, (6, -1))

    def unpatchify(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Patches [B, F * h * w, patch values] to latents [B, F, C, H, W]."""
        rows, columns = self.patch_size[1:]
        x = patches.unflatten(-1, (rows, columns, self.out_channels))
        x = x.unflatten(1, (-1, *grid))  # [B, F, h, w, rows, columns, C]
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    @staticmethod
    def _additive(
        mask: Tensor | list[QueryGroup] | None, dtype: torch.dtype
    ) -> Tensor | list[QueryGroup] | None:
        """Masks as attention adds them: made once, not in every layer."""
        if isinstance(mask, list):
            return [replace(group, mask=additive_mask(group.mask, dtype)) for group in mask]
        return None if mask is None else additive_mask(mask, dtype)

    def forward(
        self,
        latents: Tensor,
        sigma: Tensor,
        text: Tensor,
        *,
        frames: Tensor | None = None,
        mask: Tensor | list[QueryGroup] | None = None,
        cache: KVCache | None = None,
        write: bool = False,
        capture: Capture | None = None,
        wanted: int | None = None,
    ) -> Tensor:
        """Velocity of the frames that are wanted.

        Args:
            latents: Noisy latents.  [B, F, C, H, W]
            sigma: Noise level of each frame.  [B, F]
            text: Text rows, padded with zeros; all rows are attended.  [B, T, text_dim]
            frames: Number of each frame in the video; 0, 1, ... if not given; excludes `cache`.
                [F]
            mask: True where a query may read a key, or groups; excludes `cache`.  [B, 1, S, S]
            cache: Past of the video, which knows the frames by `cache.begin`.
            write: Append this call's tokens to the cache (the clean pass of a finished block).
            capture: See `Capture`.
            wanted: How many frames, counted from the last, need a velocity; all if not given. The
                others end with the keys and values that the last layer reads of them; with 0, the
                call is made for what it writes or captures.

        Returns:
            Estimate of noise - x0 of the wanted frames.  [B, wanted, C, H, W]
        """
        if write and cache is None:
            raise ValueError("a pass writes into a cache, so `write` needs one; give `cache`")
        grid = self.token_grid(latents)
        x = self.patch_embedding(latents.transpose(1, 2)).flatten(2).transpose(1, 2)  # [B, S, E]
        time, modulation = self.embed_time(sigma)
        text = self.text_embedding(text)
        positions, around = self._surroundings(latents, frames, mask, cache, x.dtype)
        unneeded = 0 if wanted is None else latents.shape[1] - wanted  # frames
        for layer, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            first = unneeded * grid[0] * grid[1] if layer == self.num_layers - 1 else 0
            past = None if cache is None else cache.past(layer)
            entering = x
            x, projected = self._run(
                block, x, modulation, text, replace(around, layer=layer, past=past, first=first)
            )
            if capture is not None:
                capture(layer, entering, projected.rotated_queries, projected.rotated_keys)
            if cache is not None and write:
                hidden = entering.detach()
                entered = Entering(
                    layer=layer,
                    hidden=hidden,
                    positions=positions.expand(len(hidden), -1, -1),
                    seeds=cache.seeds,
                    projected=projected.detached(),
                    match_prompt=partial(block.match_prompt, hidden, text.detach()),
                )
                cache.append(entered, grid=grid)
        if cache is not None and write:
            cache.advance()
        if not x.shape[1]:
            return latents.new_empty(len(latents), 0, self.out_channels, *latents.shape[-2:])
        return self.unpatchify(self.head(x, time[:, unneeded:]), grid)

    def _surroundings(
        self,
        latents: Tensor,
        frames: Tensor | None,
        mask: Tensor | list[QueryGroup] | None,
        cache: KVCache | None,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Surroundings]:
        """True positions of the tokens, [S, 3], and what is the same for all layers.

        Masks are added to scores in the precision of the products, `dtype`.
        """
        grid = self.token_grid(latents)
        if cache is None:
            every = torch.arange(latents.shape[1], device=latents.device)
            positions = shown = grid_positions(every if frames is None else frames, *grid)
        else:
            if frames is not None or mask is not None:
                raise ValueError(
                    "a cache knows which frames come next and what they may read, so `frames` and "
                    "`mask` must not be given with one"
                )
            cache.begin(latents.shape[1])
            positions, shown = cache.positions(grid)
        angles = rotary_angles(shown, self.head_dim, self.rope_theta)
        probe = self.probe if cache is None and mask is None else None
        return positions, Surroundings(angles, self._additive(mask, dtype), probe)

    def _run(
        self, block: Block, x: Tensor, modulation: Tensor, text: Tensor, around: Surroundings
    ) -> tuple[Tensor, Projected]:
        """The layer, its activations recomputed in the backward pass if so configured."""
        if not (self.recomputes_activations and torch.is_grad_enabled()):
            return block(x, modulation, text, around)
        return checkpoint(block, x, modulation, text, around, use_reentrant=False)
