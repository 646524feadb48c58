"""What a video is sampled with: what is given, else what the student was trained with."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from configs.errors import UserError
from configs.load import to_dict
from launch.export import MANIFEST, Export
from launch.student import PRECISIONS, Student
from models.flow import shift_of
from models.kv_policies import build_policy
from models.kv_policy import CachePolicy
from models.rollout import Sampler

GIVEN, OWN, DEFAULT = "given", "from the checkpoint", "by default"
SHIFT = 5.0
"""Of the noise levels, if the student's own have none."""
_DEFAULTS = {"sink_frames": 1, "recent_frames": 2, "time": "relative"}
_GEOMETRY = ("budget_tokens", *_DEFAULTS, "max_lag")


@dataclass
class SampleSettings:
    """Values by name, and where each comes from.

    Attributes:
        policy: Of the cache.
        sampler: Noise levels and rule.
        values: `policy` and its parameters, fields of `models.kv_spec.CacheSpec`, `sigmas`,
            `renoise` and `precision`, see `launch.student.PRECISIONS`.
        sources: Each one `GIVEN`, `OWN` or `DEFAULT`.
        has_policy: Whether the export says under which policy its student was trained.
    """

    policy: CachePolicy
    sampler: Sampler
    has_policy: bool
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)

    def put(self, name: str, value: Any, source: str) -> None:
        """Set a value."""
        self.values[name], self.sources[name] = value, source

    def choose(self, name: str, *, given: Any, own: Any, default: Any) -> None:
        """Set the first value of the three that is not None."""
        for value, source in ((given, GIVEN), (own, OWN)):
            if value is not None:
                return self.put(name, value, source)
        return self.put(name, default, DEFAULT)

    @property
    def geometry(self) -> dict[str, Any]:
        """Fields of `CacheSpec`."""
        return {name: self.values[name] for name in _GEOMETRY}

    def lines(self) -> list[str]:
        """What is used, a line for each place that it comes from."""
        reasons = {source: source for source in (GIVEN, OWN, DEFAULT)}
        if not self.has_policy:
            reasons[DEFAULT] += ", as the checkpoint names no cache policy"
        found = {
            source: [f"{name} {_shown(self.values[name])}" for name in names]
            for source in reasons
            if (names := [name for name in self.values if self.sources[name] == source])
        }
        return [f"{reasons[source]}: {', '.join(parts)}" for source, parts in found.items()]

    def record(self) -> dict[str, dict[str, Any]]:
        """The same as JSON."""
        return {
            name: {"value": value, "source": self.sources[name]}
            for name, value in self.values.items()
        }


def choose_settings(arguments: argparse.Namespace, student: Student) -> SampleSettings:
    """What the flags of `launch.sample` and the export of a student come to.

    A policy other than the student's own has its own default parameters; sizes of the cache stay
    those of training.

    Raises:
        UserError: If a flag cannot be meant, nobody names the budget, or the export holds a policy
            that cannot be followed.
    """
    own = _own_policy(student.export)
    name = arguments.policy or own.get("name", "salience")
    given = _parse_params(arguments.param)
    params = own.get("params", {}) if name == own.get("name") else {}
    try:
        policy = build_policy(name, params | given)
        sampler, source = _sampler(arguments, student)
    except ValueError as error:
        raise UserError(str(error)) from error
    settings = SampleSettings(policy, sampler, has_policy="name" in own)
    settings.choose("policy", given=arguments.policy, own=own.get("name"), default=name)
    for key, value in to_dict(vars(policy)).items():
        settings.put(key, value, GIVEN if key in given else OWN if key in params else DEFAULT)
    defaults = _DEFAULTS | {"max_lag": student.export.manifest["config"]["frames"] - 1}
    for key in _GEOMETRY:
        flag = "budget" if key == "budget_tokens" else key
        value = getattr(arguments, flag)
        settings.choose(key, given=value, own=own.get(key), default=defaults.get(key))
    if settings.values["budget_tokens"] is None:
        raise UserError(
            "--budget must be given, in tokens per layer: the checkpoint names no cache policy "
            f"with a budget; a frame has {student.frame_seq_len} tokens"
        )
    settings.put("sigmas", sampler.sigmas, source)
    settings.put("renoise", sampler.renoise, OWN)
    precision = arguments.precision
    settings.choose("precision", given=precision, own=student.precision, default=PRECISIONS[0])
    return settings


def _shown(value: Any) -> str:
    """A value as a user reads it."""
    if isinstance(value, list):
        return f"[{', '.join(map(_shown, value))}]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _own_policy(export: Export) -> dict[str, Any]:
    """The policy that a student was trained under, empty if none; what means something of it.

    Raises:
        UserError: If it has a field that sampling does not know.
    """
    policy: Mapping[str, Any] = export.manifest.get("policy") or {}
    known = ("name", "params", *_GEOMETRY)
    unknown = sorted(set(policy) - set(known))
    if unknown:
        raise UserError(
            f"the cache policy in {str(export.folder / MANIFEST)!r} must have no fields but "
            f"{list(known)}, found {unknown}; sample with the pafukv that wrote it"
        )
    if "budget_tokens" not in policy:
        return {}  # what an export for other programs says of a head that nothing was trained with
    # With absolute time no lag is limited: the number has had no part in training.
    ignored = ("max_lag",) if policy.get("time") == "absolute" else ()
    return {key: value for key, value in policy.items() if key not in ignored}


def _parse_params(items: Sequence[str]) -> dict[str, Any]:
    """Parameters of the policy, as KEY=VALUE."""
    params: dict[str, Any] = {}
    for item in items:
        if "=" not in item:
            raise UserError(f"--param must be KEY=VALUE, got {item!r}")
        try:
            params.update(to_dict(OmegaConf.from_dotlist([item])))
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"--param must be KEY=VALUE with a YAML value, got {item!r}") from error
    return params


def _sampler(arguments: argparse.Namespace, student: Student) -> tuple[Sampler, str]:
    """The student's own noise levels, or others; the shift stays its own if it has one."""
    own = student.sampler
    if arguments.steps is None and arguments.shift is None:
        return own, OWN
    steps = own.num_steps if arguments.steps is None else arguments.steps
    known = (arguments.shift, shift_of(own.sigmas), SHIFT)
    shift = next(value for value in known if value is not None)
    if shift <= 0:
        raise UserError(f"--shift must be above 0, got {shift}")
    return student.with_steps(steps, shift=shift), GIVEN
