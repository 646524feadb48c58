"""The blocks of one video, under prompts that change."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from launch.student import Student
from models.kv_cache import KVCache
from models.rollout import (
    NoiseSource,
    Sampler,
    VelocityModel,
    denoise_block,
    recache,
    refresh,
)

SWITCHES = ("recache", "flush", "cut")
CUT_FRAMES = 24
"""How much later a cut shows the first block of a new scene: far, but within a training clip."""


@dataclass
class VideoBlocks:
    """What makes one video, block by block.

    Attributes:
        student: For its sizes.
        network: Of it, in the precision of the video.
        sampler: Noise levels and rule.
        cache: Of the video.
        noise: The same.
        at_switch: What happens where the prompt changes, one of `SWITCHES`.
    """

    student: Student
    network: VelocityModel
    sampler: Sampler
    cache: KVCache
    noise: NoiseSource
    at_switch: str

    def make(
        self, prompts: list[tuple[int, Tensor]], prefix: Tensor | None, *, num_frames: int
    ) -> Iterator[Tensor]:
        """Blocks of the video, [1, F, C, H, W] each, the given ones first."""
        size, cache = self.student.frames_per_block, self.cache
        known = iter(()) if prefix is None else iter(prefix.split(size, dim=1))
        window = self.student.export.manifest["config"]["frames"] // 2 // size
        history: deque[Tensor] = deque(maxlen=max(1, window))
        sink: list[Tensor] = []
        pending = deque(prompts)
        text = pending.popleft()[1]
        for start in range(0, num_frames, size):
            changed = False
            while pending and pending[0][0] <= start:
                text, changed = pending.popleft()[1], True
            if changed:
                self._switch(text, history, sink)
            block = next(known, None)
            if block is None:
                block = denoise_block(
                    self.network,
                    text,
                    cache=cache,
                    noise=self.noise,
                    shape=(size, *self.student.latent_shape),
                    sampler=self.sampler,
                )
            refresh(self.network, text, block, cache=cache)
            history.append(block)
            if start < max(cache.spec.sink_frames, 1):
                sink.append(block)
            yield block

    def _switch(self, text: Tensor, history: Iterable[Tensor], sink: Sequence[Tensor]) -> None:
        """Bring the cache under a new prompt."""
        cache = self.cache
        if self.at_switch == "recache":
            recent, first = (torch.cat(list(blocks), dim=1) for blocks in (history, sink))
            recache(self.network, text, recent, cache=cache, sink=first)
            return
        cache.flush(cache.spec.protected_frames)
        if self.at_switch == "cut":
            cache.cut(CUT_FRAMES)
