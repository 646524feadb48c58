"""LongLive's LoRA: two factors beside linear layers of a base that lies in another file.

The layout of the file is derived from the names that peft gives and from LongLive's code; no
published file has been read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from launch.formats import LORA, unwrapped
from launch.weight_files import WeightsError, read_torch
from models.wan_names import diffusers_name
from train.lora import merge_into

ADAPTER = "adapter"
"""File stem of the factors in an export, whose `transformer` holds them already."""
_NAME = re.compile(r"(.+)\.(lora_[AB])(?:\.\w+)?\.weight")
"""`LAYER.lora_A.weight`, with or without the name of the adapter in it."""


@dataclass(frozen=True)
class Adapter:
    """What a LoRA adds to a network.

    Attributes:
        file: Where it lies.
        factors: Native name of a layer to A [rank, inputs] and B [outputs, rank].
        rank: Of all of them.
    """

    file: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    rank: int

    @property
    def targets(self) -> list[str]:
        """Names of the layers without the number of their block."""
        return sorted({re.sub(r"^blocks\.\d+\.", "", layer) for layer in self.factors})

    def tensors(self) -> dict[str, Tensor]:
        """The factors under names of their own."""
        named: dict[str, Tensor] = {}
        for layer, (first, second) in self.factors.items():
            named |= {f"{layer}.lora_A.weight": first, f"{layer}.lora_B.weight": second}
        return named


def read_adapter(path: Path) -> Adapter:
    """Map the LoRA in a file of LongLive.

    Raises:
        WeightsError: If there is none, or its names or shapes are not those of a LoRA.
    """
    content = read_torch(path)
    named = content.get(LORA)
    if not isinstance(named, dict) or not named:
        raise WeightsError(
            f"--lora {str(path)!r} must hold {LORA!r}, found {sorted(map(str, content))[:10]}; "
            "give the LoRA of LongLive, and the network that it belongs to as SRC"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    bare = unwrapped(
        {str(name).removeprefix("base_model."): value for name, value in named.items()},
        where=str(path),
    )
    for name, value in bare.items():
        found = _NAME.fullmatch(name)
        if found is None or not isinstance(value, Tensor) or value.ndim != 2:
            raise WeightsError(
                f"{LORA!r} in {str(path)!r} must hold matrices LAYER.lora_A.weight and "
                f"LAYER.lora_B.weight, found {name!r}; this layout is unverified, so please report "
                "what the file holds"
            )
        parts.setdefault(found[1], {})[found[2]] = value
    return _paired(path, parts)


def merge(tensors: dict[str, Tensor], adapter: Adapter, *, alpha: float) -> None:
    """Add a LoRA to the weights of its layers: W + alpha / rank * B A, see `merge_into`.

    In place, layer by layer: of a mapped file the pages that are written become memory of this
    process and others stay away, so that there is one copy, and the file stays as it is.

    Args:
        tensors: Of the whole network, by native name; those of the layers change.
        adapter: What is added.
        alpha: What it was trained with.

    Raises:
        WeightsError: If a layer of the LoRA is not in the network or has another shape.
    """
    for layer, (first, second) in adapter.factors.items():
        weight = tensors.get(f"{layer}.weight")
        shape = [second.shape[0], first.shape[1]]
        if weight is None or list(weight.shape) != shape:
            found = "no such layer" if weight is None else str(list(weight.shape))
            raise WeightsError(
                f"{str(adapter.file)!r} must belong to the network it is merged into, but its "
                f"{layer!r} is for {shape}, found {found}; give the base it was trained on"
            )
    factors = adapter.tensors()
    for layer in adapter.factors:
        name, parts = f"{layer}.weight", (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight")
        merged = {name: tensors[name]}
        merge_into(merged, {part: factors[part] for part in parts}, scale=alpha / adapter.rank)
        with torch.no_grad():  # the tensors of a file may be parameters
            tensors[name].copy_(merged[name])


def _paired(path: Path, parts: Mapping[str, Mapping[str, Tensor]]) -> Adapter:
    factors = {}
    for layer, found in sorted(parts.items()):
        try:
            diffusers_name(layer)
        except ValueError as error:
            raise WeightsError(f"{str(path)!r}: {error}") from error
        if set(found) != {"lora_A", "lora_B"}:
            raise WeightsError(
                f"{str(path)!r} must hold lora_A and lora_B of {layer!r}, found only "
                f"{sorted(found)}; take a whole file"
            )
        factors[layer] = (found["lora_A"], found["lora_B"])
    ranks = {size for pair in factors.values() for size in (pair[0].shape[0], pair[1].shape[1])}
    if len(ranks) != 1:
        raise WeightsError(
            f"{str(path)!r} must have one rank in all layers, found {sorted(ranks)}; take another "
            "file"
        )
    return Adapter(path, factors, ranks.pop())
