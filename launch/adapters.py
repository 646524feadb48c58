"""The adapter of a trained student, in the forms in which other programs take adapters.

    diffusers-lora  pytorch_lora_weights.safetensors, which diffusers' pipelines load beside Wan2.1
    longlive-lora   lora.pt: {generator_lora, critic_lora}, with the names that peft gives to
                    LongLive's networks; derived from peft, compared with no file of LongLive

In both, what the factors add counts once: alpha / rank is folded into the second factor, since not
every reader of these forms looks for an alpha.
"""

from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from configs.schema import LoraConfig
from launch.export import ADAPTERS, Export, ExportError
from models.wan_names import diffusers_name

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
LONGLIVE_FILE = "lora.pt"
LONGLIVE = {"transformer": "generator_lora", "critic": "critic_lora"}
"""File stem of a network to the key of its adapter."""

Adapters = Mapping[str, Mapping[str, Tensor]]


def read_adapters(export: Export) -> dict[str, dict[str, Tensor]]:
    """The adapters of an export by the file stem of their network, alpha / rank folded in.

    Raises:
        ExportError: If its stage has trained the student as a whole.
    """
    found = export.manifest.get("lora")
    if found is None or ADAPTERS["transformer"] not in export.weights:
        raise ExportError(
            f"{str(export.folder)!r} must hold the adapter of a student, found whole networks of "
            f"stage {export.manifest['stage']!r}; train with stages.NAME.lora, or choose a format "
            "for whole networks"
        )
    scale = LoraConfig(**found).scale
    return {
        network: fold_scale(export.weights[stem], scale)
        for network, stem in ADAPTERS.items()
        if stem in export.weights
    }


def fold_scale(adapter: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The adapter whose factors alone add what these add times `scale`."""
    return {
        name: tensor * scale if ".lora_B." in name else tensor for name, tensor in adapter.items()
    }


def diffusers_adapter(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter under diffusers' names: `transformer.blocks.0.attn1.to_q.lora_A.weight`."""
    named = {}
    for name, tensor in adapter.items():
        layer, factor, leaf = name.rsplit(".", 2)
        named[f"transformer.{diffusers_name(layer)}.{factor}.{leaf}"] = tensor
    return named


def longlive_adapter(adapter: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter under the names of a network that peft has wrapped."""
    return {f"base_model.model.{name}": tensor for name, tensor in adapter.items()}


def write_diffusers_adapter(folder: Path, adapters: Adapters) -> None:
    """Write `DIFFUSERS_FILE`, the student's adapter, into a folder that exists."""
    content = diffusers_adapter(adapters["transformer"])
    contiguous = {name: tensor.contiguous() for name, tensor in content.items()}
    safetensors.torch.save_file(contiguous, folder / DIFFUSERS_FILE, {"format": "pt"})


def write_longlive_adapter(folder: Path, adapters: Adapters) -> None:
    """Write `LONGLIVE_FILE`, all adapters, into a folder that exists."""
    content = {LONGLIVE[network]: longlive_adapter(own) for network, own in adapters.items()}
    with (folder / LONGLIVE_FILE).open("wb") as file:  # a file of Python's says why it fails
        torch.save(content, file)
