"""The forms in which other programs take a transformer: how each is written and read back.

    diffusers      transformer/config.json, transformer/diffusion_pytorch_model*.safetensors
    safetensors    config.json, diffusion_pytorch_model.safetensors with Wan's own names
    self-forcing   model.pt: {generator: {model.NAME: tensor}, generator_ema: the same}

Reading back is for comparison; `import` reads files from anywhere.
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
from launch.formats import GENERATORS, RAW
from models.wan_config import (
    Geometry,
    diffusers_config,
    native_config,
    read_diffusers_config,
    read_native_config,
)
from models.wan_names import diffusers_name, native_name

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
        write: From a new folder, the geometry and native tensors by set to files in the folder.
        read: From that folder to its geometry, if the form says it, and native tensors by set,
            mapped from the files rather than read.
        holds_sets: Whether it holds raw and averaged weights side by side.
        roles: What may be exported so.
    """

    title: str
    write: Callable[[Path, Geometry, Sets], None]
    read: Callable[[Path], tuple[Geometry | None, dict[str, dict[str, Tensor]]]]
    holds_sets: bool = False
    roles: tuple[str, ...] = ("teacher", "student")


def _write_diffusers(folder: Path, geometry: Geometry, sets: Sets) -> None:
    hub = optional("huggingface_hub")
    (folder / TRANSFORMER).mkdir()
    _write_json(folder / TRANSFORMER / "config.json", diffusers_config(geometry))
    hub.save_torch_state_dict(
        {diffusers_name(name): tensor for name, tensor in _only(sets).items()},
        folder / TRANSFORMER,
        filename_pattern=WEIGHTS + "{suffix}.safetensors",
        max_shard_size=SHARD_SIZE,
    )


def _read_diffusers(folder: Path) -> tuple[Geometry, dict[str, dict[str, Tensor]]]:
    config = json.loads((folder / TRANSFORMER / "config.json").read_text())
    tensors: dict[str, Tensor] = {}
    for file in sorted((folder / TRANSFORMER).glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(file)
    found = {native_name(name): tensor for name, tensor in tensors.items()}
    return read_diffusers_config(config), {RAW: found}


def _write_native(folder: Path, geometry: Geometry, sets: Sets) -> None:
    _write_json(folder / "config.json", native_config(geometry))
    path = folder / f"{WEIGHTS}.safetensors"
    safetensors.torch.save_file(dict(_only(sets)), path, {"format": "pt"})


def _read_native(folder: Path) -> tuple[Geometry, dict[str, dict[str, Tensor]]]:
    config = json.loads((folder / "config.json").read_text())
    tensors = safetensors.torch.load_file(folder / f"{WEIGHTS}.safetensors")
    return read_native_config(config), {RAW: tensors}


def _write_self_forcing(folder: Path, _: Geometry, sets: Sets) -> None:
    content = {
        GENERATORS[kind]: {PREFIX + name: tensor for name, tensor in weights.items()}
        for kind, weights in sets.items()
    }
    with (folder / MODEL).open("wb") as file:  # a file of Python's says why it cannot be written
        torch.save(content, file)


def _read_self_forcing(folder: Path) -> tuple[None, dict[str, dict[str, Tensor]]]:
    content = torch.load(folder / MODEL, weights_only=True, mmap=True)
    kinds = {key: kind for kind, key in GENERATORS.items()}
    return None, {
        kinds[key]: {name.removeprefix(PREFIX): tensor for name, tensor in weights.items()}
        for key, weights in content.items()
    }


LAYOUTS: dict[str, Layout] = {
    "diffusers": Layout("a diffusers folder", _write_diffusers, _read_diffusers),
    "safetensors": Layout("a native Wan folder", _write_native, _read_native),
    "self-forcing": Layout(
        "a Self-Forcing checkpoint",
        _write_self_forcing,
        _read_self_forcing,
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
