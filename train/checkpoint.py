"""Checkpoints: a snapshot in host memory, and folders on disk that are whole or not there.

    checkpoints/
      step-00000100/            appears by one rename
        rank-00000.safetensors  every tensor that the rank holds; which parameters its masters are
                                made of stands in the header
        COMPLETE.json           written last: description and the hash of every other file
      newest                    name of the newest folder, for people; `newest_whole` scans

A folder without COMPLETE.json, or with a name that ends in `.part`, is not a checkpoint.
`train.restore` reads them.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import UserError
from configs.load import config_hash
from train.engine import Piece
from train.randomness import generator_states
from train.ranks import gather_objects, rank, world_size
from train.versions import code_version, package_version

if TYPE_CHECKING:
    from train.stage import Stage

log = logging.getLogger(__name__)

MARKER = "COMPLETE.json"
POINTER = "newest"
LAYOUTS = "layouts"
PART = ".part"

Result = TypeVar("Result")


class CheckpointError(UserError):
    """A checkpoint does not fit this run, is damaged, or cannot be written."""


class WriteError(CheckpointError):
    """A checkpoint could not be written; all ranks raise it together."""


@dataclass(frozen=True)
class Snapshot:
    """The exact state of one rank between two steps.

    Attributes:
        tensors: Copies in host memory.
        layouts: What the masters among them are made of: `train.engine.Piece`s by engine.
        meta: The rest, as JSON.
    """

    tensors: dict[str, Tensor]
    layouts: dict[str, list[Piece]]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that are done in this state; also the batch to continue with."""
        return int(self.meta["step"])


def capture(stage: "Stage") -> Snapshot:
    """Copy the whole state of `stage` on this rank: engines, its own tensors, RNG, counters."""
    held = {
        f"engine.{name}.{key}": value
        for name, engine in stage.engines.items()
        for key, value in engine.shard_state().items()
    }
    held |= {f"extra.{key}": value for key, value in stage.extra_state().items()}
    words, random_meta = generator_states()
    held |= {f"random.{name}": value for name, value in words.items()}
    tensors = {key: _start_copy(value) for key, value in held.items()}
    if any(value.is_cuda for value in held.values()):
        torch.cuda.synchronize()
    meta = {
        "step": stage.completed,
        "counters": dict(stage.counters),
        "metrics": stage.metrics.state(),
        "seed": stage.seed,
        "world_size": world_size(),
        "identity": stage.identity,
        "identity_hash": config_hash(stage.identity),
        "versions": {name: package_version(name) for name in ("pafukv", "torch", "lightning")},
        "code": code_version(),
        "random": random_meta,
    }
    layouts = {
        name: engine.layout() for name, engine in stage.engines.items() if engine.is_written_here
    }
    # Through JSON at once: later changes of the stage must not reach the snapshot.
    return Snapshot(tensors, layouts, json.loads(json.dumps(meta)))


@dataclass(frozen=True)
class Shelf:
    """Where the checkpoints of a stage lie, and which ones stay.

    Attributes:
        folder: Of all checkpoints of the stage.
        keep: Newest whole checkpoints that stay.
        keep_every: The first at or behind every multiple of it stays for good; 0 = none.
        group: That ranks agree in, see `train.ranks.gather_objects`.
    """

    folder: Path
    keep: int = 1
    keep_every: int = 0
    group: Any = None


def write(snapshot: Snapshot, shelf: Shelf, *, after: Callable[[], None] = lambda: None) -> Path:
    """Write a checkpoint of all ranks; every rank calls this with its own snapshot.

    Args:
        snapshot: Of this rank; all ranks' are of the same step.
        shelf: Where it goes.
        after: What rank 0 brings to the disk before, as the checkpoint says that it is there.

    Returns:
        The new folder. If one of the same step exists it is kept as it is.

    Raises:
        WriteError: If a rank cannot write; checkpoints that exist stay as they are.
    """
    final = shelf.folder / f"step-{snapshot.step:08d}"
    part = final.with_name(final.name + PART)

    def together(action: Callable[[], Result], *, by_all: bool = True) -> list[Result]:
        return _together(action, part, shelf.group, by_all=by_all)

    together(after, by_all=False)
    if together(lambda: _prepare(final, part), by_all=False)[0]:
        return final
    ranks = together(lambda: _write_rank(snapshot, part))
    together(lambda: _finish(snapshot, ranks, final), by_all=False)
    if rank() == 0:
        _tidy(shelf, final)
    return final


def newest_whole(folder: Path, *, before: int | None = None) -> Path | None:
    """The whole checkpoint with the most steps below `folder`, if there is one.

    Args:
        folder: Of all checkpoints of the stage.
        before: Only those with fewer steps.
    """
    whole = [path for path in _whole(folder) if before is None or step_of(path) < before]
    return whole[-1] if whole else None


def read_marker(folder: Path) -> dict[str, Any]:
    """The description of a whole checkpoint.

    Raises:
        CheckpointError: If it is missing or unreadable.
    """
    try:
        described = json.loads((folder / MARKER).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(
            f"a checkpoint must hold a readable {MARKER}, {folder} does not ({error}); delete "
            "this folder to continue from the one before"
        ) from error
    assert isinstance(described, dict)
    return described


def step_of(folder: Path) -> int:
    """Steps that are done in the checkpoint `folder`, from its name."""
    return int(folder.name.removeprefix("step-"))


def _together(
    action: Callable[[], Result], part: Path, group: Any, *, by_all: bool
) -> list[Result]:
    """Run `action` on every rank, or on rank 0.

    Returns:
        The results by rank.

    Raises:
        WriteError: On all ranks, if it fails on any.
    """
    outcome: Any = None
    failure = ""
    try:
        outcome = action() if by_all or rank() == 0 else None
    except (OSError, SafetensorError) as error:
        failure = f"rank {rank()}: {error}"
    outcomes = gather_objects((outcome, failure), group)
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        full = any("No space left" in failure for failure in failures)
        raise WriteError(
            f"a checkpoint must fit below {part.parent}, it could not be written "
            f"({'; '.join(failures)}); {'free space on that disk' if full else 'see to the cause'} "
            "and start again: training continues from the newest whole checkpoint"
        )
    return [outcome for outcome, _ in outcomes]


def _prepare(final: Path, part: Path) -> bool:
    """Whether the checkpoint exists; if not, make an empty folder for it."""
    exists = (final / MARKER).exists()
    if not exists:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    return exists


def _write_rank(snapshot: Snapshot, part: Path) -> dict[str, Any]:
    path = part / f"rank-{rank():05d}.safetensors"
    layouts = {
        name: [astuple(piece) for piece in pieces] for name, pieces in snapshot.layouts.items()
    }
    safetensors.torch.save_file(snapshot.tensors, path, {LAYOUTS: json.dumps(layouts)})
    _fsync(path)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "meta": snapshot.meta,
    }


def _finish(snapshot: Snapshot, ranks: list[dict[str, Any]], final: Path) -> None:
    """Describe the files of all ranks, then let the folder appear."""
    part = final.with_name(final.name + PART)
    shared = ("step", "seed", "world_size", "identity", "identity_hash", "versions", "code")
    described = {key: snapshot.meta[key] for key in shared}
    own = ("step", "counters", "metrics", "random")
    described["ranks"] = [
        entry | {"meta": {key: entry["meta"][key] for key in own}} for entry in ranks
    ]
    with (part / MARKER).open("w") as file:
        json.dump(described, file)
        file.flush()
        os.fsync(file.fileno())
    _fsync(part)
    part.rename(final)
    _fsync(final.parent)
    _fsync(final.parent.parent)


def _tidy(shelf: Shelf, newest: Path) -> None:
    """Name the newest checkpoint and remove what shall not stay; it is whole without that.

    A checkpoint stays for good if it is the first at or behind a multiple of `keep_every`.
    """
    try:
        temporary = shelf.folder / f"{POINTER}{PART}"
        temporary.write_text(newest.name + "\n")
        temporary.replace(shelf.folder / POINTER)
        _prune(shelf)
    except OSError as error:
        log.warning("%s is whole, but old checkpoints could not be removed (%s)", newest, error)


def _prune(shelf: Shelf) -> None:
    whole, period = _whole(shelf.folder), 0
    for old in whole[: -shelf.keep]:
        if shelf.keep_every and step_of(old) // shelf.keep_every > period:
            period = step_of(old) // shelf.keep_every
            continue
        # Under the unfinished name first: killed in between, nothing half looks whole.
        old.rename(old.with_name(old.name + PART))
    for left in shelf.folder.glob(f"step-*{PART}"):
        shutil.rmtree(left)


def _whole(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in named if (path / MARKER).is_file()), key=step_of)


def _start_copy(value: Tensor) -> Tensor:
    """A copy in host memory; from a GPU it is whole only after a synchronisation."""
    target = torch.empty(value.shape, dtype=value.dtype, pin_memory=value.is_cuda)
    return target.copy_(value.detach(), non_blocking=True)


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
