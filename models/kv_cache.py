"""The KV cache of the causal student: unrotated keys, a position for every token, a fixed budget.

Functional: a block's tokens are appended as detached tensors and nothing is written in place, so no
gradient crosses blocks and recomputing a forward pass sees the same past (a policy that observes
attention would count the recomputation, too).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import attend, rotary_angles, rotate
from models.kv_policy import CachePolicy, Entering, Tokens

if TYPE_CHECKING:
    from models.salience import SalienceHead


@dataclass
class CacheSpec:
    """Geometry of a cache; all counts per layer and sample.

    Attributes:
        budget_tokens: Tokens kept after each block.
        tokens_per_frame: Tokens of a latent frame.
        frames_per_block: Frames generated together.
        sink_frames: First frames of the video, never evicted.
        recent_frames: Newest frames, never evicted; the block just finished always belongs to them.
        time: `absolute` frame numbers, or `relative`: lags are kept up to `max_lag` and saturate.
        max_lag: Longest lag in frames that `relative` time shows (the trained range - 1).
    """

    budget_tokens: int
    tokens_per_frame: int
    frames_per_block: int
    sink_frames: int = 1
    recent_frames: int = 2
    time: str = "absolute"
    max_lag: int = 0

    def __post_init__(self) -> None:
        if self.time not in ("absolute", "relative"):
            raise ValueError(f"cache time must be 'absolute' or 'relative', got '{self.time}'")
        if self.time == "relative" and self.max_lag < self.sink_frames + self.frames_per_block:
            raise ValueError(
                f"max_lag must cover sink and current block, at least "
                f"{self.sink_frames + self.frames_per_block} frames, got {self.max_lag}"
            )

    @property
    def protected_frames(self) -> int:
        """Recent frames that are never candidates."""
        return max(self.recent_frames, self.frames_per_block)

    def check_budget(self, policy: CachePolicy) -> None:
        """Raise ValueError if the budget cannot hold what is protected."""
        sink = self.sink_frames if policy.protects_sink else 0
        needed = (sink + self.protected_frames) * self.tokens_per_frame
        if policy.is_bounded and self.budget_tokens < needed:
            raise ValueError(
                f"the cache budget must hold sink and recent frames, {sink} + "
                f"{self.protected_frames} frames of {self.tokens_per_frame} tokens = {needed}, "
                f"got {self.budget_tokens}; raise budget_tokens or protect fewer frames"
            )


class KVCache:
    """Past of a batch of videos that advance in step.

    One generation step is `begin` (which block comes), any number of reads, then one forward pass
    that writes, after which the policy evicts down to the budget, per layer and per sample.

    Args:
        num_layers: Layers of the transformer.
        head_dim: Channels of a head.
        rope_theta: Base of the rotary frequencies.
        spec: Geometry and budget.
        policy: What to keep.
        seeds: Seed of each sample, for policies that draw lots.  [B]
        passes_per_block: Forward passes that read the cache per block; scales observed attention.
        head: Salience head, needed by policies that say so.

    Raises:
        ValueError: If the budget cannot hold the protected frames, or the head is missing.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        head_dim: int,
        rope_theta: float,
        spec: CacheSpec,
        policy: CachePolicy,
        seeds: Tensor,
        passes_per_block: int = 1,
        head: SalienceHead | None = None,
    ) -> None:
        spec.check_budget(policy)
        if policy.needs_head and head is None:
            raise ValueError(
                f"policy '{policy.name}' needs a salience head, this checkpoint has none; "
                "take one from the `salience` stage or later, or choose another policy"
            )
        self.spec, self.policy, self.seeds, self.head = spec, policy, seeds, head
        self.head_dim, self.rope_theta = head_dim, rope_theta
        self.passes_per_block = passes_per_block
        self.layers: list[Tokens | None] = [None] * num_layers
        self.num_frames = 0  # frames written so far
        self._rotated: list[Tensor | None] = [None] * num_layers  # keys as the coming block reads
        self._observed: list[Tensor | None] = [None] * num_layers  # attention they got from it

    @property
    def num_tokens(self) -> int:
        """Tokens held per layer and sample."""
        return 0 if self.layers[0] is None else self.layers[0].positions.shape[1]

    @property
    def num_bytes(self) -> int:
        """Bytes of all keys and values held."""
        held = [t for t in self.layers if t is not None]
        return sum(x.numel() * x.element_size() for t in held for x in (t.keys, t.values))

    def clear(self) -> None:
        """Forget everything; the next block is frame 0."""
        self.layers = [None] * len(self.layers)
        self._rotated = [None] * len(self.layers)
        self._observed = [None] * len(self.layers)
        self.num_frames = 0

    def skip_to(self, frame: int) -> None:
        """Let the next block start at a later frame; the frames between are never seen.

        Raises:
            ValueError: If the frame lies in the past.
        """
        if frame < self.num_frames:
            raise ValueError(f"cannot go back from frame {self.num_frames} to {frame}")
        self.num_frames = frame

    def begin(self, frames: Tensor, *, write: bool) -> None:
        """Announce the frames of the coming forward pass; rotates the cached keys once per block.

        Raises:
            ValueError: If the frames do not continue the video.
        """
        first, count = int(frames[0]), len(frames)
        if first != self.num_frames:
            raise ValueError(
                f"the next block must start at frame {self.num_frames}, got {first}; "
                "blocks are generated in order, each written once"
            )
        if self._rotated[0] is None and self.layers[0] is not None:
            self._anchor = self._time_anchor(first + count - 1)
            for layer, tokens in enumerate(self.layers):
                assert tokens is not None
                angles = rotary_angles(
                    self.time_of_read(tokens.positions), self.head_dim, self.rope_theta
                )
                self._rotated[layer] = rotate(tokens.keys, angles)
        self._anchor = self._time_anchor(first + count - 1)
        if write:
            self.num_frames = first + count

    def _time_anchor(self, newest: int) -> tuple[int, int]:
        return newest, min(newest, self.spec.max_lag)

    def time_of_read(self, positions: Tensor) -> Tensor:
        """Positions as attention sees them while the announced block is generated.

        `relative` time: newest frame at t_max, older at t_max - lag, never below 0, sinks at their
        own frame number. While the video is no longer than t_max it equals `absolute`.
        """
        if self.spec.time == "absolute":
            return positions
        newest, anchor = self._anchor
        frame = positions[..., 0]
        shown = anchor - (newest - frame).clamp(max=anchor)
        shown = torch.where(frame < self.spec.sink_frames, frame, shown)
        return torch.cat([shown[..., None], positions[..., 1:]], dim=-1)

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Attention of the current block over the cached and its own tokens.

        Args:
            layer: Number of the layer.
            queries: Rotated.  [B, N, Q, D]
            keys: Rotated, of the current block.  [B, N, Q, D]
            values: Of the current block.  [B, N, Q, D]
        """
        tokens, rotated = self.layers[layer], self._rotated[layer]
        if tokens is None or rotated is None:
            return attend(queries, keys, values)
        keys = torch.cat([rotated, keys], dim=2)
        values = torch.cat([tokens.values, values], dim=2)
        if not self.policy.observes_attention:
            return attend(queries, keys, values)
        held = tokens.positions.shape[1]

        def observe(probabilities: Tensor) -> None:
            mass = probabilities[..., :held].float().sum(2).mean(1) / self.passes_per_block
            seen = self._observed[layer]
            self._observed[layer] = mass if seen is None else seen + mass

        return attend(queries, keys, values, observe=observe)

    def append(
        self, layer: int, keys: Tensor, values: Tensor, *, positions: Tensor, hidden: Tensor
    ) -> None:
        """Take in a finished block's tokens of one layer, then evict down to the budget.

        Args:
            layer: Number of the layer.
            keys: Not rotated.  [B, N, S, D]
            values: [B, N, S, D]
            positions: (frame, row, column).  [S, 3]
            hidden: The layer's input.  [B, S, E]
        """
        positions = positions.expand(keys.shape[0], -1, -1)
        with torch.no_grad():
            entering = Entering(layer, hidden.detach(), positions, self.seeds, self.head)
            new = Tokens(keys.detach(), values.detach(), positions, self.policy.enter(entering))
            old, mass = self.layers[layer], self._observed[layer]
            if old is not None:
                if mass is not None:
                    old = replace(old, features=self.policy.observe(old.features, mass))
                new = Tokens(
                    torch.cat([old.keys, new.keys], dim=2),
                    torch.cat([old.values, new.values], dim=2),
                    torch.cat([old.positions, new.positions], dim=1),
                    torch.cat([old.features, new.features], dim=1),
                )
            self.layers[layer] = self._evict(new)
            self._rotated[layer] = self._observed[layer] = None

    def _evict(self, tokens: Tokens) -> Tokens:
        held, budget = tokens.positions.shape[1], self.spec.budget_tokens
        if not self.policy.is_bounded or held <= budget:
            return tokens
        frame = tokens.positions[..., 0]
        age = (self.num_frames - 1 - frame) // self.spec.frames_per_block
        rank = self.policy.rank(tokens, age).float()
        protected = frame >= self.num_frames - self.spec.protected_frames
        if self.policy.protects_sink:
            protected |= frame < self.spec.sink_frames
        rank = rank.masked_fill(protected, torch.inf)
        # A stable sort breaks ties by age, the same on every device; the kept stay in time order.
        order = rank.argsort(dim=1, descending=True, stable=True)
        return tokens.select(order[:, :budget].sort(dim=1).values)
