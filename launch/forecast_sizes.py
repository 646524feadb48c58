"""How many elements networks and clips have, from the code that builds them, without memory."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

import torch
from torch import nn

from configs.schema import LoraConfig, RunConfig
from launch.geometry import network_config
from launch.student import head_from_config, outline
from train.lora import target_layers
from train.shares import FLOAT


@dataclass(frozen=True)
class Sizes:
    """Elements of each parameter of a network, in the network's order.

    Attributes:
        trained: That a stage trains; all of them without an adapter.
        frozen: What lies below an adapter.
    """

    trained: tuple[int, ...]
    frozen: tuple[int, ...] = ()

    @property
    def whole(self) -> tuple[int, ...]:
        """All of them."""
        return self.trained + self.frozen


def network_sizes(config: RunConfig, name: str, lora: LoraConfig | None = None) -> Sizes:
    """Of a network, by its name in a stage or stem in an export.

    Args:
        config: Of the run.
        name: Of the network.
        lora: Of its adapter, if it gets one.
    """
    kind = "head" if name == "head" else "transformer"
    adapter = None if lora is None else (lora.rank, tuple(lora.targets))
    return _sizes(json.dumps(network_config(config)), kind, adapter)


@lru_cache(maxsize=64)
def _sizes(config: str, kind: str, adapter: tuple[int, tuple[str, ...]] | None) -> Sizes:
    sizes = json.loads(config)
    if kind == "head":
        with torch.device("meta"):
            network: nn.Module = head_from_config(sizes)
    else:
        network = outline(sizes["model"])
    whole = tuple(parameter.numel() for parameter in network.parameters())
    if adapter is None:
        return Sizes(trained=whole)
    rank, targets = adapter
    names = target_layers(network, targets, key="lora")
    shapes = (network.get_parameter(f"{name}.weight").shape for name in names)
    # Of its two factors, the one that reads inputs comes first.
    factors = ((rank * inputs, rank * outputs) for outputs, inputs in shapes)
    return Sizes(trained=tuple(chain.from_iterable(factors)), frozen=whole)


def clip_count(config: RunConfig) -> int:
    """Clips that `encode` cuts from the world's videos.

    Of videos of one's own neither number nor lengths are known: 1000.
    """
    source = config.source
    if source.kind != "world":
        return 1000
    last = source.world.frames - 1 - (source.frames - 1) * source.every
    return source.world.clips * (1 + last // source.stride if source.stride else 1)


def data_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of a clip in the shards of latents, captions at their longest, tar headers left out."""
    frames = config.codec.latent_frames(config.source.frames)
    cells = math.prod(pixels // config.codec.stride for pixels in config.source.size)
    return {
        "latents": FLOAT * frames * config.codec.channels * cells,
        "text": FLOAT * config.text.length * config.text.dim,
    }
