"""Who competes in an evaluation, and which rollouts that takes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from configs.errors import ConfigError
from configs.load import nearest
from configs.schema import EvaluateConfig
from launch.cache_forms import FORMS
from models.kv_policies import POLICIES, build_policy
from models.kv_policy import CachePolicy

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "random": {"random": {"redraw": True}, "random_once": {"redraw": False}},
    "salience": {"salience": {}, "salience_redundancy": {"redundancy_weight": 1.0}},
}
"""Policies that compete with several parameters: name in the results to parameters."""
FORMED = ("sink_window", "salience")
"""Policies whose cache also competes in every form of `launch.cache_forms`."""

QUALITY_POLICIES = ("full", "sink_window")
"""Caches in the comparison of step counts."""


@dataclass(frozen=True)
class Contestant:
    """A cache policy with everything fixed but budget and age weight.

    Attributes:
        name: In the results.
        policy: Registered name.
        params: Its parameters, the age weight left out.
        head: `trained`, `untrained`, or nothing for a policy that needs none.
        is_scored: Whether it has an age weight, which is then tuned.
        form: Of the cache, a name in `launch.cache_forms.FORMS`; none for the plain one.
        twin: Whose tuned age weight it takes over, so that it differs from it in one thing only.
    """

    name: str
    policy: str
    params: tuple[tuple[str, Any], ...] = ()
    head: str = ""
    is_scored: bool = False
    form: str = ""
    twin: "Contestant | None" = None

    @property
    def weights(self) -> list[float] | None:
        """Weights of later, within, earlier, for a policy that has them."""
        found = dict(self.params).get("weights")
        return None if found is None else list(found)

    def build(self, age_weight: float | None) -> CachePolicy:
        """The policy itself."""
        params = dict(self.params)
        return build_policy(
            self.policy, params if age_weight is None else params | {"age_weight": age_weight}
        )


@dataclass(frozen=True)
class Job:
    """One rollout of all clips, and what is reported of it.

    Attributes:
        section: Where its rows go: `tuning`, or a field of the results.
        stage: Whose student.
        contestant: Which cache.
        budget_tokens: Ignored by policies without a bound.
        frames: Lengths that are reported; the rollout has the longest.
        age_weight: None if there is none, or if it is to be taken from the tuning.
        steps: Denoising steps; None = the student's own.
        clips_per_seed: Clips of each seed.
    """

    section: str
    stage: str
    contestant: Contestant
    budget_tokens: int
    frames: tuple[int, ...]
    age_weight: float | None = None
    steps: int | None = None
    clips_per_seed: int = 0

    @property
    def tuned_by(self) -> tuple[str, str, list[float] | None, int]:
        """What the tuned age weight belongs to."""
        tuned = self.contestant.twin or self.contestant
        return self.stage, tuned.name, tuned.weights, self.budget_tokens

    def identity(self) -> dict[str, Any]:
        """Plain values that tell it from every other job."""
        return asdict(self)


def contestants(settings: EvaluateConfig, *, has_head: bool, has_teacher: bool) -> list[Contestant]:
    """Every registered policy in its variants, the untrained and inverted head, other caches.

    Args:
        settings: Of the evaluation; `policies` and `forms` may narrow it.
        has_head: Whether there is a head to predict salience.
        has_teacher: Whether its teacher is there to tell the true salience.
    """
    found = []
    for policy, cls in POLICIES.items():
        names = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        is_scored = "age_weight" in names
        if (cls.needs_head and not has_head) or (cls.needs_targets and not has_teacher):
            continue
        head = "trained" if cls.needs_head else ""
        for name, params in VARIANTS.get(policy, {policy: {}}).items():
            for weights in _weightings(name, names, settings):
                given = tuple((params | weights).items())
                found.append(Contestant(name, policy, given, head, is_scored))
    if has_head:
        found += _sanity_checks(settings)
    wanted = settings.policies
    return [one for one in found if not wanted or one.name in wanted]


def formed(found: Sequence[Contestant], forms: Sequence[str]) -> list[Contestant]:
    """The caches of some policies in other forms; they take the age weight of the plain one.

    Args:
        found: From `contestants`.
        forms: Names in `launch.cache_forms.FORMS`, or [all].
    """
    plain: dict[str, Contestant] = {}
    for one in found:
        if one.name in FORMED:
            plain.setdefault(one.name, one)
    return [
        replace(one, form=form, twin=one if one.is_scored else None)
        for one in plain.values()
        for form in (FORMS if forms == ["all"] else forms)
    ]


def _weightings(name: str, names: set[str], settings: EvaluateConfig) -> Sequence[dict[str, Any]]:
    """All weightings for the plain salience policy, the first for others that have weights."""
    if "weights" not in names:
        return [{}]
    chosen = settings.weights if name == "salience" else settings.weights[:1]
    return [{"weights": tuple(weights)} for weights in chosen]


def _sanity_checks(settings: EvaluateConfig) -> list[Contestant]:
    first = tuple(settings.weights[0])
    trained = Contestant("salience", "salience", (("weights", first),), "trained", True)
    inverted = (("weights", tuple(-weight for weight in first)),)
    return [
        replace(trained, name="untrained_head", head="untrained", twin=trained),
        replace(trained, name="inverted_head", params=inverted, twin=trained),
    ]


def plan_jobs(
    settings: EvaluateConfig, *, has_head: Mapping[str, bool], has_teacher: Mapping[str, bool]
) -> list[Job]:
    """All jobs in order, the tuning before what depends on it.

    The first stage is tried with every contestant and budget at the shortest length; everything
    else with `settings.contenders` and `settings.long_budgets`.

    Args:
        settings: Of the evaluation.
        has_head: Stages in their order, and whether a head goes with their student.
        has_teacher: The same for the head's teacher.

    Raises:
        ConfigError: If a policy, a form, a contender or a stage is unknown.
    """
    stages = list(has_head)
    everything = replace(settings, policies=[])
    known = dict.fromkeys(c.name for c in contestants(everything, has_head=True, has_teacher=True))
    _check_known("policies", settings.policies, list(known))
    _check_known("forms", settings.forms, ["all", *FORMS])
    _check_formed(settings)
    names = dict.fromkeys(c.name for c in contestants(settings, has_head=True, has_teacher=True))
    _check_known("contenders", settings.contenders, list(names))
    _check_known("long_stages", settings.long_stages, stages)
    jobs: list[Job] = []
    for stage in stages:
        everyone = contestants(settings, has_head=has_head[stage], has_teacher=has_teacher[stage])
        contenders = [c for c in everyone if c.name in (settings.contenders or names)]
        is_first = stage == stages[0]
        jobs += _short_jobs(settings, stage, everyone if is_first else contenders, is_first)
        if is_first:
            others = formed(everyone, settings.forms)
            jobs += _short_jobs(settings, stage, others, is_first, section="forms")
        if stage in (settings.long_stages or stages):
            jobs += _long_jobs(settings, stage, contenders)
        jobs += _other_jobs(settings, stage, contenders, is_first)
    needed = dict.fromkeys(_tuning_of(job) for job in jobs if job.contestant.is_scored)
    tuning = [job for job in needed for job in _tuning_jobs(settings, job)]
    return tuning + jobs


def _check_formed(settings: EvaluateConfig) -> None:
    if settings.forms and settings.policies and not set(FORMED) & set(settings.policies):
        raise ConfigError(
            f"evaluate.forms are those of {list(FORMED)}, found neither in "
            f"evaluate.policies={settings.policies}; add one"
        )


def _check_known(key: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    for name in chosen:
        if name not in known:
            raise ConfigError(
                f"evaluate.{key} must be among {list(known)}, found {name!r}{nearest(name, known)}"
            )


def _short_jobs(
    settings: EvaluateConfig,
    stage: str,
    chosen: Sequence[Contestant],
    is_first: bool,
    *,
    section: str = "policies",
) -> list[Job]:
    budgets = settings.budgets if is_first else settings.long_budgets or settings.budgets
    return [
        Job(section, stage, contestant, budget, (min(settings.frames),),
            clips_per_seed=settings.clips_per_seed)
        for contestant in chosen
        for budget in (budgets if POLICIES[contestant.policy].is_bounded else budgets[-1:])
    ]  # fmt: skip


def _long_jobs(settings: EvaluateConfig, stage: str, contenders: Sequence[Contestant]) -> list[Job]:
    longer = sorted(settings.frames)[1:]
    budgets = settings.long_budgets or settings.budgets
    jobs = []
    for contestant in contenders:
        bounded = POLICIES[contestant.policy].is_bounded
        frames = tuple(f for f in longer if bounded or f <= settings.unbounded_frames)
        if frames:
            jobs += [
                Job("policies", stage, contestant, budget, frames,
                    clips_per_seed=settings.long_clips_per_seed)
                for budget in (budgets if bounded else budgets[-1:])
            ]  # fmt: skip
    return jobs


def _other_jobs(
    settings: EvaluateConfig, stage: str, contenders: Sequence[Contestant], is_first: bool
) -> list[Job]:
    """Sharpness over the number of steps; and rollouts from the caption alone.

    Sharpness is asked of a cache that forgets nothing, where the next frame is all but known, and
    of a window that has forgotten, where it must be invented.
    """
    budget, frames = settings.budgets[-1], (min(settings.frames),)
    clips = dict.fromkeys(settings.quality_steps, settings.clips_per_seed)
    if is_first and clips:
        clips[settings.reference_steps] = settings.long_clips_per_seed
    quality = [
        Job("quality", stage, Contestant(policy, policy), budget, frames,
            steps=steps, clips_per_seed=count)
        for policy in QUALITY_POLICIES
        for steps, count in clips.items()
    ]  # fmt: skip
    free = [
        Job("prefix_free", stage, contestant, budget, frames,
            clips_per_seed=settings.long_clips_per_seed)
        for contestant in contenders
    ]  # fmt: skip
    return quality + free


def _tuning_of(job: Job) -> Job:
    contestant = job.contestant.twin or job.contestant
    return Job("tuning", job.stage, contestant, job.budget_tokens, ())


def _tuning_jobs(settings: EvaluateConfig, job: Job) -> list[Job]:
    return [
        Job("tuning", job.stage, job.contestant, job.budget_tokens, (min(settings.frames),),
            age_weight=age_weight, clips_per_seed=settings.tune_clips)
        for age_weight in settings.age_weights
    ]  # fmt: skip
