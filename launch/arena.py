"""Where the jobs of an evaluation run: students and clips, loaded once per process."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.load import config_hash, parse_section
from configs.schema import RunConfig
from data.truth import NUM_CLASSES, Truth
from launch.cache_forms import FORMS, Geometry
from launch.calibration import attention_statistics, window_gaps
from launch.contest import Contestant, Job
from launch.export import load_export, load_weights
from launch.held_out import HeldOut, content_hash, load
from launch.inputs import input_paths
from launch.oracle import Seer
from launch.rollouts import measure_rollout, roll_out, summarise
from launch.student import Student, head_from_config, load_student, transformer_from_config
from models.kv_budgets import NEED_STATISTICS
from models.kv_cache import KVCache
from models.kv_policies import POLICIES
from models.kv_spec import CacheSpec
from models.salience import SalienceHead
from train.kinds import SalienceParams

VERSION = 9
"""Part of every job's key: raise it when a job gives other numbers than before."""
CLIPS_PER_UNTRAINED_HEAD = 2


@dataclass(frozen=True)
class Arena:
    """Everything that jobs share.

    Attributes:
        config: Of the run.
        students: By stage, in the order of the evaluation; each with a head if there is any.
        head_of: Stage to the stage whose head it uses.
        seers: By stage, the teacher of its head, where it was found.
        clips: Held-out clips that are reported.
        tuning_clips: Held-out clips on which age weights are chosen.
        clip_hashes: Content of both.
    """

    config: RunConfig
    students: dict[str, Student]
    head_of: dict[str, str]
    seers: dict[str, Seer]
    clips: HeldOut
    tuning_clips: HeldOut
    clip_hashes: list[str]
    _memo: dict[Any, Any] = field(default_factory=dict)
    """What several jobs of this process need."""

    @property
    def has_head(self) -> dict[str, bool]:
        """By stage: whether a head goes with the student."""
        return {stage: student.head is not None for stage, student in self.students.items()}

    @property
    def has_teacher(self) -> dict[str, bool]:
        """By stage: whether the head's teacher was found."""
        return {stage: self.head_of.get(stage) in self.seers for stage in self.students}

    def key(self, job: Job) -> str:
        """Hash of all that the result of a job follows from."""
        settings = self.config.evaluate
        names = ("prefix_frames", "steps", "shift", "sink_frames", "recent_frames", "time")
        head_of = self.head_of.get(job.stage)
        needs_teacher = POLICIES[job.contestant.policy].needs_targets
        return config_hash(
            {
                "version": VERSION,
                "job": job.identity(),
                "compared": self._is_compared_with_full(job),
                "settings": {name: getattr(settings, name) for name in (*names, "max_lag")},
                "student": self.students[job.stage].export.hash,
                "head": self.students[head_of].export.hash if head_of else "",
                "teacher": self.seers[str(head_of)].hash if needs_teacher else "",
                "clips": self.clip_hashes,
            }
        )

    def new_cache(self, student: Student, job: Job, clips: HeldOut) -> KVCache:
        """The cache of a job.

        Raises:
            UserError: If the budget does not hold what the cache protects.
        """
        policy = job.contestant.build(job.age_weight)
        try:
            spec = self.spec(student, job)
            targets = self._true_salience(student, job, clips) if policy.needs_targets else None
            return student.new_cache(policy, clips.noise_seeds, spec=spec, targets=targets)
        except ValueError as error:
            raise UserError(f"evaluate, policy {job.contestant.name!r}: {error}") from error

    def spec(self, student: Student, job: Job, *, is_trial: bool = False) -> CacheSpec:
        """Geometry and storage of a job's cache.

        Args:
            student: From `student_for`.
            job: With the form of the cache.
            is_trial: Only to see whether it fits: which layers ISPA makes local is made up.

        Raises:
            ValueError: If the budget is too small for the form.
        """
        settings, block = self.config.evaluate, student.frames_per_block
        plain = student.cache_spec(
            budget_tokens=job.budget_tokens,
            sink_frames=settings.sink_frames,
            recent_frames=settings.recent_frames,
            time=settings.time,
            max_lag=settings.max_lag,
        )
        if not job.contestant.form:
            return plain
        geometry = Geometry(
            network=student.network,
            budget=job.budget_tokens,
            least=(plain.sink_frames + plain.protected_frames) * plain.tokens_per_frame,
            warmup_blocks=max(2, settings.prefix_frames // block),
            statistics=lambda: self._once(
                ("statistics", job.stage),
                lambda: attention_statistics(student, self.tuning_clips, settings),
            ),
            gaps=lambda: self._gaps(student, job, is_trial=is_trial),
        )
        return replace(plain, **FORMS[job.contestant.form](geometry))

    def _gaps(self, student: Student, job: Job, *, is_trial: bool) -> list[float]:
        if is_trial:
            return [0.0] * student.network.num_layers
        settings = self.config.evaluate
        found: list[float] = self._once(
            ("gaps", job.stage), lambda: window_gaps(student, self.tuning_clips, settings)
        )
        return found

    def _once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives, made once in this process."""
        if key not in self._memo:
            self._memo[key] = make()
        return self._memo[key]

    def _everything_kept(self, student: Student, job: Job, clips: HeldOut) -> Tensor:
        """The clips as the student makes them, from the same noise, when nothing is evicted."""
        seeds = tuple(clips.noise_seeds.tolist())

        def make() -> Tensor:
            whole = replace(job, contestant=Contestant("full", "full"), age_weight=None)
            cache = self.new_cache(student, whole, clips)
            prefix = self._prefix_frames(job)
            return roll_out(
                student, clips, cache, num_frames=max(job.frames), prefix_frames=prefix
            ).latents

        key = ("everything", job.section == "prefix_free", job.stage, max(job.frames), job.steps)
        found: Tensor = self._once((*key, seeds), make)
        return found

    def _true_salience(self, student: Student, job: Job, clips: HeldOut) -> Tensor:
        """The teacher's targets on those clips."""
        seer = self.seers[self.head_of[job.stage]]
        latents = self._everything_kept(student, job, clips).to(clips.latents.device)
        return seer.targets(latents, clips)

    def _prefix_frames(self, job: Job) -> int:
        return 0 if job.section == "prefix_free" else self.config.evaluate.prefix_frames

    def _is_compared_with_full(self, job: Job) -> bool:
        """Whether the distance to what a cache without eviction gives is asked for."""
        first = next(iter(self.students))
        wanted = self.config.evaluate.forms and job.stage == first
        short = max(job.frames) <= self.config.evaluate.unbounded_frames
        return bool(wanted and short and job.section in ("policies", "forms"))

    def student_for(self, job: Job) -> Student:
        """The student of a job, with the head and the number of steps it asks for."""
        settings, student = self.config.evaluate, self.students[job.stage]
        steps = job.steps
        if steps is None and not student.sampler.renoise:
            steps = settings.steps
        if steps is not None:
            student = replace(student, sampler=student.with_steps(steps, shift=settings.shift))
        if job.contestant.head == "untrained":
            student = replace(student, head=_untrained(student, 0))
        return student

    def entries(self, job: Job, clips: HeldOut) -> list[tuple[Student, HeldOut]]:
        """Who rolls out which clips; `CLIPS_PER_UNTRAINED_HEAD` share a head.

        Untrained heads differ much: what a random direction of the hidden state tells apart is
        chance, so that a few of them would say little.
        """
        student = self.student_for(job)
        if job.contestant.head != "untrained":
            return [(student, clips)]
        return [
            (replace(student, head=_untrained(student, number)), part)
            for number, part in enumerate(clips.split(CLIPS_PER_UNTRAINED_HEAD))
        ]

    def run(self, job: Job) -> list[dict[str, Any]]:
        """The rows of a job, one per length."""
        is_tuning = job.section == "tuning"
        clips = (self.tuning_clips if is_tuning else self.clips).first(job.clips_per_seed)
        prefix = self._prefix_frames(job)
        parts: list[dict[str, Tensor]] = []
        speeds: list[float] = []
        for student, some in self.entries(job, clips):
            cache = self.new_cache(student, job, some)
            rollout = roll_out(
                student, some, cache, num_frames=max(job.frames), prefix_frames=prefix
            )
            measured = measure_rollout(student, some, rollout)
            if self._is_compared_with_full(job):
                whole = self._everything_kept(self.student_for(job), job, clips)
                chosen = torch.isin(clips.noise_seeds, some.noise_seeds).cpu()
                distance = (rollout.latents - whole[chosen]).square().mean(dim=(2, 3, 4))
                measured["error_to_full"] = distance
            parts.append(measured)
            speeds.append(rollout.frames_per_second)
        values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        about = self.describe(job, student) | {
            "frames_per_second": statistics.harmonic_mean(speeds),
            "rollout_seeds": list(dict.fromkeys(clips.groups)),
            "clips": len(clips.groups),
        }
        rows = []
        for frames in job.frames:
            tokens, held = job.budget_tokens, rollout.held_bytes
            if not cache.policy.is_bounded:
                tokens = frames * student.frame_seq_len
                held = held * tokens // rollout.held_tokens
            share = tokens / (student.export.manifest["config"]["frames"] * student.frame_seq_len)
            size = {"budget_tokens": tokens, "budget_share": share, "kv_bytes": held}
            kept = rollout.held_tokens if cache.policy.is_bounded else tokens
            size |= {"held_tokens": kept, "host_bytes": rollout.host_bytes}
            numbers = summarise(
                values,
                clips.groups,
                prefix_frames=prefix,
                num_frames=frames,
                period=clips.truth[0].period,
            )
            rows.append(about | {"frames": frames} | size | numbers)
        return rows

    def describe(self, job: Job, student: Student) -> dict[str, Any]:
        """What a row says of its job besides the numbers."""
        return {
            "stage": job.stage,
            "policy": job.contestant.name,
            "form": job.contestant.form,
            "weights": job.contestant.weights,
            "age_weight": job.age_weight,
            "steps": student.sampler.num_steps,
            "train_seed": student.export.manifest["train_seed"],
            "head_stage": self.head_of.get(job.stage) if job.contestant.head else None,
        }

    def world(self) -> dict[str, Any]:
        """Facts about the test that the report explains."""
        student, truth = next(iter(self.students.values())), self.clips.truth[0]
        return {
            "identities": len(truth.colors),
            "period": truth.period,
            "frames_shown": _frames_shown(truth),
            "prefix_frames": self.config.evaluate.prefix_frames,
            "training_frames": student.export.manifest["config"]["frames"],
            "tokens_per_frame": student.frame_seq_len,
            "frames_per_block": student.frames_per_block,
            "chance": 1 / NUM_CLASSES,
        }


def _frames_shown(truth: Truth) -> int:
    return truth.period // len(truth.colors)


def _untrained(student: Student, seed: int) -> SalienceHead:
    """A head with the statistics of the trained one and fresh weights that follow from `seed`."""
    assert student.head is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = head_from_config(student.export.manifest["config"])
    for name, values in student.head.named_buffers():
        head.get_buffer(name).copy_(values)
    return head.to(values.device).eval()


def load_arena(config: RunConfig, ckpts: Sequence[Path], clips: Path) -> Arena:
    """Load students and clips.

    A student without a head borrows that of the last earlier checkpoint that has one.

    Raises:
        UserError: If a checkpoint is missing, damaged or no student, or lengths do not fit.
    """
    settings = config.evaluate
    students: dict[str, Student] = {}
    head_of: dict[str, str] = {}
    device = device_of(config)
    last = ""
    for path in ckpts:
        student = load_student(path)
        stage = str(student.export.manifest["stage"])
        if stage in students:
            stage = f"{stage}-{student.export.hash[:6]}"
        if student.head is None and last:
            student.head = students[last].head
        elif student.head is not None:
            student.head.to(device)
            last = stage
        if last:
            head_of[stage] = last
        student.network.to(device)
        students[stage] = student
        _check_lengths(config, student)
    seeds = [*settings.seeds, settings.tune_seed]
    return Arena(
        config=config,
        students=students,
        head_of=head_of,
        seers=_load_seers(config, students, device),
        clips=load(clips, settings.seeds).to(device),
        tuning_clips=load(clips, [settings.tune_seed]).to(device),
        clip_hashes=content_hash(clips, seeds),
    )


def _load_seers(
    config: RunConfig, students: Mapping[str, Student], device: torch.device
) -> dict[str, Seer]:
    """The teacher of every head whose stage is in the plan of the run, by the head's stage."""
    seers = {}
    for stage, student in students.items():
        plan = config.stages.get(student.export.manifest["stage"])
        if plan is None or plan.kind != "salience" or "teacher" not in plan.inputs:
            continue
        key = f"stages.{stage}.params"
        params: SalienceParams = parse_section(SalienceParams, plan.params, key=key)
        export = load_export(input_paths(config, plan)["teacher"], role="teacher")
        teacher = transformer_from_config(export.manifest["config"]["model"])
        load_weights(teacher, export, stem="transformer")
        frames = student.export.manifest["config"]["frames"]
        seers[stage] = Seer(
            teacher.to(device).eval(), params, frames, student.frames_per_block, export.hash
        )
    return seers


def _check_lengths(config: RunConfig, student: Student) -> None:
    size = student.frames_per_block
    for name in ("prefix_frames", "frames"):
        value = getattr(config.evaluate, name)
        lengths = value if isinstance(value, list) else [value]
        if any(length % size for length in lengths):
            raise UserError(
                f"evaluate.{name} must be whole blocks of {size} frames, found {value}; "
                "choose multiples"
            )


def device_of(config: RunConfig) -> torch.device:
    """Where an evaluation computes."""
    wanted = config.trainer.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if wanted else "cpu")


def check_budgets(arena: Arena, jobs: Sequence[Job]) -> None:
    """Raise `UserError` if a budget is too small for a job, before the first one runs."""
    for job in jobs:
        student, contestant = arena.student_for(job), job.contestant
        if contestant.form in NEED_STATISTICS:  # their floor is that of the plain cache
            continue
        try:
            arena.spec(student, job, is_trial=True).check(
                contestant.build(None), student.network.num_layers
            )
        except ValueError as error:
            raise UserError(f"evaluate, policy {contestant.name!r}: {error}") from error
