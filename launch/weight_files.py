"""Files of weights, told apart by what is in them, with their tensors mapped and not read."""

import hashlib
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError

SAFETENSORS, TORCH, PICKLE = "safetensors", "torch", "pickle"
INDEX = ".safetensors.index.json"
"""How the file ends that says which shard holds which tensor."""
_CHUNK = 1 << 24
_DAMAGED_ARCHIVE = (RuntimeError, OSError, EOFError, zipfile.BadZipFile)
_DAMAGED_PICKLE = (
    *(ValueError, TypeError, AttributeError, KeyError, IndexError),
    *(AssertionError, struct.error, OverflowError, MemoryError),
)
"""How torch.load fails if single bytes of an archive's list of tensors are others: opcodes act on
what is not there, names are no text, tensors are rebuilt from something else."""


class WeightsError(UserError):
    """A file of weights is missing, damaged, or of a kind that is not read."""


def kind_of(path: Path) -> str | None:
    """`SAFETENSORS`, `TORCH`, `PICKLE` or none of them, by the first bytes of a file.

    Raises:
        WeightsError: If it cannot be read.
    """
    try:
        with path.open("rb") as file:
            start = file.read(9)
    except OSError as error:
        raise WeightsError(
            f"{str(path)!r} must be readable, found {error.strerror}; check the path"
        ) from error
    if start[8:] == b"{":  # first, for the length before it may look like any of the others
        return SAFETENSORS
    if start[:2] == b"PK":
        return TORCH
    return PICKLE if start[:1] == b"\x80" else None


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Tensors of one file.

    Raises:
        WeightsError: If it is damaged, for one cut short.
    """
    try:
        return safetensors.torch.load_file(path)
    except (SafetensorError, OSError) as error:
        raise WeightsError(
            f"{str(path)!r} must be a whole safetensors file, found: {error}; download or write it "
            "again"
        ) from error


def read_index(path: Path) -> dict[str, str]:
    """Name of every tensor to the file that holds it, from an index of shards.

    Raises:
        WeightsError: If it is no index, or a shard it names is not beside it.
    """
    content = read_json(path)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise WeightsError(
            f"{str(path)!r} must have a 'weight_map', found {sorted(content)}; download it again"
        )
    shards = sorted({str(shard) for shard in places.values()})
    missing = [shard for shard in shards if not (path.parent / shard).is_file()]
    if missing:
        raise WeightsError(
            f"{str(path)!r} names {len(shards)} shards, which must lie beside it, found no "
            f"{', '.join(missing[:10])}; download what is missing"
        )
    return {str(name): str(shard) for name, shard in places.items()}


def read_shards(index: Path) -> dict[str, Tensor]:
    """Tensors of all shards of an index.

    Raises:
        WeightsError: If a shard is missing, damaged, or holds other tensors than the index says.
    """
    places = read_index(index)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(set(places.values())):
        found = read_safetensors(index.parent / shard)
        wanted = {name for name, place in places.items() if place == shard}
        if set(found) != wanted:
            odd = sorted(set(found) ^ wanted)
            raise WeightsError(
                f"shard {shard!r} must hold the tensors that {index.name!r} names, found "
                f"{len(odd)} differences such as {odd[0]!r}; download both again"
            )
        tensors |= found
    return tensors


def read_torch(path: Path) -> dict[str, Any]:
    """What torch.save wrote: tensors, numbers, texts and containers of them, nothing else.

    Raises:
        WeightsError: If it is damaged, or reading it would have to call code.
    """
    if kind_of(path) == PICKLE:
        raise WeightsError(
            f"{str(path)!r} must be what torch.save writes since version 1.6, found a bare pickle, "
            "which can neither be mapped into memory nor be trusted; load it where it comes from "
            "and save it again"
        )
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        reason = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
        raise WeightsError(
            f"{str(path)!r} must hold tensors alone, found something that only code could bring "
            f"back, which is not run ({_first_line(reason)}); save its tensors alone"
        ) from None
    except (*_DAMAGED_ARCHIVE, *_DAMAGED_PICKLE) as error:
        raise WeightsError(
            f"{str(path)!r} must be a whole file of torch.save, found: "
            f"{type(error).__name__} {_first_line(str(error))}; download or write it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(
            f"{str(path)!r} must hold a dictionary of tensors, found {type(content).__name__}; "
            "save a state dict"
        )
    return content


def _first_line(text: str) -> str:
    """Of a message of torch, which may be a page long or empty."""
    return text.strip().partition("\n")[0]


def read_json(path: Path) -> dict[str, Any]:
    """An object in a JSON file.

    Raises:
        WeightsError: If there is none.
    """
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(
            f"{str(path)!r} must be readable JSON, found: {error}; download it again"
        ) from error
    if not isinstance(content, dict):
        raise WeightsError(f"{str(path)!r} must hold an object, found a {type(content).__name__}")
    return content


def files_by_kind(folder: Path) -> dict[str | None, list[Path]]:
    """The files of a folder by `kind_of`; indices of shards under `INDEX`."""
    found: dict[str | None, list[Path]] = {
        kind: [] for kind in (SAFETENSORS, TORCH, PICKLE, INDEX, None)
    }
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        found[INDEX if path.name.endswith(INDEX) else kind_of(path)].append(path)
    return found


def digests(files: Sequence[Path]) -> list[str]:
    """SHA-256 of files, in order; shows a bar, for they may be large."""
    total = sum(path.stat().st_size for path in files)
    found = []
    with tqdm(total=total, unit="B", unit_scale=True, desc="hash", file=sys.stderr) as bar:
        for path in files:
            digest = hashlib.sha256()
            with path.open("rb") as file:
                while chunk := file.read(_CHUNK):
                    digest.update(chunk)
                    bar.update(len(chunk))
            found.append(digest.hexdigest())
    return found
