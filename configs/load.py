"""From YAML files and KEY=VALUE overrides to checked dataclasses, and back to a file and a hash."""

import dataclasses
import difflib
import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, MissingMandatoryValue, OmegaConfBaseException

from configs.errors import ConfigError
from configs.schema import RunConfig

Section = TypeVar("Section")


def is_override(argument: str) -> bool:
    """Whether a word of the command line is KEY=VALUE, and not a path with a `=` in it."""
    return re.match(r"[\w.-]+=", argument) is not None and not Path(argument).exists()


def load_config(arguments: Sequence[str]) -> RunConfig:
    """The run described by YAML files (merged left to right) and KEY=VALUE overrides.

    Args:
        arguments: Paths of YAML files, and overrides such as `stages.teacher.steps=100`.

    Raises:
        ConfigError: If a file is missing or is not a mapping, a key is unknown or unset, a value
            has the wrong type, or merged values contradict each other. Names the full key.
    """
    files = [argument for argument in arguments if not is_override(argument)]
    overrides = [argument for argument in arguments if is_override(argument)]
    merged: DictConfig = OmegaConf.structured(RunConfig)
    for file in files:
        merged = _merge(merged, _load_file(Path(file)), source=file)
    for override in overrides:
        merged = _merge(merged, _load_override(override), source=override)
    return _to_object(merged, source=" ".join(files) or "the command line")


def parse_section(schema: type[Section], values: Mapping[str, Any], *, key: str) -> Section:
    """The dataclass `schema` filled from a free mapping, such as `StageConfig.params`.

    Args:
        schema: A dataclass whose fields are the permitted keys.
        values: What the config holds under `key`; nested mappings for nested dataclasses.
        key: Full key of `values`, for messages.

    Raises:
        ConfigError: As in `load_config`.
    """
    structured: DictConfig = OmegaConf.structured(schema)
    return _to_object(_merge(structured, OmegaConf.create(dict(values)), source=key), source=key)


def to_dict(config: Any) -> Any:
    """Plain dictionaries, lists and scalars of a dataclass, a mapping or a sequence."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return dataclasses.asdict(config)
    if isinstance(config, Mapping):
        return {str(key): to_dict(value) for key, value in config.items()}
    if isinstance(config, (list, tuple)):
        return [to_dict(value) for value in config]
    return config


def config_hash(config: Any) -> str:
    """SHA-256, in hexadecimal, of the canonical JSON of a dataclass, mapping, list or scalar."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def save_config(config: Any, path: Path) -> None:
    """Write a resolved config as YAML that `load_config` reads back; the file appears whole."""
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w") as file:
        yaml.safe_dump(to_dict(config), file, sort_keys=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def nearest(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the candidate closest to `word`, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _load_file(path: Path) -> DictConfig:
    try:
        loaded = OmegaConf.load(path)
    except FileNotFoundError:
        beside = [str(file) for file in path.parent.glob("*.yaml")]
        hint = nearest(str(path), beside) or "; check the path"
        raise ConfigError(
            f"config file {str(path)!r} must exist, found no such file{hint}"
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config file {str(path)!r} must be readable YAML: {reason}") from error
    if isinstance(loaded, ListConfig):
        raise ConfigError(f"config file {str(path)!r} must hold keys and values, found a list")
    return loaded


def _load_override(override: str) -> DictConfig:
    try:
        return OmegaConf.from_dotlist([override])
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"override {override!r} must be KEY=VALUE: {reason}") from error


def _merge(merged: DictConfig, addition: DictConfig, *, source: str) -> DictConfig:
    try:
        combined = OmegaConf.merge(merged, addition)
    except ConfigKeyError as error:
        key = str(error.full_key)
        hint = nearest(key.rpartition(".")[2], _sibling_keys(merged, key)) or "; remove it"
        raise ConfigError(f"{source}: {key!r} is not a key of the configuration{hint}") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None
    assert isinstance(combined, DictConfig)
    return combined


def _to_object(merged: DictConfig, *, source: str) -> Any:
    try:
        return OmegaConf.to_object(merged)
    except MissingMandatoryValue as error:
        raise ConfigError(
            f"{source}: {error.full_key!r} must be set, found no value; add it to a YAML file or "
            f"give {error.full_key}=VALUE"
        ) from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_first_line(error)}") from None


def _first_line(error: OmegaConfBaseException) -> str:
    reason = str(error).splitlines()[0]
    return f"{error.full_key!r} has a wrong value: {reason}" if error.full_key else reason


def _sibling_keys(merged: DictConfig, key: str) -> list[str]:
    """The permitted keys at the place where the unknown `key` stands."""
    schema: Any = OmegaConf.get_type(merged)
    for part in key.split(".")[:-1]:
        if dataclasses.is_dataclass(schema):
            hint = get_type_hints(schema).get(part)
            schema = get_args(hint)[0] if isinstance(hint, UnionType) else hint  # X of X | None
        else:  # dict[str, X]: any name is permitted, X is the type below it
            schema = get_args(schema)[-1] if get_args(schema) else None
    return [f.name for f in dataclasses.fields(schema)] if dataclasses.is_dataclass(schema) else []
