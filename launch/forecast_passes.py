"""Which network passes a step of each stage consists of, from its config alone.

The counterpart of the stages' `update` on paper; a test counts what they do and compares.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from configs.load import parse_section
from configs.schema import RunConfig
from data.targets import STORED
from models.kv_policies import build_policy
from train.kinds import stage_kind

PLAIN, PAIRED, CAUSAL, PROBED = "plain", "clean and noisy", "block-causal", "with targets"
"""What self-attention does: all to all; teacher forcing; a mask; all to all, and targets."""


@dataclass(frozen=True)
class Pass:
    """Some equal forward passes of one network over the samples of a micro-batch.

    Attributes:
        network: Name in the stage.
        frames: Latent frames that enter.
        past: Cached tokens that are read; None without a cache.
        wanted: Frames whose velocity is needed; None = all.
        attention: See `PLAIN`.
        with_grad: Whether a backward pass follows.
        scored: Tokens of each layer that the salience head scores.
        count: How many, per micro-batch and step; a mean.
    """

    network: str
    frames: int
    past: int | None = None
    wanted: int | None = None
    attention: str = PLAIN
    with_grad: bool = False
    scored: int = 0
    count: float = 1.0

    def times(self, count: float) -> "Pass":
        """The same, `count` times as often."""
        return replace(self, count=self.count * count)


@dataclass(frozen=True)
class Rollout:
    """How a stage generates.

    Attributes:
        block: Frames of a block.
        tokens: Of a frame.
        budget: Tokens kept in each layer; None keeps everything.
        steps: Denoising steps of the student; one of them is drawn as the last.
        observes: Whether the policy looks at the attention of every pass.
        scores: Whether the salience head scores what enters.
    """

    block: int
    tokens: int
    budget: int | None
    steps: int
    observes: bool = False
    scores: bool = False

    def held(self, frames: int) -> int:
        """Tokens of a layer's cache when `frames` frames have been written."""
        whole = frames * self.tokens
        return whole if self.budget is None else min(whole, self.budget)

    def refresh(self, start: int) -> Pass:
        """The pass that writes the block whose first frame is `start`."""
        return Pass(
            "student",
            self.block,
            past=self.held(start),
            wanted=None if self.observes else 0,
            scored=self.block * self.tokens if self.scores else 0,
        )

    def write(self, start: int, end: int) -> list[Pass]:
        """The passes that write known frames."""
        return [self.refresh(frame) for frame in range(start, end, self.block)]

    def generate(self, start: int, end: int, *, with_grad: bool) -> list[Pass]:
        """The passes that generate frames; the number of steps is a mean over the draw."""
        found = []
        for frame in range(start, end, self.block):
            step = Pass("student", self.block, past=self.held(frame))
            if self.steps > 1:
                found.append(step.times((self.steps - 1) / 2))
            found += [replace(step, with_grad=with_grad), self.refresh(frame)]
        return found


def step_passes(config: RunConfig, name: str) -> list[Pass]:
    """All passes of a mean step of a stage, for one micro-batch; each kind once.

    Args:
        config: Of the run, checked.
        name: Of the stage.
    """
    kind = config.stages[name].kind
    counts: Counter[Pass] = Counter()
    for found in PASSES[kind](config, name, stage_params(config, name)):
        counts[replace(found, count=1)] += found.count  # type: ignore[assignment]  # a mean
    return [found.times(count) for found, count in counts.items()]


def stage_params(config: RunConfig, name: str) -> Any:
    """The stage's own settings, as its dataclass."""
    stage = config.stages[name]
    cls = stage_kind(stage.kind)
    return parse_section(cls.params_type, stage.params, key=f"stages.{name}.params")


def rollout_of(config: RunConfig, params: Any, budget: int | None = None) -> Rollout:
    """How a stage that rolls out does it; `budget` in place of the largest one it may draw."""
    sizes = {
        "block": config.model.frames_per_block,
        "tokens": config.frame_seq_len,
        "steps": params.student_steps,
    }
    if hasattr(params, "budgets"):
        return Rollout(budget=budget or max(params.budgets), **sizes)
    policy = build_policy(params.policy, params.policy_params)
    kept = params.budget_tokens if policy.is_bounded else None
    return Rollout(
        budget=kept, observes=policy.observes_attention, scores=policy.needs_head, **sizes
    )


def stream_starts(params: Any) -> list[int]:
    """Frames of a stream before each of its steps."""
    last = params.stream_frames - params.chunk_frames
    return list(range(params.prefix_frames, last + 1, params.chunk_frames))


def _teacher(config: RunConfig, name: str, params: Any) -> Iterator[Pass]:
    yield Pass("teacher", config.stages[name].frames, with_grad=True)


def _causal(config: RunConfig, name: str, params: Any) -> Iterator[Pass]:
    frames = config.stages[name].frames
    yield Pass("student", 2 * frames, wanted=frames, attention=PAIRED, with_grad=True)


def _salience(config: RunConfig, name: str, params: Any) -> Iterator[Pass]:
    stage = config.stages[name]
    trained = 1 - params.statistics_steps / stage.steps
    if params.targets != STORED:
        yield Pass("teacher", stage.frames, wanted=0, attention=PROBED)
    tokens = stage.frames * config.frame_seq_len
    yield Pass("student", stage.frames, wanted=0, attention=CAUSAL, count=trained)
    yield Pass("head", stage.frames, scored=tokens, with_grad=True, count=trained)


def _distill(config: RunConfig, name: str, params: Any) -> Iterator[Pass]:
    frames, share = config.stages[name].frames, 1 / params.student_every
    draws = [(prefix, budget) for prefix in params.prefix_frames for budget in params.budgets]
    for prefix, budget in draws:
        rollout = rollout_of(config, params, budget)
        for found in rollout.write(0, prefix):
            yield found.times(1 / len(draws))
        for with_grad, weight in ((True, share), (False, 1 - share)):
            for found in rollout.generate(prefix, frames, with_grad=with_grad):
                yield found.times(weight / len(draws))
    yield from _scores(params, frames, share)


def _streaming(config: RunConfig, name: str, params: Any) -> Iterator[Pass]:
    frames, share = config.stages[name].frames, 1 / params.student_every
    rollout, starts = rollout_of(config, params), stream_starts(params)
    mean = 1 / len(starts)
    for found in rollout.write(0, params.prefix_frames):
        yield found.times(mean)
    for found in _switches(params, rollout, starts, frames):
        yield found.times(mean * params.switch_chance)
    for start in starts:
        end = start + params.chunk_frames
        for with_grad, weight in ((True, share), (False, 1 - share)):
            for found in rollout.generate(start, end, with_grad=with_grad):
                yield found.times(mean * weight)
        for found in _scores(params, min(end, frames), share):
            yield found.times(mean)


def _switches(params: Any, rollout: Rollout, starts: list[int], frames: int) -> Iterator[Pass]:
    """The passes that rebuild the cache at a change of prompt, a mean over where it is."""
    later = starts[1:]
    for start in later:
        history = min(start, frames)
        sink = min(-(-max(params.sink_frames, 1) // rollout.block) * rollout.block, start - history)
        for found in rollout.write(0, sink + history):
            yield found.times(1 / len(later))


def _scores(params: Any, frames: int, share: float) -> Iterator[Pass]:
    """Teacher and critic judge a window for the student; the critic learns from it."""
    asked = 1 if params.guidance_scale == 1 else 2
    yield Pass("teacher", frames, count=share * asked)
    yield Pass("critic", frames, count=share)
    yield Pass("critic", frames, with_grad=True)


PASSES: dict[str, Callable[[RunConfig, str, Any], Iterator[Pass]]] = {
    "teacher": _teacher,
    "causal": _causal,
    "salience": _salience,
    "distill": _distill,
    "streaming": _streaming,
}
"""By stage kind."""
