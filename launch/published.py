"""What this project exported, read back: between its stages, or for other programs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any

from torch import Tensor

from configs.errors import UserError
from configs.load import config_hash
from launch.export import load_export
from launch.formats import read_checkpoint
from launch.weight_checks import network_geometry, require_tensors
from launch.weight_files import digests, read_json, read_safetensors
from models.wan_config import Geometry

PUBLISHED, HEAD = "pafukv.json", "salience_head.safetensors"
"""What `python -m launch export` writes beside a transformer."""
VERSION = 1
"""Of `PUBLISHED`."""
_KEPT = ("role", "stage", "kind", "train_seed", "steps", "sampler", "config", "weights", "policy")

_CONTENT: dict[tuple[str, ...], type | tuple[type, ...]] = {
    ("role",): str,
    ("stage",): str,
    ("config",): dict,
    ("config", "model"): dict,
    ("config", "model", "num_heads"): int,
    ("config", "model", "frames_per_block"): int,
    ("sampler",): (dict, NoneType),
    ("sampler", "sigmas"): list,
    ("sampler", "renoise"): bool,
    ("files",): dict,
}
"""Entries of `PUBLISHED` that are used here or by whoever loads the import, and what they are."""

Weights = dict[str, dict[str, Tensor]]
"""File stem of an export to named tensors."""


def read_export(path: Path) -> tuple[Weights, dict[str, Any]]:
    """An export of a stage, or one that was imported: the same again."""
    export = load_export(path)
    kept = {key: value for key, value in export.manifest.items() if key in (*_KEPT, "lora")}
    return export.weights, kept | {
        "parents": {"source": export.hash},
        "source": {"form": "export"},
    }


def read_published(folder: Path, *, weights: str | None) -> tuple[Weights, dict[str, Any]]:
    """What our `export` wrote for other programs, with its head, sampler and role.

    Raises:
        UserError: If a file is missing or was changed, or `PUBLISHED` is not what `export` writes.
    """
    described = read_json(folder / PUBLISHED)
    _require_content(folder / PUBLISHED, described)
    _require_files(folder, described)
    checkpoint = read_checkpoint(folder, weights=weights)
    model = described["config"]["model"]
    geometry = network_geometry(checkpoint, num_heads=model["num_heads"])
    require_tensors(checkpoint, geometry)
    require_model(geometry, model, where=f"`model` in {str(folder / PUBLISHED)!r}")
    found: Weights = {"transformer": checkpoint.tensors}
    if (folder / HEAD).is_file():
        found["head"] = read_safetensors(folder / HEAD)
    kept = {key: described[key] for key in _KEPT if key in described}
    return found, kept | {
        "weights": checkpoint.chosen or described.get("weights"),
        "parents": {"source": config_hash(described)},
        "source": {"form": checkpoint.form},
    }


def _require_content(path: Path, described: Mapping[str, Any]) -> None:
    """Raise `UserError` unless `PUBLISHED` is of our version and has the entries that are used."""
    version = described.get("version")
    if isinstance(version, bool) or version != VERSION:
        raise UserError(
            f"{str(path)!r} must be of version {VERSION}, found {version!r}; export it again, or "
            "import it with the pafukv that wrote it"
        )
    wrong = [".".join(keys) for keys, kind in _CONTENT.items() if _is_odd(described, keys, kind)]
    if described.get("role") not in ("teacher", "student"):
        wrong.append("role")
    entries = described.get("files")
    if isinstance(entries, dict):
        named = [isinstance(own, dict) and "sha256" in own for own in entries.values()]
        wrong += [] if named and all(named) else ["files"]
    if wrong:
        raise UserError(
            f"{str(path)!r} must be what `export` writes, found missing or odd entries: "
            f"{', '.join(dict.fromkeys(wrong))}; export it again"
        )


def _is_odd(
    described: Mapping[str, Any], keys: tuple[str, ...], kind: type | tuple[type, ...]
) -> bool:
    """Whether an entry is not of this kind, or a whole number not above 0, where it can be."""
    *above, last = keys
    holder: Any = described
    for key in above:
        holder = holder.get(key)
        if not isinstance(holder, dict):
            return False  # which is said of the entry above
    value = holder.get(last, ...)
    if kind is int:
        return type(value) is not int or value <= 0
    return not isinstance(value, kind)


def _require_files(folder: Path, described: Mapping[str, Any]) -> None:
    """Raise `UserError` unless every file of a published export is there as it was written."""
    entries = described["files"]
    missing = [name for name in entries if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{str(folder)!r} must hold all files that {PUBLISHED} names, found no "
            f"{', '.join(missing)}; copy the whole folder"
        )
    found = digests([folder / name for name in entries])
    for name, digest in zip(entries, found, strict=True):
        if digest != entries[name]["sha256"]:
            raise UserError(
                f"{str(folder / name)!r} must have the SHA-256 that {PUBLISHED} names, found "
                "another: it is damaged or was changed; export it again"
            )


def require_model(geometry: Geometry, model: Mapping[str, Any], *, where: str) -> None:
    """Raise `UserError` unless the section `model` of a config describes this network."""
    sizes = {**asdict(geometry), "patch_size": list(geometry.patch_size)}
    wrong = [
        f"{key} {model.get(key)} where the weights need {value}"
        for key, value in sizes.items()
        if model.get(key) != value
    ]
    if wrong:
        raise UserError(
            f"{where} must describe the checkpoint, found {', '.join(wrong)}; change one of the two"
        )
