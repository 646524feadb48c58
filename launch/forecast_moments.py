"""When a step of each stage is fullest: what passes keep and take, put together; an estimate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from data.targets import STORED
from launch.forecast_activations import PassMemory, head_memory
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass, Rollout, rollout_of, stream_starts
from models.attention import Projected
from models.kv_policies import build_policy
from models.kv_tokens import Entering
from models.salience import PARTS, SalienceHead
from train.shares import FLOAT

if TYPE_CHECKING:
    from launch.forecast_memory import StageMeter


@dataclass(frozen=True)
class Moment:
    """A moment of a step at which memory may be fullest; bytes by what they are for."""

    name: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(self.parts.values())


def _moment(name: str, kept: int, most: int, **more: int) -> Moment:
    parts = {"activations": kept, "workspace": max(0, most - kept)}
    return Moment(name, {key.replace("_", " "): size for key, size in more.items()} | parts)


def _whole_pass(meter: StageMeter, name: str, found: Pass, **more: int) -> Moment:
    """The forward and backward pass over a whole window."""
    memory = meter.passed(found)
    return _moment(name, memory.kept, max(memory.forward, memory.backward), **more)


def _teacher(meter: StageMeter) -> list[Moment]:
    return [_whole_pass(meter, "update", Pass("teacher", meter.stage.frames, with_grad=True))]


def _causal(meter: StageMeter) -> list[Moment]:
    frames = meter.stage.frames
    paired = Pass("student", 2 * frames, wanted=frames, attention=PAIRED, with_grad=True)
    return [_whole_pass(meter, "update", paired)]


def _salience(meter: StageMeter) -> list[Moment]:
    frames, b, heads = meter.stage.frames, meter.samples, meter.models["teacher"].num_heads
    # What `attend_with_targets` holds of a layer: the log-sum-exp, three maxima; then the targets.
    extra = b * meter.tokens * FLOAT * (4 * heads + len(PARTS) * meter.layers)
    moments = []
    if meter.params.targets != STORED:
        asked = meter.passed(Pass("teacher", frames, wanted=0, attention=PROBED))
        moments.append(_moment("teacher", 0, asked.forward, targets=extra))
    hidden = meter.passed(Pass("student", frames, wanted=0, attention=CAUSAL))
    moments.append(_moment("student", hidden.kept, hidden.forward))
    kept, most = head_memory(
        meter.width, meter.config.head.hidden, meter.tokens, is_bf16=meter.geometry.is_bf16
    )
    all_kept = b * meter.layers * kept
    moments.append(
        _moment("head", hidden.kept + all_kept, hidden.kept + all_kept + b * (most - kept))
    )
    return moments


def _distill(meter: StageMeter) -> list[Moment]:
    rollout, prefix = rollout_of(meter.config, meter.params), min(meter.params.prefix_frames)
    return _matching(meter, rollout, prefix, meter.stage.frames, features=1, lasting={})


def _streaming(meter: StageMeter) -> list[Moment]:
    rollout, params = rollout_of(meter.config, meter.params), meter.params
    start = stream_starts(params)[-1]
    end = start + params.chunk_frames
    count = meter.share // meter.samples  # every micro-batch has streams of its own
    features = policy_features(params.policy, params.policy_params)
    lasting = {"KV_cache": count * meter.cache_bytes(rollout.held(end), features)}
    return _matching(meter, rollout, start, end, features=features, lasting=lasting)


def policy_features(name: str, params: dict[str, Any]) -> int:
    """Numbers that a policy remembers of every token: asked with two tokens."""
    tensor = torch.zeros(1, 1, 2, 6)
    entering = Entering(
        layer=0,
        hidden=tensor[0],
        positions=torch.zeros(1, 2, 3, dtype=torch.int64),
        seeds=torch.zeros(1, dtype=torch.int64),
        projected=Projected(*[tensor] * 5),
        match_prompt=lambda: torch.zeros(1, 2),
        head=SalienceHead(num_layers=1, width=6, hidden=1, grid=(1, 2)),
        targets=torch.zeros(1, 2, len(PARTS)),
    )
    return build_policy(name, params).enter(entering).shape[-1]


def _matching(
    meter: StageMeter,
    rollout: Rollout,
    start: int,
    end: int,
    *,
    features: int,
    lasting: dict[str, int],
) -> list[Moment]:
    """Of a step that trains the student, then the critic.

    Args:
        meter: Of the stage.
        rollout: How it generates.
        start: First frame with gradient.
        end: The frame behind the last one.
        features: Numbers that the policy remembers of every token.
        lasting: Bytes of what lasts between rollouts.
    """
    frames, last = min(end, meter.stage.frames), rollout.held(end - rollout.block)
    blocks = [
        _read_pass(meter, rollout.held(frame), rollout.block)
        for frame in range(start, end, rollout.block)
    ]
    kept = sum(memory.kept for memory in blocks)
    before, workspace = kept - blocks[-1].kept, blocks[-1].backward - blocks[-1].kept
    waiting = meter.bytes_until_summed() if len(blocks) > 1 else 0
    judged = meter.passed(Pass("critic", frames)).forward
    if meter.models["teacher"] != meter.models["critic"]:  # else it takes no more than the critic
        judged = max(judged, meter.passed(Pass("teacher", frames)).forward)
    cache = {"KV_cache": meter.cache_bytes(last, features), "rotated_keys": 0}
    if not meter.config.trainer.activation_checkpointing:
        cache["rotated_keys"] = meter.rotated_bytes(last)  # else kept for the backward pass anyway
    if lasting:
        own = lasting["KV_cache"] * meter.samples // meter.share
        cache["KV_cache"] += lasting["KV_cache"] - own
    return [
        _moment("rollout", kept, before + blocks[-1].forward, **cache),
        _moment("scores", kept, kept + judged, **lasting),
        _moment("student's first block back", kept, kept + workspace, **lasting),
        _moment(
            "student's next block back", before, before + workspace, **lasting, waiting=waiting
        ),
        _whole_pass(meter, "critic", Pass("critic", frames, with_grad=True), **lasting),
    ]


def _read_pass(meter: StageMeter, past: int, block: int) -> PassMemory:
    """A pass with gradient that reads a cache, from two others: memory is linear in the tokens."""
    unit = block * meter.config.frame_seq_len
    one, two = (meter.passed(Pass("student", block, past=n * unit, with_grad=True)) for n in (1, 2))
    share = past / unit - 1

    def between(low: int, high: int) -> int:
        return round(low + share * (high - low))

    return PassMemory(
        between(one.kept, two.kept),
        between(one.forward, two.forward),
        between(one.backward, two.backward),
    )


MOMENTS: dict[str, Callable[[StageMeter], list[Moment]]] = {
    "teacher": _teacher,
    "causal": _causal,
    "salience": _salience,
    "distill": _distill,
    "streaming": _streaming,
}
"""By stage kind."""
