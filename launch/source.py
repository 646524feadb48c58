"""Where the videos of a run lie: beside their list, in a folder, or in a Python package."""

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import nearest
from configs.schema import SourceConfig
from data.files import write_atomically
from data.ingest import VideoRow, read_list

PACKAGE = "package:"


def list_videos(source: SourceConfig) -> list[VideoRow]:
    """The videos of a source of kind `videos`, all of which exist.

    Raises:
        UserError: If the list, its folder or a video is missing, or a line is malformed.
    """
    path = Path(source.path)
    if not source.path or not path.exists():
        beside = [str(other) for other in path.parent.glob("*")] if source.path else []
        raise UserError(
            f"source.path must be a folder with captions.jsonl or a list of videos, found "
            f"{source.path!r}, which does not exist{nearest(str(path), beside)}"
        )
    rows = read_list(path)
    if source.folder:
        start, folder = path if path.is_dir() else path.parent, find_folder(source.folder)
        rows = [replace(row, path=folder / row.path.relative_to(start)) for row in rows]
    missing = [str(row.path) for row in rows if not row.path.is_file()]
    if missing:
        raise UserError(
            f"every video of {str(path)!r} must exist, found no file {missing[0]!r} "
            f"({len(missing)} of {len(rows)} are missing); correct the list or source.folder"
        )
    return rows


def find_folder(name: str) -> Path:
    """The folder that `source.folder` means; `package:NAME/PATH` is looked up without an import.

    Raises:
        UserError: If the package is not installed or the folder does not exist.
    """
    folder = Path(name)
    if name.startswith(PACKAGE):
        package, _, inside = name.removeprefix(PACKAGE).partition("/")
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise UserError(
                f"source.folder={name!r} needs the Python package {package!r}, found none; install "
                "it with `pip install -e .[dev] -c constraints.txt`"
            )
        folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise UserError(f"source.folder={name!r} must be a folder, found none at {str(folder)!r}")
    return folder


def fingerprint(rows: list[VideoRow]) -> list[Any]:
    """What the shards depend on: order, captions, and name, size and date of every video.

    Dates rather than contents, so that the plan of a large collection is known in seconds.
    """
    stats = [row.path.stat() for row in rows]
    return [
        [row.path.name, stat.st_size, stat.st_mtime_ns, row.caption, row.extra]
        for row, stat in zip(rows, stats, strict=True)
    ]


def write_list(rows: list[VideoRow], path: Path) -> None:
    """Write a list of videos with full paths, for `data.ingest.ingest`."""
    lines = [{**row.extra, "file": str(row.path.resolve()), "caption": row.caption} for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines).encode())
