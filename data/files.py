"""Files and folders that appear under their final name only when they are whole."""

import hashlib
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from configs.errors import UserError

STARTED = ".started.json"
"""Says whose half-finished work a folder holds."""
STARTED_PART = f".{STARTED}.part-*"
"""What is left of a `STARTED` whose writer was killed."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary name beside `path`, flush it to the disk, and rename it."""
    temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def is_whole(folder: Path, source_hash: str, *, marker: str) -> bool:
    """Whether a folder holds the whole product of a source; see `claim_folder`."""
    return _source_hash(folder / marker) == source_hash


def is_started(folder: Path, source_hash: str, *, marker: str) -> bool:
    """Whether a folder holds unfinished work on the product of a source; see `claim_folder`."""
    is_same = _source_hash(folder / STARTED) == source_hash
    return is_same and _source_hash(folder / marker) is None


def claim_folder(folder: Path, source_hash: str, *, marker: str, owned: Sequence[str]) -> bool:
    """Make ready a folder that will hold a product, or find that it holds it already.

    The product is whole when the file `marker`, JSON with the key `source_hash`, is there; its
    writer writes that file last and then deletes `STARTED`. Unfinished work of the same source is
    kept for the writer to go on from; an older product, whole or not, is deleted.

    Args:
        folder: Made if need be.
        source_hash: Names the source and the settings that the product is made from.
        marker: Name of the file that is written last.
        owned: Patterns of the product's other files.

    Returns:
        Whether the whole product of this source is there.

    Raises:
        UserError: If the folder holds files, but neither `marker` nor `STARTED`.
    """
    whole, started = _source_hash(folder / marker), _source_hash(folder / STARTED)
    is_complete = whole == source_hash
    if not is_complete and not is_started(folder, source_hash, marker=marker):
        folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in folder.iterdir() if not fnmatch(path.name, STARTED_PART)}
        if whole is None and started is None and found:
            raise UserError(
                f"{folder} must be empty or hold what this command wrote before, found "
                f"{min(found)}; choose another folder or empty it"
            )
        # Whoever is killed in here must leave a folder that is nobody's: neither whole for the
        # older source nor started for this one while files of the older remain.
        _write_started(folder, "")
        (folder / marker).unlink(missing_ok=True)
        for pattern in owned:
            for path in folder.glob(pattern):
                path.unlink()
        _write_started(folder, source_hash)
    for path in folder.glob(".*.part-*"):  # left by a writer that was killed
        path.unlink(missing_ok=True)
    if is_complete and started is not None:
        (folder / STARTED).unlink()
    return is_complete


def _write_started(folder: Path, source_hash: str) -> None:
    write_atomically(folder / STARTED, json.dumps({"source_hash": source_hash}).encode())


def _source_hash(path: Path) -> str | None:
    """The source hash in a marker file; None without the file, "" if it cannot be read."""
    if not path.exists():
        return None
    try:
        return str(json.loads(path.read_bytes())["source_hash"])
    except (KeyError, TypeError, ValueError):
        return ""


def file_sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def json_sha256(value: Any) -> str:
    """Hexadecimal sha256 of a JSON value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
