"""Checkpoints: a snapshot in host memory, and folders on disk that are whole or not there.

    checkpoints/
      step-00000100/            appears by one rename
        rank-00000.safetensors  every tensor that the rank holds
        COMPLETE.json           written last: description and the hash of every other file
      newest                    name of the newest folder, for people; `newest_whole` scans

A folder without COMPLETE.json, or with a name that ends in `.part`, is not a checkpoint.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from configs.errors import UserError
from configs.load import config_hash
from train.randomness import GENERATORS, generator_states, set_generator_states
from train.ranks import barrier, gather_objects, rank, world_size

if TYPE_CHECKING:
    from train.stage import Stage

MARKER = "COMPLETE.json"
POINTER = "newest"
PART = ".part"

Result = TypeVar("Result")


class CheckpointError(UserError):
    """A checkpoint does not fit this run, is damaged, or cannot be written."""


@dataclass(frozen=True)
class Snapshot:
    """The exact state of one rank between two steps.

    Attributes:
        tensors: Copies in host memory.
        meta: The rest, as JSON.
    """

    tensors: dict[str, Tensor]
    meta: dict[str, Any]

    @property
    def step(self) -> int:
        """Steps that are done in this state; also the batch to continue with."""
        return int(self.meta["step"])


def capture(stage: "Stage") -> Snapshot:
    """Copy the whole state of `stage` on this rank: engines, its own tensors, RNG, counters."""
    tensors = {
        f"engine.{name}.{key}": _copy(value)
        for name, engine in stage.engines.items()
        for key, value in engine.shard_state().items()
    }
    tensors |= {f"extra.{key}": _copy(value) for key, value in stage.extra_state().items()}
    words, random_meta = generator_states()
    tensors |= {f"random.{name}": value for name, value in words.items()}
    meta = {
        "step": stage.completed,
        "counters": dict(stage.counters),
        "metrics": stage.metrics.state(),
        "seed": stage.seed,
        "world_size": world_size(),
        "identity": stage.identity,
        "identity_hash": config_hash(stage.identity),
        "versions": {name: _version(name) for name in ("pafukv", "torch", "lightning")},
        "random": random_meta,
    }
    # Through JSON at once: later changes of the stage must not reach the snapshot.
    return Snapshot(tensors, json.loads(json.dumps(meta)))


def write(snapshot: Snapshot, folder: Path, *, keep: int) -> Path:
    """Write a checkpoint of all ranks; every rank calls this with its own snapshot.

    Args:
        snapshot: Of this rank; all ranks' are of the same step.
        folder: Of all checkpoints of the stage.
        keep: Whole checkpoints that stay, this one among them.

    Returns:
        The new folder. If one of the same step exists it is kept as it is.

    Raises:
        CheckpointError: If a rank cannot write; checkpoints that exist stay as they are.
    """
    final = folder / f"step-{snapshot.step:08d}"
    part = final.with_name(final.name + PART)
    if _together(lambda: _prepare(final, part), part)[0]:
        return final
    ranks = _together(lambda: _write_rank(snapshot, part), part)
    _together(lambda: _finish(snapshot, ranks, final) if rank() == 0 else None, part)
    _together(lambda: _prune(folder, keep=keep) if rank() == 0 else None, part)
    return final


def restore(stage: "Stage", folder: Path) -> int:
    """Bring `stage`, whose engines exist, to the state in the checkpoint `folder`.

    The global random generators are left alone: see `restore_random`.

    Returns:
        The number of steps that are done.

    Raises:
        CheckpointError: If the checkpoint is damaged or belongs to another stage, another
            configuration or another number of processes.
    """
    described = read_marker(folder)
    _check_fits(stage, described, folder)
    entry = described["ranks"][rank()]
    meta, tensors = entry["meta"], _read_rank(folder, entry)
    try:
        for name, engine in stage.engines.items():
            engine.load_shard_state(_below(tensors, f"engine.{name}."))
    except ValueError as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from error
    stage.load_extra_state(_below(tensors, "extra."))
    stage.completed = int(meta["step"])
    stage.counters = {key: int(value) for key, value in meta["counters"].items()}
    stage.metrics.load_state(meta["metrics"])
    return stage.completed


def restore_random(folder: Path) -> None:
    """Set the global generators of this rank to their state in the checkpoint `folder`."""
    entry = read_marker(folder)["ranks"][rank()]
    with safetensors.safe_open(folder / entry["file"], framework="pt") as file:
        words = {name: file.get_tensor(f"random.{name}") for name in GENERATORS}
    set_generator_states(words, entry["meta"]["random"])


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


def _together(action: Callable[[], Result], part: Path) -> list[Result]:
    """Run `action` on every rank; its results by rank, or one error on all ranks if any fails."""
    result, failure = None, ""
    try:
        result = action()
    except (OSError, SafetensorError) as error:
        failure = f"rank {rank()}: {error}"
    outcomes = gather_objects((result, failure))
    failures = [failure for _, failure in outcomes if failure]
    if failures:
        if rank() == 0:
            shutil.rmtree(part, ignore_errors=True)
        full = any("No space left" in failure for failure in failures)
        raise CheckpointError(
            f"a checkpoint must fit below {part.parent}, it could not be written "
            f"({'; '.join(failures)}); {'free space on that disk' if full else 'see to the cause'} "
            "and start again: training continues from the newest whole checkpoint"
        )
    return [result for result, _ in outcomes]


def _prepare(final: Path, part: Path) -> bool:
    """Whether the checkpoint exists; if not, rank 0 makes an empty folder for it."""
    exists = (final / MARKER).exists()
    if rank() == 0 and not exists:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
    barrier()
    return exists


def _write_rank(snapshot: Snapshot, part: Path) -> dict[str, Any]:
    path = part / f"rank-{rank():05d}.safetensors"
    safetensors.torch.save_file(snapshot.tensors, path)
    _fsync(path)
    return {
        "file": path.name,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path),
        "meta": snapshot.meta,
    }


def _finish(snapshot: Snapshot, ranks: list[dict[str, Any]], final: Path) -> None:
    """Describe the files of all ranks, then let the folder appear."""
    part = final.with_name(final.name + PART)
    shared = ("step", "seed", "world_size", "identity", "identity_hash", "versions")
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
    temporary = final.parent / f"{POINTER}{PART}"
    temporary.write_text(final.name + "\n")
    temporary.replace(final.parent / POINTER)


def _prune(folder: Path, *, keep: int) -> None:
    """Remove all but the newest `keep` whole checkpoints, and what killed runs left behind."""
    for old in _whole(folder)[:-keep]:
        # Under the unfinished name first: killed in between, nothing half looks whole.
        old.rename(old.with_name(old.name + PART))
    for left in folder.glob(f"step-*{PART}"):
        shutil.rmtree(left)


def _whole(folder: Path) -> list[Path]:
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted((path for path in named if (path / MARKER).is_file()), key=step_of)


def _check_fits(stage: "Stage", described: Mapping[str, Any], folder: Path) -> None:
    if described["identity_hash"] != config_hash(stage.identity):
        own = json.loads(json.dumps(stage.identity))
        differing = differences(described["identity"], own)
        raise CheckpointError(
            f"{folder} must come from the configuration of this run; other values: "
            f"{'; '.join(differing)}; set them back, or start the stage anew with --restart"
        )
    if described["world_size"] != world_size():
        raise CheckpointError(
            f"{folder} must be continued by as many processes as wrote it, "
            f"{described['world_size']}, found {world_size()}; start that many"
        )


def differences(saved: Any, own: Any, key: str = "") -> list[str]:
    """`key: saved value -> own value` for every leaf that differs."""
    if isinstance(saved, dict) and isinstance(own, dict):
        names = list(saved) + [name for name in own if name not in saved]
        return [
            line
            for name in names
            for line in differences(
                saved.get(name), own.get(name), f"{key}.{name}" if key else str(name)
            )
        ]
    return [] if saved == own else [f"{key}: {saved!r} in the checkpoint, {own!r} now"]


def _read_rank(folder: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    path = folder / entry["file"]
    if not path.is_file() or _sha256(path) != entry["sha256"]:
        raise CheckpointError(
            f"{path} must be the file that {MARKER} describes ({entry['bytes']} bytes, SHA-256 "
            f"{entry['sha256'][:12]}...), it is damaged or missing; delete {folder} to continue "
            "from the checkpoint before"
        )
    return safetensors.torch.load_file(path)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)
    }


def _copy(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True).contiguous()


@cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
