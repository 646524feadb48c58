"""Which sizes the networks of a stage have, from the exports that it starts from.

An export that is not there yet counts as the run's own model, or as a model that is named for it.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from configs.errors import UserError
from configs.load import load_config, to_dict
from configs.schema import ModelConfig, RunConfig
from launch.export import MANIFEST, Export
from launch.forecast_sizes import network_sizes
from launch.inputs import model_of, open_input, require_geometry
from train.kinds import stage_kind
from train.shares import FLOAT

Like = Mapping[str, ModelConfig]
"""Models that exports are to be counted as which are not there, by their path."""


def read_like(words: Sequence[str], config: RunConfig) -> dict[str, ModelConfig]:
    """Models by path, from words PATH=FILE, where FILE is a config.

    Args:
        words: From the command line.
        config: Of the run.

    Raises:
        UserError: If a word is of another form, a config cannot be read, or there is no such input
            that is missing.
    """
    missing = {path for name in config.stages for path in missing_inputs(config, name, {}).values()}
    found = {}
    for word in words:
        path, equals, file = word.partition("=")
        if not (path and equals and file):
            raise UserError(
                f"--like must be PATH=FILE, an input and a config of its size, found {word!r}"
            )
        if path not in missing:
            raise UserError(
                f"--like {word} must name an input that is not there, found {sorted(missing)} as "
                "such; name one of them as the config does, or leave it out"
            )
        found[path] = load_config([file]).model
    return found


def stage_models(config: RunConfig, name: str, like: Like) -> dict[str, ModelConfig]:
    """Geometry of every network of a stage by its name; of a head, that of the student it is for.

    Args:
        config: Of the run.
        name: Of the stage.
        like: Of exports that are not there.

    Raises:
        UserError: If an export is there and cannot work in this run.
    """
    kind = stage_kind(config.stages[name].kind)
    wanted = {**kind.network_sources, **kind.frozen_sources}
    return {
        network: config.model if network == "head" else _model(config, name, network, sources, like)
        for network, sources in wanted.items()
    }


def missing_inputs(config: RunConfig, name: str, like: Like) -> dict[str, str]:
    """Paths that are not there and are no one's size, by role."""
    return {
        role: origin
        for role, origin in config.stages[name].inputs.items()
        if origin not in config.stages and origin not in like and not _is_there(origin)
    }


def mapped_bytes(config: RunConfig, name: str, like: Like) -> int:
    """Bytes of all files of the inputs of a stage; of exports that are there, of their tensors.

    Others are taken to be in float32, as stages export.
    """
    inputs = config.stages[name].inputs
    roles = {origin: role for role, origin in inputs.items()}  # each export once
    return sum(_export_bytes(config, name, role, like) for role in roles.values())


def exported_bytes(config: RunConfig, name: str, like: Like) -> int:
    """Bytes of all tensors in the export of a stage: its networks, and its adapters besides."""
    stage, models = config.stages[name], stage_models(config, name, like)
    total = 0
    for stem, network in stage_kind(stage.kind).exported.items():
        lora = stage.lora if stage.lora and network in stage.lora.networks else None
        total += sum(network_sizes(with_model(config, models[network]), stem, lora).whole)
    return FLOAT * total


def with_model(config: RunConfig, model: ModelConfig) -> RunConfig:
    """The config of a run whose networks have another geometry, with its own blocks."""
    block = config.model.frames_per_block
    return replace(config, model=replace(model, frames_per_block=block))


def _model(
    config: RunConfig,
    name: str,
    network: str,
    sources: tuple[tuple[str, str], ...],
    like: Like,
) -> ModelConfig:
    """As `launch.build` builds it: from the first source that holds it, else from the first."""
    inputs = config.stages[name].inputs
    given = [(role, stem) for role, stem in sources if role in inputs]
    if not given:
        return config.model
    stems = {role: _stems(config, name, role) for role, _ in given}
    role, stem = next((pair for pair in given if pair[1] in stems[pair[0]]), given[0])
    origin = inputs[role]
    if origin in config.stages:
        there = stage_kind(config.stages[origin].kind).exported
        return stage_models(config, origin, like)[there[stem]] if stem in there else config.model
    export = _opened(config, name, role)
    if export is None:
        model = like.get(origin, config.model)
        require_geometry(config, name, role, to_dict(model), where=origin)
        return model
    return ModelConfig(**model_of(network, export.manifest["config"]))


def _stems(config: RunConfig, name: str, role: str) -> set[str]:
    """Files of networks in the export behind a role."""
    origin = config.stages[name].inputs[role]
    if origin in config.stages:
        return {*stage_kind(config.stages[origin].kind).exported}
    export = _opened(config, name, role)
    return {"transformer"} if export is None else {*export.manifest["files"]}


def _opened(config: RunConfig, name: str, role: str) -> Export | None:
    """The export behind a role that names a path, if it is there."""
    is_there = _is_there(config.stages[name].inputs[role])
    return open_input(config, name, role) if is_there else None


def _is_there(origin: str) -> bool:
    """Whether there is an export, and not only the folder of a stage that will leave one.

    Anything else that lies at the path counts as there, so that it is refused.
    """
    path = Path(origin)
    is_export = any((folder / MANIFEST).is_file() for folder in (path, path / "export"))
    return is_export or (path.exists() and not (path / "checkpoints").is_dir())


def _export_bytes(config: RunConfig, name: str, role: str, like: Like) -> int:
    origin = config.stages[name].inputs[role]
    if origin in config.stages:
        return exported_bytes(config, origin, like)
    export = _opened(config, name, role)
    if export is None:
        model = with_model(config, like.get(origin, config.model))
        return FLOAT * sum(network_sizes(model, "transformer").whole)
    return _tensor_bytes(export)


def _tensor_bytes(export: Export) -> int:
    tensors = (t for file in export.manifest["files"].values() for t in file["tensors"].values())
    return sum(getattr(torch, dtype).itemsize * math.prod(shape) for dtype, shape in tensors)
