"""What an export is made from: the export of a stage, or one of its checkpoints."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.load import load_config, to_dict
from configs.schema import RunConfig
from launch.adapters import (
    Adapters,
    adapters_of_checkpoint,
    adapters_of_export,
    is_adapted,
    trained_factors,
)
from launch.build import export_manifest, new_stage
from launch.export import (
    MANIFEST,
    Export,
    ExportError,
    find_export,
    load_export,
    read_manifest,
)
from launch.formats import EMA, RAW
from train.checkpoint import MARKER, newest_whole, read_marker, sha256
from train.consolidate import consolidate, trained_networks
from train.fit import CHECKPOINTS, identity
from train.lora import merge_into
from train.restore import differences
from train.stage import Stage

SETS = (RAW, EMA)
CONFIG = "config.yaml"

Read = Callable[[str, torch.dtype | None], dict[str, Tensor]]
ReadAdapters = Callable[[str], Adapters]


@dataclass(frozen=True)
class Origin:
    """A transformer, its head if it has one, and what is known of them.

    Attributes:
        manifest: Role, stage, sampler, parents, config, as in the manifest of an export.
        sets: Which of `SETS` there are, the one to prefer first.
        read: From one of them, and a dtype or None for the present one, to native tensors.
        head: Tensors of the salience head.
        record: Where it came from, for the new manifest.
        run: Resolved config of the run, if it is at hand.
        read_adapters: From one of `sets` to the adapters of student and critic, alpha / rank folded
            in; None if the student was trained as a whole.
    """

    manifest: dict[str, Any]
    sets: tuple[str, ...]
    read: Read
    head: dict[str, Tensor] | None
    record: dict[str, Any]
    run: dict[str, Any] | None
    read_adapters: ReadAdapters | None = None


def open_origin(path: Path, *, weights: str | None = None) -> Origin:
    """What `path` means.

    Args:
        path: A stage folder (its export; its newest whole checkpoint if there is none, or none with
            the weights that are wanted), an export, or a checkpoint.
        weights: One of `SETS`; None = the moving average if there is one.

    Raises:
        UserError: If there is none, it is damaged, or lacks the weights that are wanted.
    """
    if path.name.startswith("step-") and not (path / MANIFEST).exists():
        if not path.exists():
            find_export(path)  # says so, and what is near
        return _of_checkpoint(path, weights)
    newest = newest_whole(path / CHECKPOINTS)
    if newest is None:
        _refuse_run_folder(path)
        return _of_export(find_export(path), weights)
    export = path / "export"
    if not (export / MANIFEST).is_file():
        return _of_checkpoint(newest, weights)
    if weights is None or read_manifest(export).get("weights") == weights:
        return _of_export(export, weights)
    return _of_checkpoint(newest, weights)


def _refuse_run_folder(path: Path) -> None:
    stages = sorted(
        folder.name
        for folder in (path.iterdir() if path.is_dir() else ())
        if (folder / "export" / MANIFEST).is_file() or (folder / CHECKPOINTS).is_dir()
    )
    if stages and not (path / MANIFEST).is_file():
        raise ExportError(
            f"{str(path)!r} must be one stage, found a run with the stages {stages}; give one of "
            f"them, such as {str(path / stages[-1])!r}"
        )


def _of_export(folder: Path, weights: str | None) -> Origin:
    export = load_export(folder)
    found = export.manifest.get("weights")
    if weights is not None and weights != found:
        raise ExportError(
            f"--weights {weights} must be in {str(folder)!r}, found "
            f"{f'only the {found} weights' if found else 'no word on which of both it holds'}; "
            "leave the option out, or give a checkpoint of the stage"
        )
    config, adapters = folder.parent / CONFIG, adapters_of_export(export)
    added = ("format", "versions", "files")
    return Origin(
        manifest={key: value for key, value in export.manifest.items() if key not in added},
        sets=(found or RAW,),
        read=partial(_read_given, export.tensors("transformer")),
        head=export.weights.get("head"),
        record={
            "kind": "export",
            "hash": export.hash,
            "made_by": export.manifest["versions"],
            "imported_from": export.manifest.get("source"),
        },
        run=to_dict(load_config([str(config)])) if config.is_file() else None,
        read_adapters=None if adapters is None else lambda _: adapters,
    )


def _of_checkpoint(folder: Path, weights: str | None) -> Origin:
    described = read_marker(folder)
    config = _config_of(folder, described)
    stage = _unfilled_stage(config, described)
    networks = trained_networks(folder)
    inputs = _inputs(config, described, folder)
    manifest = export_manifest(config, stage, described["identity"]["name"], inputs)
    manifest |= {"parents": described["identity"]["inputs"]}
    name = stage.exported["transformer"]
    sets, read = _read_network(stage, name, folder, networks, inputs)
    if weights is not None and weights not in sets:
        raise ExportError(
            f"--weights {weights} must be in {str(folder)!r}, found only the {sets[0]} weights of "
            f"{name!r}; leave the option out (a moving average is kept where optimizers.{name}.ema "
            "is above 0)"
        )
    head = _read_head(stage, folder, networks, inputs, manifest, is_raw=weights == RAW)
    return Origin(
        manifest=manifest,
        sets=sets if weights is None else (weights,),
        read=read,
        head=head,
        record={
            "kind": "checkpoint",
            "name": folder.name,
            "hash": sha256(folder / MARKER),
            "ranks": described["world_size"],
            "made_by": described["versions"],
        },
        run=to_dict(config),
        read_adapters=(
            partial(_read_adapters, folder, stage, networks) if is_adapted(stage, name) else None
        ),
    )


def _read_network(
    stage: Stage,
    name: str,
    folder: Path,
    networks: Mapping[str, bool],
    inputs: Mapping[str, Export],
) -> tuple[tuple[str, ...], Read]:
    """Which weights there are of a network of the stage, and how they are read."""
    if name not in networks:
        export, stem = _untrained(stage, name, inputs, folder)
        return (export.manifest.get("weights") or RAW,), partial(_read_given, export.tensors(stem))
    sets = (EMA, RAW) if networks[name] else (RAW,)
    if is_adapted(stage, name):
        export, stem = _untrained(stage, name, inputs, folder)
        return sets, partial(_read_merged, folder, stage, name, export.tensors(stem))
    like = dict(stage.networks[name].state_dict())
    return sets, partial(_read_trained, folder, name, like)


def _read_merged(
    folder: Path,
    stage: Stage,
    name: str,
    base: Mapping[str, Tensor],
    kind: str,
    dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    assert stage.config.lora is not None
    weights = _read_given(base, kind, torch.float32)
    factors = trained_factors(folder, stage, name, ema=kind == EMA)
    merge_into(weights, factors, scale=stage.config.lora.scale)
    return _read_given(weights, kind, dtype)


def _read_adapters(folder: Path, stage: Stage, networks: Mapping[str, bool], kind: str) -> Adapters:
    averaged = {name for name, has_average in networks.items() if has_average and kind == EMA}
    return adapters_of_checkpoint(folder, stage, averaged=averaged)


def _config_of(folder: Path, described: Mapping[str, Any]) -> RunConfig:
    """The config of the run that wrote a checkpoint, from the folder of its stage."""
    file = folder.resolve().parents[1] / CONFIG
    if not file.is_file():
        raise ExportError(
            f"checkpoint {str(folder)!r} must lie in STAGE/{CHECKPOINTS} beside the config of its "
            f"run, found no {str(file)!r}; copy it there"
        )
    config, saved = load_config([str(file)]), described["identity"]
    if saved["name"] not in config.stages:
        raise ExportError(
            f"{str(file)!r} must be the config of the run that wrote {folder.name}, found no stage "
            f"{saved['name']!r} in it; copy the right one there"
        )
    own = json.loads(json.dumps(identity(config, saved["name"], seed=saved["seed"])))
    # What weights and manifest follow from; other sections may have got keys since then.
    deciding = ("stage", "model", "head")
    wrong = differences({key: saved[key] for key in deciding}, {key: own[key] for key in deciding})
    if wrong:
        raise ExportError(
            f"{str(file)!r} must be the config of the run that wrote {folder.name}, found other "
            f"values: {'; '.join(wrong)}; copy the right one there"
        )
    return config


def _unfilled_stage(config: RunConfig, described: Mapping[str, Any]) -> Stage:
    """The stage with its trained networks on the meta device, which holds shapes and no values."""
    config.trainer.compile = False
    with torch.device("meta"):
        stage = new_stage(config, described["identity"]["name"], {}, frozen=(), is_fresh=True)
    stage.completed = described["step"]
    return stage


def _inputs(config: RunConfig, described: Mapping[str, Any], folder: Path) -> dict[str, Export]:
    """The exports the stage started from, as far as they are still there; without their weights."""
    root, found = folder.resolve().parents[2], {}
    stage = config.stages[described["identity"]["name"]]
    for role, origin in stage.inputs.items():
        place = Path(origin) if "/" in origin else root / origin
        candidates = [path for path in (place / "export", place) if (path / MANIFEST).is_file()]
        if candidates:
            export = Export(candidates[0], read_manifest(candidates[0]), {})
            if export.hash == described["identity"]["inputs"].get(role):
                found[role] = export
    return found


def _untrained(
    stage: Stage, name: str, inputs: Mapping[str, Export], folder: Path
) -> tuple[Export, str]:
    """Export and file stem of what a stage reads and does not train: no checkpoint holds that."""
    sources = {**stage.network_sources, **stage.frozen_sources}[name]
    role, stem = next(source for source in sources if source[0] in stage.config.inputs)
    if role not in inputs:
        raise ExportError(
            f"{str(folder)!r} holds only what this stage trains; {name!r} is, or begins with, the "
            f"{stem} of its input {role!r}, {stage.config.inputs[role]!r}, which is not there as "
            "it was; bring it back, or give the export of the finished stage"
        )
    return load_export(inputs[role].folder), stem


def _read_trained(
    folder: Path, name: str, like: dict[str, Tensor], kind: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return consolidate(folder, name, like, ema=kind == EMA, dtype=dtype or torch.float32)


def _read_head(
    stage: Stage,
    folder: Path,
    networks: Mapping[str, bool],
    inputs: Mapping[str, Export],
    manifest: dict[str, Any],
    *,
    is_raw: bool,
) -> dict[str, Tensor] | None:
    """The salience head, trained here or by an earlier stage; its settings enter the manifest."""
    name = stage.exported.get("head")
    if name is None:
        return None
    if name in networks:
        like = dict(stage.networks[name].state_dict())
        return consolidate(folder, name, like, ema=networks[name] and not is_raw)
    export, stem = _untrained(stage, name, inputs, folder)
    kept = ("head", "head_log", "head_block_len", "grid")
    manifest["config"] |= {key: export.manifest["config"][key] for key in kept}
    return export.tensors(stem)


def _read_given(
    tensors: Mapping[str, Tensor], _: str, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    return {name: tensor if dtype is None else tensor.to(dtype) for name, tensor in tensors.items()}
