"""Rollouts of held-out clips, and the numbers that a rollout is judged by."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from data.truth import measure, measure_self_consistency
from launch.held_out import HeldOut
from launch.student import Student
from models.kv_cache import KVCache
from models.rollout import NoiseSource, generate_blocks

CLIPS_AT_ONCE = 8
"""Videos decoded to pixels at the same time."""


@dataclass(frozen=True)
class Rollout:
    """Finished videos.

    Attributes:
        latents: True prefix and generated frames.  [N, F, C, H, W]
        prefix_frames: How many frames are true.
        held_tokens: Cached tokens per layer and video at the end.
        held_bytes: Bytes of keys and values per video at the end, on the device.
        host_bytes: The same in host memory.
        frames_per_second: Frames of all videos over the time of the whole rollout.
    """

    latents: Tensor
    prefix_frames: int
    held_tokens: int
    held_bytes: int
    host_bytes: int
    frames_per_second: float


@torch.inference_mode()
def roll_out(
    student: Student,
    clips: HeldOut,
    cache: KVCache,
    *,
    num_frames: int,
    prefix_frames: int,
    on_block: Callable[[KVCache], None] | None = None,
) -> Rollout:
    """Continue clips from their first frames.

    Args:
        student: With the sampler to use.
        clips: All are rolled out as one batch.
        cache: Empty, made for these clips.
        num_frames: Frames at the end, prefix included.
        prefix_frames: True frames to start from; 0 starts from the caption alone.
        on_block: Called after every block has entered the cache.
    """
    began = time.perf_counter()
    blocks = []
    for block in generate_blocks(
        student.network,
        clips.text,
        cache=cache,
        noise=NoiseSource(clips.noise_seeds),
        num_frames=num_frames,
        latent_shape=student.latent_shape,
        sampler=student.sampler,
        prefix=clips.latents[:, :prefix_frames] if prefix_frames else None,
    ):
        blocks.append(block.cpu())
        if on_block is not None:
            on_block(cache)
    seconds = time.perf_counter() - began
    latents = torch.cat(blocks, dim=1)[:, :num_frames]
    return Rollout(
        latents=latents,
        prefix_frames=prefix_frames,
        held_tokens=cache.num_tokens,
        held_bytes=cache.num_bytes // len(latents),
        host_bytes=cache.host_bytes // len(latents),
        frames_per_second=len(latents) * num_frames / seconds,
    )


def decode(student: Student, latents: Tensor) -> Tensor:
    """Pixels in [-1, 1].  [N, F, C, H, W] to [N, F, 3, height, width]."""
    return student.codec.decode(latents).clamp(-1, 1)


def measure_rollout(student: Student, clips: HeldOut, rollout: Rollout) -> dict[str, Tensor]:
    """Values of every frame by name, [N, F], see `data.truth.measure`.

    Without a prefix nothing prescribes the identities: then only `self_consistent` is there.
    """
    parts: list[dict[str, Tensor]] = []
    for start in range(0, len(rollout.latents), CLIPS_AT_ONCE):
        span = slice(start, start + CLIPS_AT_ONCE)
        frames = decode(student, rollout.latents[span])
        if rollout.prefix_frames:
            reference = decode(student, clips.latents[span, : rollout.prefix_frames].cpu())
            parts.append(measure(frames, clips.truth[span], 0, reference=reference))
        else:
            repeated = measure_self_consistency(frames, clips.truth[span])
            parts.append({"self_consistent": repeated})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def summarise(
    values: dict[str, Tensor],
    groups: Sequence[int],
    *,
    prefix_frames: int,
    num_frames: int,
    period: int,
) -> dict[str, Any]:
    """The row of a rollout, over its generated frames only.

    Args:
        values: From `measure_rollout`.  [N, F]
        groups: Evaluation seed of each clip.  [N]
        prefix_frames: Frames that were given.
        num_frames: Frames to look at, at most F: a longer rollout contains the shorter ones.
        period: Frames of a revolution.
    """
    made = {name: value[:, prefix_frames:num_frames] for name, value in values.items()}
    if "self_consistent" in made:
        return {"self_consistency": spread_over_seeds(made["self_consistent"], groups)}
    correct = made["identity_correct"]
    compared = {}
    if "error_to_full" in made:
        compared["error_to_full"] = _mean(made["error_to_full"])
    return compared | {
        "identity_accuracy": spread_over_seeds(correct, groups),
        "identity_accuracy_per_seed": _per_seed(correct, groups),
        "accuracy_per_revolution": _per_revolution(correct, period),
        "previous_revolution_accuracy": spread_over_seeds(made["identity_repeated"], groups),
        "position_error": _mean(1 - made["position_correct"]),
        "background_drift": _mean(made["background_error"][:, -period:]),
        "pixel_error": _mean(made["pixel_error"]),
        "crisp_share": spread_over_seeds(made["crisp"], groups),
        "checker_contrast": _mean(made["checker_contrast"]),
    }


def spread_over_seeds(values: Tensor, groups: Sequence[int]) -> dict[str, float | None]:
    """Mean, and sample standard deviation over the seeds' means (0 for a single seed).

    Both are None where nothing is defined, as a repetition in a clip shorter than a revolution.

    Args:
        values: NaN where undefined.  [N, F]
        groups: Seed of each of the N.
    """
    means = [mean for mean in _per_seed(values, groups) if mean is not None]
    if not means:
        return {"mean": None, "std": None}
    std = statistics.stdev(means) if len(means) > 1 else 0.0
    return {"mean": statistics.fmean(means), "std": std}


def _per_seed(values: Tensor, groups: Sequence[int]) -> list[float | None]:
    labels = torch.tensor(groups)
    return [_mean(values[labels == seed]) for seed in dict.fromkeys(groups)]


def _per_revolution(correct: Tensor, period: int) -> list[float | None]:
    """Accuracy of each revolution; a last one that is less than half done is left out."""
    count = max(1, math.floor(correct.shape[1] / period + 0.5))
    return [_mean(correct[:, turn * period : (turn + 1) * period]) for turn in range(count)]


def _mean(values: Tensor) -> float | None:
    """Mean of what is defined, in float64; None if nothing is."""
    defined = values[~values.isnan()].double()
    return float(defined.mean()) if defined.numel() else None
