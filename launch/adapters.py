"""Adapters of trained networks, and the forms in which other programs take them.

    diffusers-lora  pytorch_lora_weights.safetensors, which diffusers' pipelines load beside Wan2.1
    longlive-lora   lora.pt: {generator_lora, critic_lora}, with the names that peft gives to
                    LongLive's networks; derived from peft, compared with no file of LongLive

In both, what the factors add counts once: alpha / rank is folded into the second factor, since not
every reader of these forms looks for an alpha.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from launch.export import ADAPTERS, Export
from launch.layouts import save_torch
from models.wan_names import diffusers_name, native_name
from train.consolidate import consolidate
from train.lora import adapter_tensors
from train.stage import Stage

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
DIFFUSERS_PREFIX = "transformer."
LONGLIVE_FILE = "lora.pt"
LONGLIVE_PREFIX = "base_model.model."
LONGLIVE = {"transformer": "generator_lora", "critic": "critic_lora"}
"""File stem of a network in our exports to the key of its adapter."""

Adapters = Mapping[str, Mapping[str, Tensor]]
"""By the file stem of their network: `LAYER.lora_A.weight` and `LAYER.lora_B.weight`."""


@dataclass(frozen=True)
class AdapterLayout:
    """One form of adapters.

    Attributes:
        title: For people.
        write: Adapters, alpha / rank folded in, to files in a folder that exists.
        read: From that folder back.
        networks: File stems of the networks whose adapters it holds, if they have some.
        roles: What may be exported so.
    """

    title: str
    write: Callable[[Path, Adapters], None]
    read: Callable[[Path], Adapters]
    networks: tuple[str, ...]
    roles: tuple[str, ...] = ("student",)


def fold_scale(adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The adapter whose factors alone add what these add times `scale`."""
    return {
        name: tensor * scale if ".lora_B." in name else tensor for name, tensor in adapter.items()
    }


def adapters_of_export(export: Export) -> Adapters | None:
    """What an export holds, alpha / rank folded in; None if it has no adapter of a student."""
    if ADAPTERS["transformer"] not in export.weights:
        return None
    scale = export.manifest["lora"]["alpha"] / export.manifest["lora"]["rank"]
    return {
        network: fold_scale(export.tensors(stem), scale)
        for network, stem in ADAPTERS.items()
        if stem in export.weights
    }


def adapters_of_checkpoint(folder: Path, stage: Stage, *, averaged: Collection[str]) -> Adapters:
    """The same from a checkpoint.

    Args:
        folder: Of the checkpoint.
        stage: That wrote it; its networks may be on the meta device.
        averaged: Names of networks whose moving average is wanted.
    """
    assert stage.config.lora is not None
    scale = stage.config.lora.scale
    return {
        stem: fold_scale(trained_factors(folder, stage, name, ema=name in averaged), scale)
        for stem, name in stage.exported.items()
        if is_adapted(stage, name)
    }


def is_adapted(stage: Stage, name: str) -> bool:
    """Whether the stage trains an adapter of this network, and not the whole."""
    return stage.config.lora is not None and name in stage.config.lora.networks


def trained_factors(folder: Path, stage: Stage, name: str, *, ema: bool) -> dict[str, Tensor]:
    """The factors of an adapted network in a checkpoint, as they were trained."""
    named = stage.networks[name].named_parameters()
    like = {key: parameter for key, parameter in named if parameter.requires_grad}
    return adapter_tensors(consolidate(folder, name, like, ema=ema))


def _write_diffusers(folder: Path, adapters: Adapters) -> None:
    content = {
        DIFFUSERS_PREFIX + _rename(name, diffusers_name): tensor.contiguous()
        for name, tensor in adapters["transformer"].items()
    }
    safetensors.torch.save_file(content, folder / DIFFUSERS_FILE, {"format": "pt"})


def _read_diffusers(folder: Path) -> Adapters:
    content = safetensors.torch.load_file(folder / DIFFUSERS_FILE)
    named = {
        _rename(name.removeprefix(DIFFUSERS_PREFIX), native_name): tensor
        for name, tensor in content.items()
    }
    return {"transformer": named}


def _rename(name: str, translate: Callable[[str], str]) -> str:
    """The name of a factor with that of its layer translated."""
    layer, factor, leaf = name.rsplit(".", 2)
    return f"{translate(layer)}.{factor}.{leaf}"


def _write_longlive(folder: Path, adapters: Adapters) -> None:
    content = {
        LONGLIVE[network]: {LONGLIVE_PREFIX + name: tensor for name, tensor in own.items()}
        for network, own in adapters.items()
    }
    save_torch(content, folder / LONGLIVE_FILE)


def _read_longlive(folder: Path) -> Adapters:
    content = torch.load(folder / LONGLIVE_FILE, weights_only=True, mmap=True)
    return {
        network: {name.removeprefix(LONGLIVE_PREFIX): t for name, t in content[key].items()}
        for network, key in LONGLIVE.items()
        if key in content
    }


ADAPTER_LAYOUTS: dict[str, AdapterLayout] = {
    "diffusers-lora": AdapterLayout(
        "a LoRA adapter for diffusers", _write_diffusers, _read_diffusers, ("transformer",)
    ),
    "longlive-lora": AdapterLayout(
        "a LoRA adapter with LongLive's names", _write_longlive, _read_longlive, tuple(LONGLIVE)
    ),
}
