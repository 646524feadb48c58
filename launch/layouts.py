"""The forms in which other programs take a transformer, and how each is written.

    diffusers      transformer/config.json, transformer/diffusion_pytorch_model*.safetensors
    safetensors    config.json, diffusion_pytorch_model.safetensors with Wan's own names
    self-forcing   model.pt: {generator: {model.NAME: tensor}, generator_ema: the same}

`launch.formats` reads them.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from configs.errors import UserError
from launch.formats import GENERATORS
from models.wan_config import (
    Geometry,
    diffusers_config,
    native_config,
)
from models.wan_names import diffusers_name

SHARD_SIZE = "10GB"
"""Of the files of diffusers' layout, whose readers put shards together; Wan's and ComfyUI's readers
are given one file of any size."""
TRANSFORMER = "transformer"
WEIGHTS = "diffusion_pytorch_model"
MODEL = "model.pt"
PREFIX = "model."

Sets = Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Layout:
    """One form of weights.

    Attributes:
        title: For people.
        write: From a new folder, the geometry, native tensors by set, and the number of text rows
            that the network was trained with, to files in the folder.
        name: From a set and a native name to the name in the files.
        holds_sets: Whether it holds raw and averaged weights side by side.
        roles: What may be exported so.
    """

    title: str
    write: Callable[[Path, Geometry, Sets, int], None]
    name: Callable[[str, str], str]
    holds_sets: bool = False
    roles: tuple[str, ...] = ("teacher", "student")


def _write_diffusers(folder: Path, geometry: Geometry, sets: Sets, _: int) -> None:
    hub = optional("huggingface_hub")
    (folder / TRANSFORMER).mkdir()
    _write_json(folder / TRANSFORMER / "config.json", diffusers_config(geometry))
    hub.save_torch_state_dict(
        {diffusers_name(name): tensor for name, tensor in _only(sets).items()},
        folder / TRANSFORMER,
        filename_pattern=WEIGHTS + "{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )


def _write_native(folder: Path, geometry: Geometry, sets: Sets, text_len: int) -> None:
    _write_json(folder / "config.json", native_config(geometry, text_len=text_len))
    path = folder / f"{WEIGHTS}.safetensors"
    safetensors.torch.save_file(dict(_only(sets)), path, {"format": "pt"})


def _write_self_forcing(folder: Path, _: Geometry, sets: Sets, __: int) -> None:
    content = {
        GENERATORS[kind]: {PREFIX + name: tensor for name, tensor in weights.items()}
        for kind, weights in sets.items()
    }
    save_torch(content, folder / MODEL)


def save_torch(content: Mapping[str, Any], path: Path) -> None:
    """`torch.save`, of which a full disk is an `OSError` as of any other file."""
    try:
        with path.open("wb") as file:
            torch.save(content, file)
    except RuntimeError as error:
        # torch closes its archive in a file that could not be written, and fails once more.
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


LAYOUTS: dict[str, Layout] = {
    "diffusers": Layout(
        "a diffusers folder", _write_diffusers, lambda _, name: diffusers_name(name)
    ),
    "safetensors": Layout("a native Wan folder", _write_native, lambda _, name: name),
    "self-forcing": Layout(
        "a Self-Forcing checkpoint",
        _write_self_forcing,
        lambda kind, name: f"{GENERATORS[kind]}.{PREFIX}{name}",
        holds_sets=True,
        roles=("student",),
    ),
}


def optional(package: str) -> Any:
    """A module of the optional extra `wan`.

    Raises:
        UserError: If it is not installed.
    """
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"{package!r} must be installed for this, found no {error.name!r}; run "
            "pip install -e '.[wan]'"
        ) from error


def _only(sets: Sets) -> Mapping[str, Tensor]:
    (weights,) = sets.values()
    return weights


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
