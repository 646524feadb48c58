"""One layer of the KV cache: what it keeps, how a block reads it, how a block enters it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from models.attention import grid_positions, rotate
from models.ispa import GapStatistics
from models.kv_memory import Attending, Past, TokenMemory
from models.kv_policy import CachePolicy
from models.kv_spec import CacheSpec, Clock
from models.kv_storage import storage_named
from models.kv_tokens import Entering, Eviction, Tokens


class LayerCache:
    """Kept tokens of one layer, and those that are in 4 bits or on the host instead.

    Args:
        layer: Its number.
        spec: Of the cache.
        policy: What to keep.
    """

    def __init__(self, layer: int, *, spec: CacheSpec, policy: CachePolicy) -> None:
        self.layer, self.spec, self.policy = layer, spec, policy
        self.budget, self.is_local = spec.budget(layer), layer in spec.local_layers
        self.storage, self.low_storage = storage_named(spec.precision), storage_named("int4")
        self.kept = TokenMemory(self._capacity())
        low = spec.evicted_tokens + spec.block_len if spec.preallocate else None
        self.low = TokenMemory(low)
        self.host = TokenMemory(1024, is_growing=True)
        self._room: tuple[Tensor, Tensor] | None = None
        self.clear()

    def _capacity(self) -> int | None:
        spec = self.spec
        if not spec.preallocate:
            return None
        if not self.policy.is_bounded:
            return spec.max_frames * spec.tokens_per_frame
        warmup = spec.warmup_blocks * spec.block_len if self.is_local else 0
        return max(self.budget, warmup) + spec.block_len

    @property
    def is_plain(self) -> bool:
        """Whether values are read from where they lie, and keys are rotated once per block."""
        return self.spec.precision == "model" and self.spec.evicted == "drop"

    @property
    def is_warming(self) -> bool:
        """Whether ISPA still gathers the gap here."""
        return self._warmup_left > 0

    @property
    def num_bytes(self) -> int:
        """Bytes on the device: tokens as stored, those fetched for a block, ISPA's modulation."""
        held = (self.kept.tokens, self.low.tokens)
        total = sum(tokens.num_bytes for tokens in held if tokens is not None)
        host = self.host.tokens
        if host is not None:
            fetched = min(self.spec.evicted_tokens, host.count)
            total += host.num_bytes // host.count * fetched
        if self._modulation is not None:
            total += self._modulation.numel() * self._modulation.element_size()
        return total

    @property
    def relative_gap(self) -> float:
        """Of the warm-up so far; nan if there is none."""
        return math.nan if self._gap is None else self._gap.relative_gap

    def clear(self) -> None:
        """Forget everything."""
        for memory in (self.kept, self.low, self.host):
            memory.clear()
        self._calibration: dict[str, Tensor] = {}
        self._low_calibration: dict[str, Tensor] = {}
        self._memory: Tensor | None = None  # what the policy remembers
        self._mean_query: Tensor | None = None
        self._modulation: Tensor | None = None
        self._gap: GapStatistics | None = None
        self._warmup_left = self.spec.warmup_blocks if self.is_local else 0
        self.forget_reading()

    def forget_reading(self) -> None:
        """Drop what belongs to the block that was being made."""
        self._rotated: Tensor | None = None  # keys as the block reads them
        self._fetched: Tokens | None = None
        self._num_observed = 0
        self._observed: Tensor | None = None  # attention the past got from the block

    def flush(self, *, sink: int, newest: int) -> None:
        """Keep the first `sink` and the last `newest` tokens, and no memory of what has been."""
        tokens = self.kept.tokens
        if tokens is not None and tokens.count > sink + newest:
            parts = tokens.span(0, sink), tokens.span(tokens.count - newest, tokens.count)
            self.kept.replace(parts[0].extend(parts[1]))
        self.low.clear()
        self.host.clear()
        self._memory = self._mean_query = self._modulation = None

    def prepare(self, clock: Clock) -> None:
        """Rotate the kept keys as the block sees them, fetch tokens from the host."""
        self._fetched = self._fetch()
        self._check_room(clock)
        tokens = self.kept.tokens
        if tokens is None or not self.is_plain:
            return
        keys = rotate(tokens.parts["keys"], clock.angles(tokens.positions))
        if self.kept.room is None:
            self._rotated = keys
            return
        whole = self.kept.room.parts
        if self._room is None or self._room[1] is not whole["values"]:
            self._room = torch.zeros_like(whole["keys"]), whole["values"]
        self._rotated = self._room[0][:, :, : tokens.count]
        self._rotated.copy_(keys)

    def _check_room(self, clock: Clock) -> None:
        capacity, needed = self.kept.capacity, clock.end * self.spec.tokens_per_frame
        if not self.policy.is_bounded and capacity is not None and needed > capacity:
            raise ValueError(
                f"a preallocated cache of {self.spec.max_frames} frames must hold the video, got "
                f"frame {clock.end - 1}; raise max_frames"
            )

    def _fetch(self) -> Tokens | None:
        """The tokens on the host that the last block's mean query points at most."""
        tokens, query = self.host.tokens, self._mean_query
        if tokens is None or query is None:
            return None
        keys, _ = tokens.read()
        similar = (keys.float() @ query.to(keys.device)[..., None])[..., 0].mean(dim=1)
        count = min(self.spec.evicted_tokens, tokens.count)
        chosen = similar.topk(count).indices.sort(dim=1).values
        return tokens.select(chosen).to(query.device)

    def past(self, clock: Clock) -> Past | None:
        """What the block reads; None before the first block."""
        tokens = self.kept.tokens
        if tokens is None:
            return None
        self._check_capture(tokens)
        held = [t for t in (tokens, self.low.tokens, self._fetched) if t is not None]
        if self._rotated is not None:
            keys, values = self._rotated, tokens.parts["values"]
        else:
            read = [(part.read(), clock.angles(part.positions)) for part in held]
            keys = torch.cat([rotate(pair[0], angles) for pair, angles in read], dim=2)
            values = torch.cat([pair[1] for pair, _ in read], dim=2)
        extras = Attending(modulation=self._modulation)
        if self.policy.observes_attention:
            extras.observe = self._observe
        if self.is_warming:
            if self._gap is None:
                width = keys.shape[1] * keys.shape[3]
                self._gap = GapStatistics(len(keys), width, device=keys.device)
            extras.gap, extras.is_local = self._gap, self._within_window(tokens)
        room = self._room if self.is_plain and self.kept.capacity is not None else None
        return Past(keys, values, self._bias(held), extras, room)

    def _check_capture(self, tokens: Tokens) -> None:
        is_fixed = self.is_plain and not self.policy.observes_attention
        if not is_fixed and tokens.positions.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                "a captured pass can read only a cache in the model's precision that drops what it "
                f"evicts and observes nothing, got precision '{self.spec.precision}', evicted "
                f"'{self.spec.evicted}' and policy '{self.policy.name}'; run it without a graph"
            )

    def _bias(self, held: list[Tokens]) -> Tensor | None:
        biases = [self.policy.logit_bias(tokens) for tokens in held]
        found = [bias for bias in biases if bias is not None]
        return torch.cat(found, dim=1) if found else None

    def _observe(self, mass: Tensor) -> None:
        self._observed = mass if self._observed is None else self._observed + mass
        self._num_observed += 1

    def _within_window(self, tokens: Tokens) -> Tensor:
        """Which tokens the layer would hold if it were local already.  [B, S]."""
        sink = tokens.positions[..., 0] < self.spec.sink_frames
        window = self.budget - self.spec.sink_frames * self.spec.tokens_per_frame
        return sink | (torch.arange(tokens.count, device=sink.device) >= tokens.count - window)

    @torch.no_grad()
    def append(self, entering: Entering, *, clock: Clock, grid: tuple[int, int]) -> None:
        """Take in a finished block's tokens, then evict down to the budget.

        Args:
            entering: The block, detached.
            clock: As announced for it.
            grid: Token (rows, columns) of a frame.
        """
        keys, values = entering.projected.keys, entering.projected.values
        if self.kept.tokens is None:
            self._calibration = self.storage.calibrate(keys, values)
            if self.spec.evicted == "low":
                self._low_calibration = self.low_storage.calibrate(keys, values)
        else:
            self._renew(entering, clock)
        parts = self.storage.encode(keys, values, self._calibration)
        features = self.policy.enter(entering)
        self.kept.extend(
            Tokens(parts, entering.positions, features, self.storage, self._calibration, keys.dtype)
        )
        self._memory = self.policy.remember(self._memory, entering)
        if self.spec.evicted == "offload":
            self._mean_query = entering.projected.queries.float().mean(dim=2)
        if self.is_warming:
            self._warmup_left -= 1
            if not self.is_warming:
                assert self._gap is not None, "a warm-up has at least two blocks"
                self._modulation, self._gap = self._gap.solve(self.spec.ridge), None
        if not self.is_warming:
            self._evict(clock, grid)

    def _renew(self, entering: Entering, clock: Clock) -> None:
        """New features for the tokens that the block was made with."""
        start = 0
        for memory in (self.kept, self.low):
            if memory.tokens is None:
                continue
            if self._observed is not None:
                seen = self._observed[:, start : start + memory.count] / self._num_observed
                memory.set_features(self.policy.observe(memory.tokens.features, seen))
                start += memory.count
            tokens = memory.tokens

            def rotated_keys(tokens: Tokens = tokens) -> Tensor:
                return rotate(tokens.read()[0], clock.angles(tokens.positions))

            memory.set_features(self.policy.renew(tokens, rotated_keys, entering))

    def _evict(self, clock: Clock, grid: tuple[int, int]) -> None:
        tokens = self.kept.tokens
        assert tokens is not None
        exceeds = tokens.count > self.budget or self.policy.acts_every_block
        if not (self.policy.is_bounded and exceeds):
            return
        kept, gone = self.policy.evict(self._eviction(tokens, self.budget, clock, grid))
        moved = tokens.select(gone) if self.spec.evicted != "drop" and not self.is_local else None
        self.kept.replace(kept)
        if moved is None or not moved.count:
            return
        if self.spec.evicted == "offload":
            self.host.extend(moved.to("cpu"))
            return
        self.low.extend(moved.stored_as(self.low_storage, self._low_calibration))
        low, room = self.low.tokens, self.spec.evicted_tokens
        if low is not None and low.count > room:
            self.low.replace(self.policy.evict(self._eviction(low, room, clock, grid))[0])

    def _eviction(
        self, tokens: Tokens, budget: int, clock: Clock, grid: tuple[int, int]
    ) -> Eviction:
        frame, spec = tokens.positions[..., 0], self.spec
        protected = frame >= clock.end - spec.protected_frames
        if self.policy.protects_sink:
            protected = protected | (frame < spec.sink_frames)
        coming = clock.next()
        return Eviction(
            tokens=tokens,
            budget=budget,
            age=(clock.end - 1 - frame) // spec.frames_per_block,
            protected=protected,
            num_frames=clock.end,
            new_frames=clock.count,
            grid=grid,
            spec=spec,
            memory=self._memory,
            key_angles=lambda: coming.angles(tokens.positions),
            query_angles=lambda: coming.angles(
                grid_positions(coming.own_frames(frame.device), *grid)
            ),
        )
