"""Whole weights of one network from a checkpoint, whatever number of ranks and strategy wrote it.

Masters are read where they lie, parameter by parameter, and converted on the way: what is in memory
is the result and what the operating system has mapped of the files, which is let go of regularly.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from train.checkpoint import CheckpointError, read_marker
from train.engine import Piece
from train.restore import SavedState, check_files

MAPPED_BYTES = 64 * 2**20
"""How much may be read of the files before they are mapped anew: pages that were read count as
memory of the process for as long as the mapping lives."""


def trained_networks(folder: Path) -> dict[str, bool]:
    """The networks whose weights a checkpoint holds, and whether it has their moving average.

    Raises:
        CheckpointError: If it is not a whole checkpoint, or a file is damaged.
    """
    saved = _open(folder, check=True)
    return {name: saved.find(f"engine.{name}.ema_version") is not None for name in saved.engines()}


def consolidate(
    folder: Path,
    network: str,
    like: Mapping[str, Tensor],
    *,
    ema: bool = False,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The weights of a network, in the order of `like`.

    Args:
        folder: Of a whole checkpoint that `trained_networks` has looked at.
        network: Name of its engine.
        like: State dict of the network, for names and shapes; may be on the meta device.
        ema: The moving average in place of the weights themselves.
        dtype: Of the result; buffers keep theirs.

    Raises:
        CheckpointError: If the checkpoint does not hold exactly these tensors.
    """
    saved, unread = _open(folder), MAPPED_BYTES
    known, kind = saved.parameters(network), "ema" if ema else "master"
    unknown = sorted(known - set(like))
    if unknown:
        raise CheckpointError(
            f"{folder} must hold the network {network!r} that config.yaml describes, found "
            f"{len(unknown)} other parameters, such as {unknown[0]}; put the stage's own "
            "config.yaml beside its checkpoints"
        )
    weights = {}
    for name, wanted in tqdm(like.items(), desc=f"{network} ({kind})", unit="tensor", delay=2):
        if unread <= 0:
            saved, unread = _open(folder), MAPPED_BYTES
        unread -= 4 * wanted.numel()
        if name in known:
            whole = Piece(name, 0, wanted.numel(), 0, 0)
            weights[name] = _gather(saved, network, kind, whole, dtype)
        else:
            weights[name] = _buffer(saved, network, name)
        weights[name] = _shaped(weights[name], wanted, name, folder)
    return weights


def _open(folder: Path, *, check: bool = False) -> SavedState:
    entries = read_marker(folder)["ranks"]
    if check:
        check_files(folder, entries)
    return SavedState(folder, [entry["file"] for entry in entries])


def _gather(saved: SavedState, network: str, kind: str, piece: Piece, dtype: torch.dtype) -> Tensor:
    """All elements of a parameter, flat; an empty tensor if not all of them are there."""
    target = torch.empty(piece.length, dtype=dtype)
    found = saved.fill(target, network, kind, piece)
    return target if found == piece.length else target[:0]


def _buffer(saved: SavedState, network: str, name: str) -> Tensor:
    found = saved.find(f"engine.{network}.buffer.{name}")
    # A copy: what is read stays part of the mapped file.
    return torch.empty(0) if found is None else found.clone()


def _shaped(found: Tensor, wanted: Tensor, name: str, folder: Path) -> Tensor:
    if found.numel() != wanted.numel():
        raise CheckpointError(
            f"{folder} must hold {name} of shape {list(wanted.shape)}, found {found.numel()} of "
            f"its {wanted.numel()} elements; what a stage does not train is not in its checkpoints"
        )
    return found.view(wanted.shape)
