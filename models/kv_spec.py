"""Geometry and storage of a KV cache, and how a block sees time."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.attention import rotary_angles
from models.kv_policy import CachePolicy

EVICTED = ("drop", "low", "offload")
"""What becomes of evicted tokens: they are gone, kept in 4 bits, or fetched back from the host."""


@dataclass
class CacheSpec:
    """Geometry and storage of a cache; all counts per layer and sample.

    Attributes:
        budget_tokens: Tokens kept after each block.
        tokens_per_frame: Tokens of a latent frame.
        frames_per_block: Frames generated together.
        sink_frames: First frames of the video, never evicted.
        recent_frames: Newest frames, never evicted; the block just finished always belongs to them.
        time: `absolute` frame numbers, or `relative`: lags are kept up to `max_lag` and saturate.
        max_lag: Longest lag in frames that `relative` time shows (the trained range - 1).
        layer_budgets: Tokens kept in each layer, in place of `budget_tokens`; empty = alike.
        precision: How kept tokens are stored, a name in `models.kv_storage.STORAGES`.
        evicted: `drop`, `low` (kept in 4 bits, as in ZipCache arXiv:2405.14256 and MiKV
            arXiv:2402.18096) or `offload` (to host memory, and the `evicted_tokens` of them that
            the last block's mean query points at most are fetched for each block, as in ReKV
            arXiv:2503.00540; the host must wait for the device once per layer and block).
        evicted_tokens: How many of them are there to be read.
        preallocate: Take memory once and fill it in place; for generation without gradients.
        max_frames: Longest video, for a preallocated cache that keeps everything.
        local_layers: Layers that ISPA turns from full to local attention.
        warmup_blocks: Blocks through which these keep everything and gather the gap.
        ridge: Of ISPA's least squares, relative to the mean square of a channel.
    """

    budget_tokens: int
    tokens_per_frame: int
    frames_per_block: int
    sink_frames: int = 1
    recent_frames: int = 2
    time: str = "absolute"
    max_lag: int = 0
    layer_budgets: tuple[int, ...] = ()
    precision: str = "model"
    evicted: str = "drop"
    evicted_tokens: int = 0
    preallocate: bool = False
    max_frames: int = 0
    local_layers: tuple[int, ...] = ()
    warmup_blocks: int = 0
    ridge: float = 1e-2

    def __post_init__(self) -> None:
        if self.time not in ("absolute", "relative"):
            raise ValueError(f"cache time must be 'absolute' or 'relative', got '{self.time}'")
        if self.time == "relative" and self.max_lag < self.sink_frames + self.frames_per_block:
            raise ValueError(
                f"max_lag must cover sink and current block, at least "
                f"{self.sink_frames + self.frames_per_block} frames, got {self.max_lag}"
            )
        if self.evicted not in EVICTED:
            raise ValueError(f"evicted must be one of {EVICTED}, got '{self.evicted}'")
        if self.evicted_tokens < 0 or (self.evicted == "drop") != (self.evicted_tokens == 0):
            raise ValueError(
                "evicted_tokens must say how many evicted tokens can be read, and be 0 if they are "
                f"dropped; got evicted='{self.evicted}' with evicted_tokens={self.evicted_tokens}"
            )
        if self.warmup_blocks < 2 * bool(self.local_layers) or (
            self.warmup_blocks and not self.local_layers
        ):
            raise ValueError(
                "local layers need a warm-up of at least two blocks, and a warm-up local layers; "
                f"got local_layers={self.local_layers} with warmup_blocks={self.warmup_blocks}"
            )

    @property
    def protected_frames(self) -> int:
        """Recent frames that are never candidates."""
        return max(self.recent_frames, self.frames_per_block)

    @property
    def block_len(self) -> int:
        """Tokens of a block."""
        return self.frames_per_block * self.tokens_per_frame

    def budget(self, layer: int) -> int:
        """Tokens that a layer keeps."""
        return self.layer_budgets[layer] if self.layer_budgets else self.budget_tokens

    def least_budget(self, policy: CachePolicy) -> int:
        """Tokens that are protected."""
        sink = self.sink_frames if policy.protects_sink else 0
        return (sink + self.protected_frames) * self.tokens_per_frame

    def check(self, policy: CachePolicy, num_layers: int) -> None:
        """Raise ValueError if policy and number of layers do not fit."""
        self._check_layers(num_layers)
        self._check_evicted(policy)
        if self.preallocate and not policy.is_bounded and not self.max_frames:
            raise ValueError(
                f"policy '{policy.name}' keeps everything, so a preallocated cache needs the "
                "length of the video; set max_frames"
            )
        smallest = min(self.layer_budgets, default=self.budget_tokens)
        if policy.is_bounded and smallest < self.least_budget(policy):
            sink = self.sink_frames if policy.protects_sink else 0
            raise ValueError(
                f"the cache budget must hold sink and recent frames, {sink} + "
                f"{self.protected_frames} frames of {self.tokens_per_frame} tokens = "
                f"{self.least_budget(policy)}, got {smallest}; raise budget_tokens or protect "
                "fewer frames"
            )

    def _check_layers(self, num_layers: int) -> None:
        if self.layer_budgets and len(self.layer_budgets) != num_layers:
            raise ValueError(
                f"layer_budgets must name one budget per layer, {num_layers}, "
                f"got {len(self.layer_budgets)}"
            )
        if any(not 0 <= layer < num_layers for layer in self.local_layers):
            raise ValueError(
                f"local_layers must be below {num_layers}, got {list(self.local_layers)}"
            )
        window = (self.sink_frames + self.protected_frames) * self.tokens_per_frame
        for layer in self.local_layers:
            if self.budget(layer) < window:
                raise ValueError(
                    f"a local layer must hold sink and recent frames, {window} tokens, got "
                    f"{self.budget(layer)} for layer {layer}; raise its budget"
                )

    def _check_evicted(self, policy: CachePolicy) -> None:
        if self.evicted != "drop" and not policy.is_bounded:
            raise ValueError(
                f"policy '{policy.name}' evicts nothing, so nothing can be kept elsewhere; set "
                f"evicted='drop', got '{self.evicted}'"
            )
        if policy.changes_tokens and self.evicted != "drop":
            raise ValueError(
                f"policy '{policy.name}' merges what it evicts, so nothing is left to keep "
                f"elsewhere; set evicted='drop', got '{self.evicted}'"
            )


@dataclass(frozen=True)
class Clock:
    """The block that is being made, and how it sees the frames of the video.

    Attributes:
        spec: Of the cache.
        head_dim: Channels of a head.
        rope_theta: Base of the rotary frequencies.
        first: Number of the block's first frame.
        count: Frames of the block.
        gap_frames: By how many frames the block is shown later than it stands.
    """

    spec: CacheSpec
    head_dim: int
    rope_theta: float
    first: int
    count: int
    gap_frames: int = 0

    @property
    def end(self) -> int:
        """Number of the first frame after the block."""
        return self.first + self.count

    def next(self) -> Clock:
        """The block that follows."""
        return replace(self, first=self.end, count=self.spec.frames_per_block, gap_frames=0)

    def own_frames(self, device: torch.device) -> Tensor:
        """Frame numbers of the block.  [F]."""
        return torch.arange(self.first, self.end, device=device)

    def shown(self, frame: Tensor) -> Tensor:
        """Frame numbers as attention sees them, the gap left out.

        `relative` time: newest frame at t_max, older at t_max - lag, never below 0, sinks at their
        own frame number. While the video is no longer than t_max it equals `absolute`.
        """
        if self.spec.time == "absolute":
            return frame
        anchor = min(self.end - 1, self.spec.max_lag)
        shown = anchor - (self.end - 1 - frame).clamp(max=anchor)
        return torch.where(frame < self.spec.sink_frames, frame, shown)

    def angles(self, positions: Tensor) -> Tensor:
        """Rotation of tokens at (frame, row, column).  [..., 3] to [..., D / 2]."""
        frame = self.shown(positions[..., :1])
        shown = torch.cat([frame, positions[..., 1:]], dim=-1)
        return rotary_angles(shown, self.head_dim, self.rope_theta)
