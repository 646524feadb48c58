"""A small student and a small teacher as stages export them, and a disk that is too small."""

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from launch.export import write_export
from models.salience import SalienceHead
from tests.models.small import SIZES, random_transformer

MODEL = SIZES | {
    "patch_size": [1, 2, 2],
    "in_channels": 16,
    "out_channels": 16,
    "rope_theta": 10000.0,
    "eps": 1e-6,
    "frames_per_block": 3,
}
POLICY = {
    "name": "salience",
    "params": {"age_weight": 0.07, "weights": [1.0, 0.5, 0.0]},
    "budget_tokens": 96,
    "sink_frames": 1,
    "recent_frames": 3,
}


def manifest(role: str, **changes: Any) -> dict[str, Any]:
    """What a stage says of its export; `changes` replace entries."""
    made = {
        "role": role,
        "stage": "tuned" if role == "student" else "teacher",
        "kind": "streaming" if role == "student" else "teacher",
        "train_seed": 5,
        "steps": 12,
        "sampler": {"sigmas": [1.0, 0.75, 0.0], "renoise": True} if role == "student" else None,
        "policy": POLICY if role == "student" else None,
        "weights": "ema" if role == "student" else "raw",
        "parents": {"teacher": "ab" * 32},
        "config_hash": "cd" * 32,
        "config": {
            "model": MODEL,
            "head": {"hidden": 8},
            "head_log": True,
            "head_block_len": 0,
            "grid": [2, 3],
            "codec": {"kind": "patch_dct"},
            "text": {"kind": "words"},
            "size": [32, 48],
            "fps": 8,
            "every": 1,
            "frames": 12,
        },
    }
    return made | changes


def head() -> SalienceHead:
    torch.manual_seed(6)
    made = SalienceHead(num_layers=2, width=24, hidden=8, grid=(2, 3), log=True)
    made.mean.normal_(), made.std.uniform_(1, 2), made.place.normal_()
    return made


def write_student(folder: Path, *, network: nn.Module | None = None, **changes: Any) -> Path:
    """The folder of a stage that has exported a student with its head."""
    transformer = random_transformer(patch_size=(1, 2, 2)) if network is None else network
    weights = {"transformer": transformer.state_dict(), "head": head().state_dict()}
    write_export(folder / "export", weights=weights, manifest=manifest("student", **changes))
    return folder


def write_teacher(folder: Path, **changes: Any) -> Path:
    """The folder of a stage that has exported a teacher."""
    weights = {"transformer": random_transformer(patch_size=(1, 2, 2)).state_dict()}
    write_export(folder / "export", weights=weights, manifest=manifest("teacher", **changes))
    return folder


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file may become larger, as on a disk that is full; this process only."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
