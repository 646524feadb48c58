"""Checks of configuration values: single fields, pairs, and sections against each other."""

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from configs.errors import ConfigError

if TYPE_CHECKING:
    from configs.schema import RunConfig, StageConfig

RESERVED_NAMES = ("data", "evaluate", "report", "superseded", "wandb")
"""Folders of a run that no stage may be called."""

PLACEHOLDER = "SET_ME/"
"""How a path begins that only a user can know."""

SECTION_KEYS = {
    "stage": "stages.*",
    "optim": "stages.*.optimizers.*",
    "lora": "stages.*.lora",
    "world": "source.world",
}
"""Where a section stands in the config, unless under its own name."""


def require(condition: bool, message: str) -> None:
    """Raise `ConfigError` with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)


def require_choice(key: str, value: str, choices: Iterable[str]) -> None:
    """Raise `ConfigError` unless `value` is one of `choices`."""
    choices = list(choices)
    require(value in choices, f"{key} must be one of {choices}, found {value!r}")


def require_positive(section: object, *names: str) -> None:
    """Raise `ConfigError` unless every field of `section` in `names` is above zero."""
    for name in names:
        value = getattr(section, name)
        kind = type(section).__name__.removesuffix("Config").lower()
        key = f"{SECTION_KEYS.get(kind, kind)}.{name}"
        require(value > 0, f"{key} must be above 0, found {value}; set a larger value")


def require_unset(key: str, section: Any, **defaults: object) -> None:
    """Raise `ConfigError` if a field that the `name` of `section` ignores is not its default."""
    for name, default in defaults.items():
        value = getattr(section, name)
        require(
            value == default,
            f"{key}.{name} must be {default!r} with {key}.name={section.name}, which has no use "
            f"for it, found {value!r}; leave it out or change {key}.name",
        )


def check_run(config: "RunConfig") -> None:
    """Raise `ConfigError` if two sections of a run contradict each other."""
    require(
        re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name) is not None,
        f"name must be a folder name of letters, digits, '.', '_' and '-', found {config.name!r}",
    )
    _check_sizes(config)
    earlier: list[str] = []
    for name, stage in config.stages.items():
        _check_stage(name, stage, earlier, config)
        earlier.append(name)
    evaluate = config.evaluate
    for name in evaluate.stages:
        require_choice("evaluate.stages", name, config.stages)
    if evaluate.stages:
        require(
            config.codec.time_stride == 1,
            "evaluate.stages must be empty unless codec.time_stride=1, found "
            f"codec.time_stride={config.codec.time_stride}: the truth of the built-in world holds "
            "for single frames",
        )
        require(
            config.source.every == 1,
            "evaluate.stages must be empty unless source.every=1, found source.every="
            f"{config.source.every}: held-out clips have every frame of the world",
        )
        recent = max(evaluate.recent_frames, config.model.frames_per_block)
        for name in ("budgets", "long_budgets"):
            budgets = getattr(evaluate, name)
            require_budgets(f"evaluate.{name}", budgets, evaluate.sink_frames, recent, config)


def require_budgets(
    key: str, budgets: Iterable[int], sink: int, recent: int, config: "RunConfig"
) -> None:
    """Raise `ConfigError` unless every budget holds `sink` + `recent` frames of the run."""
    needed = (sink + recent) * config.frame_seq_len
    for budget in budgets:
        require(
            budget >= needed,
            f"{key} must hold sink and recent frames, {needed} tokens ({sink} + {recent} frames of "
            f"{config.frame_seq_len}), found {budget}; raise it or protect fewer frames",
        )


def require_paths(config: "RunConfig", *used: str) -> None:
    """Raise `ConfigError` if a path that is used is still the placeholder of a shipped config."""
    for name, path in config.paths.items():
        require(
            not path.startswith(PLACEHOLDER) or not any(value.startswith(path) for value in used),
            f"paths.{name} must be a path of yours, found the placeholder {path!r}; set it in a "
            f"YAML file or give paths.{name}=PATH",
        )


def require_blocks(key: str, lengths: Iterable[int], block: int, *, least: int = 1) -> None:
    """Raise `ConfigError` unless every length in frames is `least` or more whole blocks."""
    for length in lengths:
        require(
            length % block == 0 and length >= least * block,
            f"{key} must be whole blocks of {block} frames, at least {least * block}, "
            f"found {length}",
        )


def require_above_zero(key: str, value: float) -> None:
    """Raise `ConfigError` unless value > 0."""
    require(value > 0, f"{key} must be above 0, found {value}")


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise `ConfigError` unless low <= value <= high."""
    require(low <= value <= high, f"{key} must lie in {low} .. {high}, found {value}")


def _check_sizes(config: "RunConfig") -> None:
    channels, text_dim = config.model.in_channels, config.model.text_dim
    require(
        channels == config.codec.channels,
        f"model.in_channels must be codec.channels={config.codec.channels}, found {channels}",
    )
    require(
        text_dim == config.text.dim,
        f"model.text_dim must be text.dim={config.text.dim}, found {text_dim}",
    )
    config.codec.latent_frames(config.source.frames)
    for pixels, patch in zip(config.source.size, config.model.patch_size[1:], strict=True):
        require(
            pixels % (config.codec.stride * patch) == 0,
            f"source.size={config.source.size} must be multiples of codec.stride x "
            f"model.patch_size = {config.codec.stride * patch} pixels, found {pixels}",
        )


def _check_stage(name: str, stage: "StageConfig", earlier: list[str], config: "RunConfig") -> None:
    key = f"stages.{name}"
    require(
        re.fullmatch(r"[a-z][a-z0-9_]*", name) is not None and name not in RESERVED_NAMES,
        f"{key}: a stage name must be a word of lower-case letters, digits and '_', and none of "
        f"{list(RESERVED_NAMES)}, which are folders of the run; rename it",
    )
    clip = config.codec.latent_frames(config.source.frames)
    require(
        stage.frames <= clip,
        f"{key}.frames must not be above the {clip} latent frames of a clip of "
        f"source.frames={config.source.frames}, found {stage.frames}; cut longer clips or train on "
        "shorter ones",
    )
    for role, origin in stage.inputs.items():
        require(
            origin in earlier or "/" in origin,
            f"{key}.inputs.{role} must be an earlier stage of the plan, one of {earlier}, or the "
            f"path of an export (with a '/'), found {origin!r}",
        )
