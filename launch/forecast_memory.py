"""Memory of one rank in a stage: on the device, on the host, and what the stage leaves on disk.

Parameters, gradients, optimiser states and the cache are exact; what a pass takes comes from
`launch/forecast_activations.py`, put together in `launch/forecast_moments.py`, and is an estimate.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch
from torch import nn

from configs.load import to_dict
from configs.schema import RunConfig
from data.targets import STORED
from launch.forecast_activations import Geometry, PassMemory, kv_types, pass_memory
from launch.forecast_moments import MOMENTS, Moment
from launch.forecast_passes import (
    Pass,
    stage_params,
)
from models.salience import PARTS
from train.shares import FLOAT, Share, frozen_share, trained_share
from train.stage import Stage, rank_share


@dataclass
class StageMemory:
    """What a stage takes.

    Attributes:
        shares: Of each network, by name.
        moment: When the device is fullest.
        moments: All that were compared.
        copies: Weights that autocast keeps in bfloat16 until the step ends.
        host_start: On the host of each rank while the stage is built.
        host: On the host of each rank while it trains.
        disk: Written by all ranks together.
    """

    shares: dict[str, Share]
    moment: Moment
    moments: list[Moment]
    copies: int
    host_start: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    disk: dict[str, int] = field(default_factory=dict)

    def device(self, trained: Iterable[str]) -> dict[str, int]:
        """Bytes on the device at the fullest moment, by what they are for."""
        names = list(trained)
        shares = [self.shares[name] for name in names]
        frozen = [share for name, share in self.shares.items() if name not in names]
        kept = [share for share in shares if not share.is_offloaded]
        found = {
            "parameters": sum(share.parameters for share in shares),
            "masters": sum(share.masters for share in kept),
            "moments": sum(share.moments for share in kept),
            "averages": sum(share.averages for share in kept),
            "gradients": sum(share.gradients for share in shares),
            "frozen": sum(share.parameters for share in frozen),
            "buffers": sum(share.buffers for share in (*shares, *frozen)),
            "bf16 copies": self.copies,
        }
        return found | self.moment.parts


class StageMeter:
    """Works out the memory of one stage.

    Args:
        config: Of the run, checked.
        name: Of the stage.
        world: Ranks.
    """

    def __init__(self, config: RunConfig, name: str, world: int) -> None:
        from launch.build import stage_type, token_grid

        self.config, self.name, self.world = config, name, world
        self.stage, self.params = config.stages[name], stage_params(config, name)
        self.kind: type[Stage] = stage_type(self.stage.kind)
        self.trained, self.frozen = list(self.kind.network_sources), list(self.kind.frozen_sources)
        self.share = rank_share(self.stage, world)
        self.samples = self.stage.micro_batch or self.share
        model = config.model
        self.width, self.layers = model.num_heads * model.head_dim, model.num_layers
        self.tokens = self.stage.frames * config.frame_seq_len
        sizes = {key: value for key, value in to_dict(model).items() if key != "frames_per_block"}
        sizes["patch_size"] = tuple(model.patch_size)
        grid = token_grid(config)
        self.geometry = Geometry(
            network=tuple(sorted(sizes.items())),
            block=model.frames_per_block,
            size=(grid[0] * model.patch_size[1], grid[1] * model.patch_size[2]),
            rows=config.text.length,
            is_bf16=config.trainer.precision == "bf16",
        )

    def measure(self) -> StageMemory:
        """All of it."""
        shares = {
            name: trained_share(
                network_sizes(self.config, name),
                self.config.trainer,
                self.world,
                has_average=self.stage.optimizers[name].ema > 0,
            )
            for name in self.trained
        }
        for name in self.frozen:
            sizes = network_sizes(self.config, name)
            shares[name] = frozen_share(sizes, self.config.trainer, self.world)
        moments = MOMENTS[self.stage.kind](self)
        return StageMemory(
            shares=shares,
            moment=max(moments, key=lambda moment: moment.total),
            moments=moments,
            copies=self._copies(),
            host_start=self._host_start(),
            host=self._host(shares),
            disk=self._disk(),
        )

    def passed(self, found: Pass) -> PassMemory:
        """Memory of a pass over the samples of a micro-batch."""
        recomputes = self.config.trainer.activation_checkpointing and found.with_grad
        one = pass_memory(
            self.geometry, replace(found, network="", scored=0, count=1), recomputes=recomputes
        )
        b = self.samples
        return PassMemory(b * one.kept, b * one.forward, b * one.backward)

    def _copies(self) -> int:
        return sum(self.copied_bytes() for name in self.trained if name != "head")

    def copied_bytes(self) -> int:
        """Bytes of a transformer's weights in bfloat16, of those that products read."""
        if not self.geometry.is_bf16:
            return 0
        return torch.bfloat16.itemsize * sum(network_sizes(self.config, PRODUCTS))

    def cache_bytes(self, tokens: int, features: int) -> int:
        """Bytes of a cache that holds `tokens` tokens in every layer; exact."""
        keys, values = kv_types(self.geometry.is_bf16)
        numbers = self.width * (keys.itemsize + values.itemsize)
        places = 3 * torch.int64.itemsize + FLOAT * features
        return self.samples * self.layers * tokens * (numbers + places)

    def rotated_bytes(self, tokens: int) -> int:
        """Bytes of the keys of all layers as a block reads them."""
        keys, _ = kv_types(self.geometry.is_bf16)
        return self.samples * self.layers * tokens * self.width * keys.itemsize

    def bytes_until_summed(self) -> int:
        """Gradients of weights that several passes share, which wait until all have been summed."""
        if self.geometry.is_bf16:
            return self.copied_bytes()
        trainer = self.config.trainer
        is_split = trainer.strategy == "deepspeed" and trainer.zero_stage >= 2
        return FLOAT * sum(network_sizes(self.config, "student")) if is_split else 0

    def _host_start(self) -> dict[str, int]:
        """Every rank builds all networks as wholes, and reads its inputs twice."""
        networks = [*self.trained, *self.frozen]
        whole = sum(FLOAT * sum(network_sizes(self.config, name)) for name in networks)
        return {"networks as wholes": whole, "inputs, read twice": 2 * self._input_bytes()}

    def _input_bytes(self) -> int:
        from launch.build import stage_type

        total = 0
        for origin in self.stage.inputs.values():
            stems = ["transformer"]
            if origin in self.config.stages:
                stems = list(stage_type(self.config.stages[origin].kind).exported)
            total += sum(FLOAT * sum(network_sizes(self.config, stem)) for stem in stems)
        return total

    def _host(self, shares: dict[str, Share]) -> dict[str, int]:
        trained = [shares[name] for name in self.trained]
        copies = 2 if self.kind.restarts_at_snapshot else 1
        states = sum(share.saved for share in trained)
        found = {
            "inputs": self._input_bytes(),
            "checkpoint copy": copies * states,
            "offloaded": sum(share.host for share in trained),
        }
        if self.stage.kind == "salience":
            found["gathered targets"] = FLOAT * self.gathered_values()
        if self.stage.kind == "causal" and self.params.evict:
            found["eviction masks"] = (8 + 2 * self.samples) * self.tokens**2  # int64, bool
        return found

    def gathered_values(self) -> int:
        """Targets of all ranks from which statistics are made."""
        clips = self.params.statistics_steps * self.stage.batch
        return clips * self.layers * self.tokens * len(PARTS)

    def _disk(self) -> dict[str, int]:
        stage = self.stage
        kept = stage.keep + 1 + (stage.steps // stage.keep_every if stage.keep_every else 0)
        kept = min(kept, stage.steps // stage.checkpoint_every + 1)
        found = {f"{kept} checkpoints": kept * self.checkpoint_bytes()}
        stems = self.kind.exported
        found["export"] = sum(FLOAT * sum(network_sizes(self.config, stem)) for stem in stems)
        if self.stage.kind == "salience" and self.params.targets == STORED:
            found["targets per clip"] = 2 * self.layers * self.tokens * len(PARTS)
        return found

    def checkpoint_bytes(self) -> int:
        """Of the files of all ranks, but for headers and the small state of a stage; exact."""
        total = 0
        for name in self.trained:
            sizes = network_sizes(self.config, name)
            has_average = self.stage.optimizers[name].ema > 0
            share = trained_share(sizes, self.config.trainer, self.world, has_average=has_average)
            total += share.saved * (self.world if share.masters else 1)
        return total


PRODUCTS = "products"
"""In place of a network's name: only what linear layers and convolutions hold of a transformer."""


def network_sizes(config: RunConfig, name: str) -> tuple[int, ...]:
    """Elements of each parameter of a network, by its name in a stage or stem in an export."""
    from launch.build import network_config

    kind = name if name in ("head", PRODUCTS) else "transformer"
    return _sizes(json.dumps(network_config(config)), kind)


@lru_cache(maxsize=64)
def _sizes(config: str, kind: str) -> tuple[int, ...]:
    from launch.student import head_from_config, transformer_from_config

    sizes = json.loads(config)
    with torch.device("meta"):
        network: nn.Module
        if kind == "head":
            network = head_from_config(sizes)
        else:
            network = transformer_from_config(sizes["model"])
    if kind == PRODUCTS:
        products = [m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv3d))]
        return tuple(p.numel() for product in products for p in product.parameters())
    return tuple(parameter.numel() for parameter in network.parameters())


def data_bytes(config: RunConfig) -> dict[str, int]:
    """Bytes of a clip in the shards of latents, captions at their longest, tar headers left out."""
    frames = config.codec.latent_frames(config.source.frames)
    cells = math.prod(pixels // config.codec.stride for pixels in config.source.size)
    return {
        "latents": FLOAT * frames * config.codec.channels * cells,
        "text": FLOAT * config.text.length * config.text.dim,
    }
