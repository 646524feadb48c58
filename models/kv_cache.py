"""The KV cache of the causal student: unrotated keys, a position for every token, a fixed budget.

For training nothing is written in place: a block's tokens are appended as detached tensors, so that
no gradient crosses blocks and a recomputed forward pass sees the past it saw before. For generation
the same cache can lie in memory that is taken once (`CacheSpec.preallocate`), with equal results.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from models.attention import grid_positions
from models.kv_layer import LayerCache
from models.kv_memory import Past
from models.kv_policies import build_policy
from models.kv_policy import CachePolicy
from models.kv_spec import CacheSpec, Clock
from models.kv_tokens import Entering, Tokens

if TYPE_CHECKING:
    from models.salience import SalienceHead


class KVCache:
    """Past of a batch of videos that advance in step.

    One generation step is `begin` (which block comes), any number of passes that read, then one
    that writes, after which the policy evicts down to the budget, per layer and per sample.

    Args:
        num_layers: Layers of the transformer.
        head_dim: Channels of a head.
        rope_theta: Base of the rotary frequencies.
        spec: Geometry, budget, storage.
        policy: What to keep.
        seeds: Seed of each sample, for policies that draw lots.  [B]
        head: Salience head, needed by policies that say so.
        targets: True salience of every token, needed by policies that say so.  [L, B, S, 3]

    Raises:
        ValueError: If the budget cannot hold the protected frames, or head or targets are missing.
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
        head: SalienceHead | None = None,
        targets: Tensor | None = None,
    ) -> None:
        spec.check(policy, num_layers)
        if policy.needs_head and head is None:
            raise ValueError(
                f"policy '{policy.name}' needs a salience head, this checkpoint has none; "
                "take one from the `salience` stage or later, or choose another policy"
            )
        if policy.needs_targets and targets is None:
            raise ValueError(
                f"policy '{policy.name}' needs the teacher's targets on the video itself, got "
                "none; only an evaluation can have them, choose another policy"
            )
        self.spec, self.policy, self.seeds = spec, policy, seeds
        self.head, self.targets = head, targets
        self.head_dim, self.rope_theta = head_dim, rope_theta
        window = build_policy("sink_window")  # of layers that ISPA makes local
        self._layers = [
            LayerCache(
                layer,
                spec=spec,
                policy=window if layer in spec.local_layers else policy,
            )
            for layer in range(num_layers)
        ]
        self.num_frames = 0  # frames written so far
        self._clock: Clock | None = None
        self._next_gap = 0
        self._frames: Tensor | None = None

    @property
    def layers(self) -> list[Tokens | None]:
        """Kept tokens of each layer; those in 4 bits or on the host are not among them."""
        return [layer.kept.tokens for layer in self._layers]

    @property
    def num_tokens(self) -> int:
        """Tokens kept per sample, mean over layers, rounded down."""
        return sum(layer.kept.count for layer in self._layers) // len(self._layers)

    @property
    def num_bytes(self) -> int:
        """Bytes on the device of all that is held, see `LayerCache.num_bytes`."""
        return sum(layer.num_bytes for layer in self._layers)

    @property
    def host_bytes(self) -> int:
        """Bytes of the tokens that were moved to host memory."""
        held = [layer.host.tokens for layer in self._layers]
        return sum(tokens.num_bytes for tokens in held if tokens is not None)

    @property
    def needs_whole_passes(self) -> bool:
        """Whether the attention of every layer counts, even in a pass that only writes."""
        return self.policy.observes_attention or any(layer.is_warming for layer in self._layers)

    @property
    def relative_gaps(self) -> list[float]:
        """What local attention lacks, of each layer that ISPA watches in its warm-up.

        See `models.ispa.GapStatistics.relative_gap`; nan before the second block.
        """
        return [layer.relative_gap for layer in self._layers if layer.is_local]

    @property
    def clock(self) -> Clock:
        """Of the announced block.

        Raises:
            ValueError: If none is announced.
        """
        if self._clock is None:
            raise ValueError(
                "a block must be announced before it is read or written; call cache.begin(frames)"
            )
        return self._clock

    def clear(self) -> None:
        """Forget everything; the next block is frame 0."""
        for layer in self._layers:
            layer.clear()
        self.num_frames, self._next_gap = 0, 0
        self._clock = None

    def skip_to(self, frame: int) -> None:
        """Let the next block start at a later frame; the frames between are never seen.

        Raises:
            ValueError: If the frame lies in the past.
        """
        if frame < self.num_frames:
            raise ValueError(f"cannot go back from frame {self.num_frames} to {frame}")
        self.num_frames = frame
        self._forget_reading()

    def flush(self, recent_frames: int) -> None:
        """Keep sink and newest frames only, as when the prompt changes.

        Source: KV flush of Infinity-RoPE, arXiv:2511.20649.

        Args:
            recent_frames: Newest frames that stay.

        Raises:
            ValueError: If the policy does not protect as many, or not the sink.
        """
        if recent_frames > self.spec.protected_frames or not self.policy.protects_sink:
            raise ValueError(
                f"a flush keeps the sink and at most the {self.spec.protected_frames} newest "
                f"frames, which the cache must protect; got {recent_frames} frames and policy "
                f"'{self.policy.name}'; raise recent_frames of the cache or choose another policy"
            )
        per_frame = self.spec.tokens_per_frame
        sink = min(self.spec.sink_frames, self.num_frames)
        newest = min(recent_frames, self.num_frames - sink)
        for layer in self._layers:
            layer.flush(sink=sink * per_frame, newest=newest * per_frame)
        self._forget_reading()

    def cut(self, gap_frames: int) -> None:
        """Show the coming block later than it stands, once, as the first block of a new scene.

        Source: RoPE cut of Infinity-RoPE, arXiv:2511.20649.

        Args:
            gap_frames: By how many frames.
        """
        self._next_gap = gap_frames
        self._forget_reading()

    def begin(self, count: int) -> None:
        """Announce the block that comes next; its past is rotated here, once for all passes.

        Args:
            count: Frames of the block, which starts with the first that is not written yet.
        """
        clock = Clock(
            self.spec, self.head_dim, self.rope_theta, self.num_frames, count, self._next_gap
        )
        if self._clock == clock:
            return
        self._forget_reading()
        self._clock = clock
        own = clock.own_frames(self.seeds.device)
        frames = torch.stack([own, clock.shown(own) + clock.gap_frames])  # [2, F]
        if self.spec.preallocate and self._frames is not None and self._frames.shape[1] == count:
            self._frames.copy_(frames)  # where a captured CUDA graph reads them
        else:
            self._frames = frames
        for layer in self._layers:
            layer.prepare(clock)

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """(frame, row, column) of the announced tokens: true ones, and as attention sees them.

        Args:
            grid: Token (rows, columns) of a frame.

        Returns:
            [S, 3] each
        """
        assert self.clock.count > 0
        assert self._frames is not None, "made when the block was announced"
        own, shown = self._frames
        return grid_positions(own, *grid), grid_positions(shown, *grid)

    def past(self, layer: int) -> Past | None:
        """What the announced block reads of a layer; None before the first block."""
        return self._layers[layer].past(self.clock)

    def append(self, entering: Entering, *, grid: tuple[int, int]) -> None:
        """Take in the announced block's tokens of one layer, then evict down to the budget.

        Args:
            entering: The block, detached; head and targets are filled in here.
            grid: Token (rows, columns) of a frame.
        """
        entering.head = self.head
        if self.targets is not None:
            first = self.num_frames * self.spec.tokens_per_frame
            last = first + entering.projected.keys.shape[2]
            entering.targets = self.targets[entering.layer, :, first:last]
        self._layers[entering.layer].append(entering, clock=self.clock, grid=grid)

    def advance(self) -> None:
        """The announced block is written in all layers; the next one follows it."""
        self.num_frames = self.clock.end
        self._next_gap = 0
        self._forget_reading()

    def _forget_reading(self) -> None:
        self._clock = None
        for layer in self._layers:
            layer.forget_reading()
