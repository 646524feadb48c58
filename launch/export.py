"""Exports: weights of a finished stage as safetensors, with a manifest that says what they are.

export/
  transformer.safetensors  weights of one network per file
  head.safetensors         salience head, if the stage has one
  adapter.safetensors      what was trained of the transformer, which holds it already, if the stage
                           trained adapters; critic_adapter.safetensors is the critic's
  manifest.json            role, stage, geometry, parents, and the hash of every file
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn

from configs.errors import UserError
from configs.load import config_hash, nearest
from data.files import file_sha256
from train.versions import package_version

FORMAT = 1
MANIFEST = "manifest.json"
ROLES = ("teacher", "student", "head")
ADAPTERS = {"transformer": "adapter", "critic": "critic_adapter"}
"""File stem of a network to that of its adapter; what layers these fit is under `lora`."""


class ExportError(UserError):
    """An export is missing, damaged, of another role, or does not fit the network."""


@dataclass(frozen=True)
class Export:
    """A verified export.

    Attributes:
        folder: Where it lies.
        manifest: As written by `write_export`.
        weights: File stem, such as `transformer`, to its tensors on the CPU, mapped from the file.
    """

    folder: Path
    manifest: dict[str, Any]
    weights: dict[str, dict[str, Tensor]]

    @property
    def hash(self) -> str:
        """SHA-256 of the manifest, and so of every byte of the export."""
        return config_hash(self.manifest)

    @property
    def sampler(self) -> tuple[list[float], bool] | None:
        """Noise levels of the student's sampler and whether it renoises, if it has its own."""
        found = self.manifest.get("sampler")
        return None if found is None else (list(found["sigmas"]), bool(found["renoise"]))

    def tensors(self, stem: str) -> dict[str, Tensor]:
        """The tensors of the file `stem`.

        Raises:
            ExportError: If the export has no such file.
        """
        if stem not in self.weights:
            raise ExportError(
                f"export {str(self.folder)!r} must hold {stem}.safetensors, found only "
                f"{sorted(self.weights)}; take the export of another stage"
            )
        return self.weights[stem]


def write_export(
    folder: Path,
    *,
    weights: Mapping[str, Mapping[str, Tensor]],
    manifest: Mapping[str, Any],
    replaces: bool = False,
) -> str:
    """Write an export; it appears under `folder` whole.

    Args:
        folder: Final name, such as `runs/demo/teacher/export`.
        weights: File stem to named tensors on any device.
        manifest: JSON values: `role` (one of `ROLES`), `stage`, `sampler`, `config`, `parents`
            (role to hash) and what else a reader needs. `format`, `versions` and `files` are
            added here.
        replaces: Whether an older export may be there, which is then deleted.

    Returns:
        Hash of the export, for `parents` of its children.

    Raises:
        ExportError: If something else is there, or the disk is full or not writable; nothing is
            left behind.
    """
    assert manifest["role"] in ROLES, f"unknown role {manifest['role']!r}"
    whole = {
        **manifest,
        "format": FORMAT,
        "versions": {name: package_version(name) for name in ("pafukv", "torch", "safetensors")},
    }
    try:
        with new_folder(folder) as part:
            whole["files"] = {
                stem: _write_tensors(part / f"{stem}.safetensors", tensors)
                for stem, tensors in sorted(weights.items())
            }
            _write_bytes(part / MANIFEST, json.dumps(whole, indent=2, sort_keys=True).encode())
            if replaces and (folder / MANIFEST).is_file():
                shutil.rmtree(folder)
    except (OSError, SafetensorError) as error:  # the latter for files of tensors
        found = str(error.strerror if isinstance(error, OSError) else error)
        is_full = os.strerror(errno.ENOSPC) in found
        raise ExportError(
            f"export {str(folder)!r} must be writable, found {found}; "
            f"{'free some space' if is_full else 'check the folder'} and run the same command again"
        ) from error
    return config_hash(json.loads(json.dumps(whole)))


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder to fill, which then gets the name `final`; after an error nothing of it stays.

    It has a name of its own, beside `final`, so that nothing else is ever written to or deleted;
    what a killed process leaves is called `.NAME.*.part`.

    Raises:
        OSError: If it cannot be made or renamed; the latter, too, if `final` is there.
    """
    final = Path(os.path.abspath(final))  # noqa: PTH100  # takes `..` away before it is followed
    part = final.with_name(f".{final.name}.{uuid.uuid4().hex[:12]}.part")
    try:
        part.mkdir(parents=True)
        yield part
        sync(part)
        if os.path.lexists(final):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(final))
        part.rename(final)
        sync(final.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def require_absent(path: Path) -> None:
    """Raise `ExportError` if there is anything that a verb would write to."""
    # `new/..` comes into being when `new` does.
    if os.path.lexists(os.path.abspath(path)):  # noqa: PTH100
        raise ExportError(f"DST {str(path)!r} must not exist yet; choose another folder")


def load_export(path: Path, *, role: str | None = None) -> Export:
    """Read and verify an export.

    Args:
        path: An export, or the folder of a stage that holds one under `export/`.
        role: `teacher` or `student`: the export must have this role; `head`: it must hold a
            salience head; None: anything goes.

    Raises:
        ExportError: If there is no export, it is damaged, or it has another role.
    """
    export = open_export(path, role=role)
    files = export.manifest["files"].items()
    weights = {stem: _read_tensors(export.folder, stem, entry) for stem, entry in files}
    return replace(export, weights=weights)


def open_export(path: Path, *, role: str | None = None) -> Export:
    """An export without its weights, which are not looked at; arguments and errors as before."""
    folder = find_export(path)
    manifest = read_manifest(folder)
    _check_role(folder, manifest, role)
    return Export(folder, manifest, {})


def find_export(path: Path) -> Path:
    """The export folder that `path` means.

    Raises:
        ExportError: If there is none; says what lies there instead.
    """
    for folder in (path, path / "export"):
        if (folder / MANIFEST).is_file():
            return folder
    if not path.exists():
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        hint = nearest(str(path), beside) or "; give the folder of a finished stage"
        raise ExportError(f"checkpoint {str(path)!r} must exist, found no such folder{hint}")
    if (path / "checkpoints").is_dir() or path.name.startswith("step-"):
        found = "a stage that has not finished; continue it with the command that started it"
    else:
        found = "no manifest.json; give the folder of a finished stage or its export"
    raise ExportError(f"checkpoint {str(path)!r} must hold an export, found {found}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of the export in `folder`, without the weights.

    Raises:
        ExportError: If it is not one of ours, or of a newer format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{str(folder / MANIFEST)!r} must be readable JSON: {error}; export the stage again"
        ) from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ExportError(
            f"{str(folder / MANIFEST)!r} must be the manifest of an export of format {FORMAT}; "
            "give the folder of a finished stage or its export"
        )
    return manifest


def load_weights(module: nn.Module, export: Export, *, stem: str) -> None:
    """Copy the tensors of the file `stem` into `module`.

    Raises:
        ExportError: If the file, keys or shapes differ; names the first of each kind.
    """
    _check_fit(module, export, stem=stem)
    module.load_state_dict(export.tensors(stem))


def map_weights(module: nn.Module, export: Export, *, stem: str) -> None:
    """Put the tensors of the file `stem` in place of those of `module`, mapped into memory.

    They have the dtype of the file and share its pages with every other process that reads it; a
    page that is written to becomes the module's own. See `train.memory.settle`.

    Args:
        module: May be on the meta device.
        export: That holds the file.
        stem: Of the file.

    Raises:
        ExportError: As in `load_weights`.
    """
    _check_fit(module, export, stem=stem)
    # A mapping of its own: networks that started from one file must not share what they change.
    weights = safetensors.torch.load_file(export.folder / f"{stem}.safetensors")
    module.load_state_dict(weights, assign=True)


def _check_fit(module: nn.Module, export: Export, *, stem: str) -> None:
    weights, wanted = export.tensors(stem), module.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in weights][:1]
    problems += [f"{key} is not in the network" for key in sorted(weights) if key not in wanted][:1]
    problems += [
        f"{key} is {list(weights[key].shape)} where the network has {list(wanted[key].shape)}"
        for key in wanted
        if key in weights and weights[key].shape != wanted[key].shape
    ][:1]
    if problems:
        raise ExportError(
            f"{stem}.safetensors in {str(export.folder)!r} must fit the configured network: "
            f"{'; '.join(problems)}; compare `model` in the config with that in its manifest.json"
        )


def _check_role(folder: Path, manifest: Mapping[str, Any], role: str | None) -> None:
    assert role is None or role in ROLES, f"unknown role {role!r}"
    found, stage = manifest["role"], manifest.get("stage")
    if role == "head" and "head" not in manifest["files"]:
        raise ExportError(
            f"export {str(folder)!r} must hold a salience head, found a {found} of stage "
            f"{stage!r} without one; take the export of a stage of kind 'salience' or later"
        )
    if role in ("teacher", "student") and found != role:
        raise ExportError(
            f"export {str(folder)!r} must be a {role}, found a {found} of stage {stage!r}; "
            f"give the export of a stage that trains a {role}"
        )


def _write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Write one file without a copy of CPU tensors; returns what the manifest says of it."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path.touch()
    mode = path.stat().st_mode
    safetensors.torch.save_file(content, path)
    path.chmod(mode)  # the library's files are for their owner alone
    sync(path)
    return {"sha256": file_sha256(path), "tensors": _describe(content)}


def _read_tensors(folder: Path, stem: str, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file, mapped into memory: what nobody looks at is never read."""
    path = folder / f"{stem}.safetensors"
    try:
        digest = file_sha256(path)
    except OSError as error:
        raise ExportError(
            f"{str(path)!r} must be readable, found {error.strerror}; export the stage again"
        ) from error
    if digest != entry["sha256"]:
        raise ExportError(
            f"{str(path)!r} must have the SHA-256 that its manifest names, found another: the file "
            "is damaged or was changed; export the stage again"
        )
    try:
        tensors = safetensors.torch.load_file(path)
    except SafetensorError as error:
        raise ExportError(f"{str(path)!r} must be a safetensors file: {error}") from error
    if _describe(tensors) != entry["tensors"]:
        raise ExportError(
            f"{str(path)!r} must hold the tensors that its manifest names, found others; "
            "export the stage again"
        )
    return tensors


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {
        name: [str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        for name, tensor in sorted(tensors.items())
    }


def _write_bytes(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
