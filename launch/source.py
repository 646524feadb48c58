"""Where the videos of a run come from: the built-in world, a folder, a list, or a package."""

import hashlib
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import nearest
from configs.schema import SourceConfig

PACKAGE = "package:"
CAPTIONS = "captions.jsonl"


def captions_file(source: SourceConfig) -> Path:
    """The JSON-lines file that lists videos and captions.

    Raises:
        UserError: If there is none at `source.path`.
    """
    if not source.path:
        raise UserError(
            "source.path must name a folder of videos or a list of them, found nothing; "
            "set source.path=... or source.kind=world"
        )
    path = Path(source.path)
    file = path / CAPTIONS if path.is_dir() else path
    if not file.is_file():
        beside = [str(other) for other in path.parent.glob("*")] if path.parent.is_dir() else []
        wanted = f"hold {CAPTIONS}" if path.is_dir() else "exist"
        hint = "" if path.is_dir() else nearest(str(path), beside)
        hint = hint or "; write one with a line {'file': ..., 'caption': ...} per video"
        raise UserError(f"source.path={source.path!r} must {wanted}, found no such file{hint}")
    return file


def videos_folder(source: SourceConfig) -> Path:
    """The folder to which the list's file names are relative.

    Raises:
        UserError: If `source.folder` names a package that is not installed, or no folder.
    """
    if not source.folder:
        return captions_file(source).parent
    folder = Path(source.folder)
    if source.folder.startswith(PACKAGE):
        name, _, inside = source.folder.removeprefix(PACKAGE).partition("/")
        spec = find_spec(name)
        if spec is None or spec.origin is None:
            raise UserError(
                f"source.folder={source.folder!r} needs the Python package {name!r}, found none; "
                "install it with `pip install -e .[dev] -c constraints.txt`"
            )
        folder = Path(spec.origin).parent / inside
    if not folder.is_dir():
        raise UserError(f"source.folder={source.folder!r} must be a folder, found none at {folder}")
    return folder


def source_fingerprint(source: SourceConfig) -> dict[str, Any]:
    """What the shards depend on: the list, and the name and size of every video in it.

    Sizes rather than contents, so that the plan of a large collection is known in seconds; the
    ingest hashes what it reads.

    Raises:
        UserError: If the list or a video is missing, or a line is not a JSON object with a file.
    """
    file, folder = captions_file(source), videos_folder(source)
    text = file.read_text()
    sizes = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            name = str(json.loads(line)["file"])
            sizes[name] = (folder / name).stat().st_size
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{file}, line {number} must be a JSON object with 'file' and 'caption', found "
                f"{line[:60]!r}"
            ) from None
        except FileNotFoundError:
            raise UserError(
                f"{file}, line {number} must name a video in {folder}, found none: {name!r}"
            ) from None
    return {"list": hashlib.sha256(text.encode()).hexdigest(), "sizes": sizes}
