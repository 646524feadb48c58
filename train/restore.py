"""Bringing a stage back to a checkpoint, whatever number of ranks and strategy wrote it.

Masters are cut differently by every strategy and world size, so a checkpoint says which elements of
which parameter each of them holds; a rank gathers the elements of its own masters from all files.
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor

from configs.load import config_hash
from train.checkpoint import LAYOUTS, MARKER, CheckpointError, newest_whole, read_marker, sha256
from train.engine import EMA_VERSION, Engine, Piece
from train.randomness import GENERATORS, derive_seed, seed_generators, set_generator_states
from train.ranks import gather_objects, rank, world_size

if TYPE_CHECKING:
    from train.stage import Stage

VISIBLE_SECONDS = 120.0
"""After which a node must have learned of a folder that another one has made."""


def agree_on_newest(folder: Path) -> Path | None:
    """The newest whole checkpoint below `folder` as rank 0 sees it; all ranks call this together.

    Raises:
        CheckpointError: If this rank does not come to see it: the folder is not shared.
    """
    own = newest_whole(folder)
    name = gather_objects(None if own is None else own.name)[0]
    if name is None:
        return None
    deadline = time.monotonic() + VISIBLE_SECONDS
    while not (folder / name / MARKER).is_file():
        if time.monotonic() > deadline:
            raise CheckpointError(
                f"rank {rank()} must see the checkpoint that rank 0 sees, found no {folder / name} "
                f"for {VISIBLE_SECONDS:.0f} s; give a runs_dir that all nodes share"
            )
        time.sleep(0.2)
    return folder / name


def restore(stage: "Stage", folder: Path) -> int:
    """Bring `stage`, whose engines exist, to the state in the checkpoint `folder`.

    The global random generators are left alone: see `restore_random`.

    Returns:
        The number of steps that are done.

    Raises:
        CheckpointError: If the checkpoint is damaged or belongs to another stage or another
            configuration.
    """
    described = read_marker(folder)
    check_identity(stage.identity, described, folder)
    check_files(folder, described["ranks"])
    saved = SavedState(folder, [entry["file"] for entry in described["ranks"]])
    for name, engine in stage.engines.items():
        try:
            engine.load_shard_state(assemble(engine, saved))
        except ValueError as error:
            raise CheckpointError(f"{folder} does not fit {name!r} of this run: {error}") from error
    # Each rank takes over what one rank had, or several, or none.
    heirs = range(rank(), len(described["ranks"]), world_size())
    stage.load_extra_state([saved.extra(number) for number in heirs])
    metas = [described["ranks"][number]["meta"] for number in heirs]
    stage.metrics.load_states([meta["metrics"] for meta in metas])
    stage.counters = {k: int(v) for k, v in described["ranks"][0]["meta"]["counters"].items()}
    stage.completed = int(described["step"])
    return stage.completed


def restore_random(stage: "Stage", folder: Path) -> None:
    """Set the global generators of this rank to their state in the checkpoint `folder`.

    On another number of ranks they start anew, from the seed of the stage and the step.
    """
    described = read_marker(folder)
    if described["world_size"] != world_size():
        seed_generators(derive_seed(stage.seed, "rank", rank(), "step", described["step"]))
        return
    entry = described["ranks"][rank()]
    with safetensors.safe_open(folder / entry["file"], framework="pt") as file:
        words = {name: file.get_tensor(f"random.{name}") for name in GENERATORS}
    set_generator_states(words, entry["meta"]["random"])


class SavedState:
    """The files of a checkpoint, of which only what is asked for is read.

    Args:
        folder: Of the checkpoint.
        names: Of the files, in rank order.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        self._files = [safetensors.safe_open(folder / name, framework="pt") for name in names]
        self._keys = [frozenset(file.keys()) for file in self._files]
        self._pieces: dict[str, dict[str, list[tuple[int, Piece]]]] = {}
        for number, file in enumerate(self._files):
            for engine, pieces in json.loads(file.metadata()[LAYOUTS]).items():
                parameters = self._pieces.setdefault(engine, {})
                for piece in (Piece(*fields) for fields in pieces):
                    parameters.setdefault(piece.name, []).append((number, piece))

    def engines(self) -> list[str]:
        """Names of the networks that were trained."""
        return sorted(self._pieces)

    def parameters(self, engine: str) -> set[str]:
        """Names of the trained parameters of an engine."""
        return set(self._pieces.get(engine, {}))

    def find(self, key: str) -> Tensor | None:
        """A tensor from the first file that has it."""
        for file, keys in zip(self._files, self._keys, strict=True):
            if key in keys:
                return file.get_tensor(key)
        return None

    def extra(self, number: int) -> dict[str, Tensor]:
        """A stage's own tensors in the file of a rank."""
        return {
            key.removeprefix("extra."): self._files[number].get_tensor(key)
            for key in sorted(self._keys[number])
            if key.startswith("extra.")
        }

    def fill(self, target: Tensor, engine: str, kind: str, piece: Piece) -> int:
        """Copy the elements of `piece` into a flat master; the number of elements found."""
        found = 0
        for number, source in self._pieces[engine][piece.name]:
            low = max(piece.start, source.start)
            high = min(piece.start + piece.length, source.start + source.length)
            if low >= high:
                continue
            saved = self._files[number].get_slice(f"engine.{engine}.{kind}.{source.master}")
            there = source.offset + low - source.start
            here = piece.offset + low - piece.start
            target[here : here + high - low] = saved[there : there + high - low]
            found += high - low
        return found


def assemble(engine: Engine, saved: SavedState) -> dict[str, Tensor]:
    """What `Engine.load_shard_state` needs on this rank.

    Raises:
        ValueError: If the checkpoint lacks something that the engine holds, or holds another
            network.
    """
    name, held = engine.name, engine.held_tensors()
    _check_parameters(engine, saved)
    masters = [key.removeprefix("master.") for key in held if key.startswith("master.")]
    steps = saved.find(f"engine.{name}.step.0")
    kinds = ["master"] if steps is None else ["master", "exp_avg", "exp_avg_sq"]
    if "ema.0" in held:
        _check_average(name, saved)
        kinds.append("ema")
    state = {
        f"{kind}.{number}": torch.zeros(held[f"master.{number}"].numel())
        for kind in kinds
        for number in masters
    }
    for piece in engine.layout():
        for kind in kinds:
            _fill_whole(state[f"{kind}.{piece.master}"], saved, name, kind, piece)
    if steps is not None:
        state |= {f"step.{number}": steps for number in masters}
    return state | _read_buffers(name, held, saved)


def _fill_whole(target: Tensor, saved: SavedState, engine: str, kind: str, piece: Piece) -> None:
    count = saved.fill(target, engine, kind, piece)
    if count != piece.length:
        raise ValueError(
            f"{kind} of {piece.name} must have elements {piece.start} to "
            f"{piece.start + piece.length}, found {count} of these {piece.length}"
        )


def _read_buffers(engine: str, held: Mapping[str, Tensor], saved: SavedState) -> dict[str, Tensor]:
    buffers = {}
    for key in (key for key in held if key.startswith("buffer.")):
        buffer = saved.find(f"engine.{engine}.{key}")
        if buffer is None or buffer.shape != held[key].shape:
            raise ValueError(
                f"{key} must be there with shape {tuple(held[key].shape)}, found "
                f"{'none' if buffer is None else tuple(buffer.shape)}"
            )
        buffers[key] = buffer
    return buffers


def check_identity(own: Mapping[str, Any], described: Mapping[str, Any], folder: Path) -> None:
    """Raise `CheckpointError` with the keys that differ if another configuration wrote it.

    Args:
        own: `Stage.identity` of this run.
        described: From `read_marker`.
        folder: Of the checkpoint.
    """
    if described["identity_hash"] != config_hash(own):
        differing = differences(described["identity"], json.loads(json.dumps(own)))
        raise CheckpointError(
            f"{folder} must come from the configuration of this run; other values: "
            f"{'; '.join(differing)}; set them back, or start the stage anew with --restart"
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


def check_files(folder: Path, entries: list[dict[str, Any]]) -> None:
    """Raise on all ranks if a file is damaged; each rank looks at some of them."""
    damaged = []
    for entry in entries[rank() :: world_size()]:
        path = folder / entry["file"]
        if not path.is_file() or sha256(path) != entry["sha256"]:
            damaged.append(
                f"{path} must be the file that {MARKER} describes ({entry['bytes']} bytes, SHA-256 "
                f"{entry['sha256'][:12]}...), it is damaged or missing"
            )
    found = [line for part in gather_objects(damaged) for line in part]
    if found:
        raise CheckpointError(
            f"{'; '.join(found)}; delete {folder} to continue from the checkpoint before"
        )


def _check_parameters(engine: Engine, saved: SavedState) -> None:
    own = {name for name, p in engine.module.named_parameters() if p.requires_grad}
    if saved.parameters(engine.name) != own:
        missing = sorted(own - saved.parameters(engine.name))
        other = sorted(saved.parameters(engine.name) - own)
        raise ValueError(f"it must hold its parameters; missing: {missing}, not known: {other}")


def _check_average(name: str, saved: SavedState) -> None:
    version = saved.find(f"engine.{name}.ema_version")
    if version is None or int(version) != EMA_VERSION:
        raise ValueError(
            f"it must hold the moving average of the weights, version {EMA_VERSION}, found "
            f"{'none' if version is None else int(version)}; resuming without it would start the "
            "average anew"
        )
