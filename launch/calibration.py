"""Rollouts of the tuning clips that tell how the layers of a student use their past."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from configs.schema import EvaluateConfig
from launch.held_out import HeldOut
from launch.rollouts import roll_out
from launch.student import Student
from models.kv_budgets import LayerStatistics
from models.kv_cache import KVCache
from models.kv_policies import build_policy


def attention_statistics(
    student: Student, clips: HeldOut, settings: EvaluateConfig
) -> list[LayerStatistics]:
    """Of every layer's attention to its past, with everything kept."""
    watch = AttentionWatch(student.network.num_layers)
    whole = min(settings.frames) * student.frame_seq_len
    _calibrate(student, clips, settings, "attention_mass", watch, budget_tokens=whole)
    return watch.statistics


def window_gaps(student: Student, clips: HeldOut, settings: EvaluateConfig) -> list[float]:
    """Share of every layer's attention output that a window of the protected tokens lacks."""
    found: list[list[float]] = []
    protected = settings.sink_frames + max(settings.recent_frames, student.frames_per_block)
    _calibrate(
        student, clips, settings, "full", lambda cache: found.append(cache.relative_gaps),
        budget_tokens=protected * student.frame_seq_len,
        local_layers=tuple(range(student.network.num_layers)),
        warmup_blocks=min(settings.frames),
    )  # fmt: skip
    return found[-1]


def _calibrate(
    student: Student,
    clips: HeldOut,
    settings: EvaluateConfig,
    policy: str,
    watch: Callable[[KVCache], None],
    **spec: Any,
) -> None:
    """Roll clips out to the shortest length; `watch` sees the cache after every block."""
    spec |= {"sink_frames": settings.sink_frames, "recent_frames": settings.recent_frames}
    cache = student.new_cache(
        build_policy(policy),
        clips.noise_seeds,
        spec=student.cache_spec(time=settings.time, max_lag=settings.max_lag, **spec),
    )
    roll_out(
        student, clips, cache, num_frames=min(settings.frames),
        prefix_frames=settings.prefix_frames, on_block=watch,
    )  # fmt: skip


class AttentionWatch:
    """Gathers how layers read their past, from rollouts that keep everything.

    The cache must sum up the attention that tokens receive, as `attention_mass` does.

    Args:
        num_layers: Layers of the student.
    """

    def __init__(self, num_layers: int) -> None:
        self.statistics = [LayerStatistics() for _ in range(num_layers)]
        self._before: list[Tensor | None] = [None] * num_layers

    def __call__(self, cache: KVCache) -> None:
        """Take in what the block that has just entered has read."""
        for layer, tokens in enumerate(cache.layers):
            assert tokens is not None
            received, before = tokens.features[..., 0], self._before[layer]
            if before is not None:
                self.statistics[layer].update(received[:, : before.shape[1]] - before)
            self._before[layer] = received.clone()
