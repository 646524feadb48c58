"""The stages as a config knows them: settings, their checks, and which networks each one takes."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from configs.checks import (
    require,
    require_above_zero,
    require_blocks,
    require_choice,
    require_range,
)
from configs.errors import ConfigError
from configs.schema import StageConfig
from data.targets import STORED
from train.kind import StageKind


@dataclass
class TeacherParams:
    """Settings of the stage.

    Attributes:
        shift: Of the noise levels drawn, see `models.flow.shift_sigma`.
        clean_prefix: Share of samples whose first blocks, half of them on average, are clean, and
            whose other blocks share one noise level: what a judge of continuations sees
            (`clean_context` in `train.distill`).
        block_noise: Share of samples whose blocks have noise levels of their own, half of them
            clean: what the causal student will see, and what teaches a small network to look
            things up far away. All other samples have one noise level per video.
        text_dropout: Share of samples whose caption is zeroed, so that guidance has an
            unconditional estimate: the empty `text.negative` of `hashed`. To `umt5` no text is
            zeros, so its captions here teach nothing that guidance could lead away from.
        preview_steps: Sampler steps of the videos shown during training.
    """

    shift: float = 3.0
    clean_prefix: float = 0.0
    block_noise: float = 0.0
    text_dropout: float = 0.1
    preview_steps: int = 16


class TeacherKind(StageKind):
    """Trains a bidirectional transformer."""

    params_type = TeacherParams
    network_sources: ClassVar = {"teacher": ()}
    export_role = "teacher"
    exported: ClassVar = {"transformer": "teacher"}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """Shares must be shares."""
        super().check(config, params, key=key, block=block)
        for name in ("clean_prefix", "block_noise", "text_dropout"):
            require_range(f"{key}.params.{name}", getattr(params, name), 0, 1)
        require(
            params.clean_prefix + params.block_noise <= 1,
            f"{key}.params: clean_prefix + block_noise must not exceed 1, found "
            f"{params.clean_prefix} + {params.block_noise}",
        )
        require_range(f"{key}.params.preview_steps", params.preview_steps, 1, 1000)


@dataclass
class CausalParams:
    """Settings of the stage.

    Attributes:
        shift: Of the noise levels drawn, one per block.
        context_noise: Largest share of noise added to the clean half, so that the student bears
            its own errors.
        evict: Train with random eviction masks over old tokens, so that a sparse cache is no
            surprise.
        sink_frames: Frames that those masks never take.
        max_recent_blocks: Those masks keep the newest 1 .. this many blocks whole.
        sample_steps: Sampler steps written into the export.
        sample_shift: Shift of those steps.
    """

    shift: float = 3.0
    context_noise: float = 0.15
    evict: bool = True
    sink_frames: int = 1
    max_recent_blocks: int = 6
    sample_steps: int = 4
    sample_shift: float = 5.0


class CausalKind(StageKind):
    """Makes a student of the teacher."""

    params_type = CausalParams
    export_role = "student"
    network_sources: ClassVar = {"student": (("teacher", "transformer"),)}
    exported: ClassVar = {"transformer": "student"}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """The context must stay recognisable and the sampler have steps."""
        super().check(config, params, key=key, block=block)
        require_range(f"{key}.params.context_noise", params.context_noise, 0, 1)
        require_range(f"{key}.params.max_recent_blocks", params.max_recent_blocks, 1, 10**6)
        require_range(f"{key}.params.sample_steps", params.sample_steps, 1, 1000)
        for name in ("shift", "sample_shift"):
            require_above_zero(f"{key}.params.{name}", getattr(params, name))


@dataclass
class DistributionMatchingParams:
    """Settings that `distill` and `streaming` share.

    Attributes:
        student_steps: Network passes per block of the few-step student.
        student_shift: Shift of their noise levels.
        score_shift: Shift of the noise levels at which teacher and critic judge.
        score_range: Lowest and highest of those noise levels; draws beyond an end are moved to it.
        clean_context: Let teacher and critic see the frames that do not count without noise; for
            a teacher that was trained with clean prefixes.
        guidance_scale: Of the teacher's estimate, which is led away from `text.negative`: s in
            unconditional + s * (conditional - unconditional); 1 = off.
        student_every: The student is updated every so many steps, the critic in every step.
        sink_frames: Frames never evicted during rollouts.
    """

    student_steps: int = 2
    student_shift: float = 5.0
    score_shift: float = 3.0
    score_range: list[float] = field(default_factory=lambda: [0.02, 0.98])
    clean_context: bool = False
    guidance_scale: float = 1.0
    student_every: int = 5
    sink_frames: int = 1


class DistributionMatchingKind(StageKind):
    """What `distill` and `streaming` share."""

    takes_lora = True
    frozen_sources: ClassVar = {"teacher": (("teacher", "transformer"),)}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """What both rollout stages need of their settings."""
        super().check(config, params, key=key, block=block)
        require_range(f"{key}.params.student_steps", params.student_steps, 1, 1000)
        require_range(f"{key}.params.student_every", params.student_every, 1, config.steps)
        for name in ("student_shift", "score_shift"):
            require_above_zero(f"{key}.params.{name}", getattr(params, name))
        require(
            len(params.score_range) == 2,
            f"{key}.params.score_range must be [lowest, highest], found {params.score_range}",
        )
        low, high = params.score_range
        require_range(f"{key}.params.score_range", low, 0, high)
        require_range(f"{key}.params.score_range", high, low, 1)


@dataclass
class DistillParams(DistributionMatchingParams):
    """Settings of the stage, besides those it shares with `streaming`.

    Attributes:
        prefix_frames: True frames that a rollout continues; one is drawn per step.
        budgets: Tokens per layer during rollouts, under random eviction; one is drawn per step.
    """

    prefix_frames: list[int] = field(default_factory=lambda: [24])
    budgets: list[int] = field(default_factory=lambda: [128])


class DistillKind(DistributionMatchingKind):
    """Trains a few-step student and its critic on short rollouts."""

    params_type = DistillParams
    network_sources: ClassVar = {
        "student": (("student", "transformer"),),
        "critic": (("critic", "critic"), ("critic", "transformer"), ("teacher", "transformer")),
    }
    export_role = "student"
    exported: ClassVar = {"transformer": "student", "critic": "critic"}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """A rollout must have frames to generate behind its prefix."""
        super().check(config, params, key=key, block=block)
        for name in ("prefix_frames", "budgets"):
            require(
                len(getattr(params, name)) > 0,
                f"{key}.params.{name} must list at least one number, found none",
            )
        require_blocks(f"{key}.params.prefix_frames", params.prefix_frames, block, least=0)
        for frames in params.prefix_frames:
            require_range(f"{key}.params.prefix_frames", frames, 0, config.frames - block)


@dataclass
class SalienceParams:
    """Settings of the stage.

    Attributes:
        sigma: Noise level at which the teacher is asked.
        log: Regress log probabilities instead of probabilities.
        per_block: Standardise targets within their block first, then as always per layer and part.
        horizon: Later blocks that a key must have for its `later` target to count.
        statistics_steps: First steps, which only gather the statistics that targets are
            standardised by.
        ranking_weight: Of the ranking loss beside the regression.
        budget_share: Share of a clip's tokens at which recall is measured.
        targets: `online` asks the teacher in every step, with new noise and a new window of the
            clip in each epoch; `shards` asks it once for every clip before the stage, with noise
            and a window that are the clip's own for ever, and reads what it said.
    """

    sigma: float = 0.85
    log: bool = False
    per_block: bool = False
    horizon: int = 2
    statistics_steps: int = 12
    ranking_weight: float = 0.0
    budget_share: float = 0.25
    targets: str = "online"


class SalienceKind(StageKind):
    """Trains the S-MLP."""

    params_type = SalienceParams
    network_sources: ClassVar = {"head": ()}
    frozen_sources: ClassVar = {
        "teacher": (("teacher", "transformer"),),
        "student": (("student", "transformer"),),
    }
    export_role = "student"
    exported: ClassVar = {"transformer": "student", "head": "head"}
    shared_geometry: ClassVar = (*StageKind.shared_geometry, "num_layers")

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """Statistics come first and leave steps to train; keys must have a future."""
        super().check(config, params, key=key, block=block)
        require_range(f"{key}.params.sigma", params.sigma, 0, 1)
        require_range(
            f"{key}.params.statistics_steps", params.statistics_steps, 1, config.steps - 1
        )
        require_range(f"{key}.params.horizon", params.horizon, 1, config.frames // block - 1)
        require_range(f"{key}.params.budget_share", params.budget_share, 0, 1)
        require_choice(f"{key}.params.targets", params.targets, ("online", STORED))


@dataclass
class StreamingParams(DistributionMatchingParams):
    """Settings of the stage, besides those it shares with `distill`.

    Attributes:
        policy: Cache policy.
        policy_params: Of the policy.
        budget_tokens: Tokens per layer.
        time: `absolute` or `relative` frame numbers, see `models.kv_cache.CacheSpec`.
        max_lag: Longest lag shown by `relative` time.
        prefix_frames: True frames at the start of a stream, at least one block.
        chunk_frames: Frames added per step.
        stream_frames: Length at which a stream ends.
        switch_chance: Chance that a stream changes its prompt once, in its middle, to the prompt of
            another clip.
    """

    student_every: int = 2
    policy: str = "salience"
    policy_params: dict[str, Any] = field(default_factory=dict)
    budget_tokens: int = 128
    time: str = "absolute"
    max_lag: int = 47
    prefix_frames: int = 24
    chunk_frames: int = 24
    stream_frames: int = 240
    switch_chance: float = 0.0


class StreamingKind(DistributionMatchingKind):
    """Trains a few-step student and its critic on long rollouts."""

    params_type = StreamingParams
    network_sources: ClassVar = {
        "student": (("student", "transformer"),),
        "critic": (("critic", "critic"), ("critic", "transformer"), ("teacher", "transformer")),
    }
    frozen_sources: ClassVar = {
        "teacher": (("teacher", "transformer"),),
        "head": (("student", "head"),),
    }
    export_role = "student"
    exported: ClassVar = {"transformer": "student", "critic": "critic", "head": "head"}
    restarts_at_snapshot = True

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """A stream must hold its prefix and a chunk, and a window judge a whole chunk."""
        super().check(config, params, key=key, block=block)
        where = f"{key}.params"
        require_blocks(f"{where}.prefix_frames", [params.prefix_frames], block)
        require_blocks(f"{where}.chunk_frames", [params.chunk_frames], block)
        require_range(f"{where}.prefix_frames", params.prefix_frames, block, config.frames)
        require_range(f"{where}.chunk_frames", params.chunk_frames, block, config.frames)
        shortest = params.prefix_frames + params.chunk_frames
        require_range(f"{where}.stream_frames", params.stream_frames, shortest, 10**9)
        require_range(f"{where}.switch_chance", params.switch_chance, 0, 1)
        require_choice(f"{where}.time", params.time, ("absolute", "relative"))
        require_range(f"{where}.max_lag", params.max_lag, params.sink_frames + block, 10**9)


KINDS: dict[str, type[StageKind]] = {
    "teacher": TeacherKind,
    "causal": CausalKind,
    "distill": DistillKind,
    "salience": SalienceKind,
    "streaming": StreamingKind,
}
"""By what `kind` of a stage says."""


def stage_kind(kind: str) -> type[StageKind]:
    """What a stage of this kind is.

    Raises:
        ConfigError: If there is none of that name.
    """
    if kind not in KINDS:
        raise ConfigError(f"stage kind must be one of {list(KINDS)}, found {kind!r}")
    return KINDS[kind]
