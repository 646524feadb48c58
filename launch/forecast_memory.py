"""Memory of one rank in a stage: on the device, on the host, and what the stage leaves on disk.

Parameters, gradients, optimiser states and the cache are exact; what a pass takes comes from
`launch/forecast_activations.py`, put together in `launch/forecast_moments.py`, and is an estimate.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from configs.schema import LoraConfig, ModelConfig, RunConfig
from data.targets import STORED
from launch.forecast_activations import Geometry, PassMemory, pass_memory
from launch.forecast_meta import kv_types
from launch.forecast_moments import MOMENTS, Moment
from launch.forecast_networks import (
    Like,
    exported_bytes,
    mapped_bytes,
    stage_models,
    with_model,
)
from launch.forecast_passes import Pass, stage_params
from launch.forecast_sizes import Sizes, network_sizes
from launch.geometry import token_grid
from models.salience import PARTS
from train.kind import StageKind, rank_share
from train.kinds import stage_kind
from train.shares import FLOAT, Share, frozen_share, trained_share


@dataclass
class StageMemory:
    """What a stage takes.

    Attributes:
        shares: Of each network, by name.
        moment: When the device is fullest.
        moments: All that were compared.
        start: On the device at the fullest moment before the first step, when one network after the
            other is put there whole and then shared out.
        host_start: On the host of each rank while the stage is built.
        host: On the host of each rank while it trains.
        host_end: On the host of rank 0 when the stage is exported.
        mapped: Of each node: files of inputs in the page cache, which its ranks share and which the
            kernel may drop.
        disk: Written by all ranks together.
    """

    shares: dict[str, Share]
    moment: Moment
    moments: list[Moment]
    start: int = 0
    host_start: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)
    host_end: dict[str, int] = field(default_factory=dict)
    mapped: int = 0
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
        }
        return found | self.moment.parts


class StageMeter:
    """Works out the memory of one stage.

    Args:
        config: Of the run, checked.
        name: Of the stage.
        world: Ranks.
        like: Models of inputs that are not there, by path.

    Attributes:
        models: Geometry of every network of the stage.
    """

    def __init__(self, config: RunConfig, name: str, world: int, like: Like | None = None) -> None:
        self.config, self.name, self.world = config, name, world
        self.stage, self.params = config.stages[name], stage_params(config, name)
        self.kind: type[StageKind] = stage_kind(self.stage.kind)
        self.trained, self.frozen = list(self.kind.network_sources), list(self.kind.frozen_sources)
        self.share = rank_share(self.stage, world)
        self.samples = self.stage.micro_batch or self.share
        self.like = like or {}
        self.models = stage_models(config, name, self.like)
        self._configs = {key: with_model(config, model) for key, model in self.models.items()}
        model = config.model
        self.width, self.layers = model.num_heads * model.head_dim, model.num_layers
        self.tokens = self.stage.frames * config.frame_seq_len
        grid = token_grid(config)
        self.geometry = Geometry(
            network=_arguments(model),
            block=model.frames_per_block,
            size=(grid[0] * model.patch_size[1], grid[1] * model.patch_size[2]),
            rows=config.text.length,
            is_bf16=config.trainer.precision == "bf16",
            samples=self.samples,
        )

    def lora(self, network: str) -> LoraConfig | None:
        """The adapter that is trained in place of a network, if there is one."""
        found = self.stage.lora
        return found if found is not None and network in found.networks else None

    def sizes(self, network: str) -> Sizes:
        """Elements of the parameters of a network of the stage."""
        return network_sizes(self.config_of(network), network, self.lora(network))

    def config_of(self, network: str) -> RunConfig:
        """The config of the run, with the geometry of this network for all."""
        return self._configs[network]

    def measure(self) -> StageMemory:
        """All of it."""
        shares = self._shares()
        moments = MOMENTS[self.stage.kind](self)
        return StageMemory(
            shares=shares,
            moment=max(moments, key=lambda moment: moment.total),
            moments=moments,
            start=self._start(shares),
            host_start=self._host_start(),
            host=self._host(shares),
            host_end=self._exported(),
            mapped=mapped_bytes(self.config, self.name, self.like),
            disk=self._disk(),
        )

    def _shares(self) -> dict[str, Share]:
        """Of every network; of one with an adapter, what lies below it has a share of its own."""
        trainer, shares = self.config.trainer, {}
        for name in self.trained:
            sizes, has_average = self.sizes(name), self.stage.optimizers[name].ema > 0
            shares[name] = trained_share(
                sizes.trained, trainer, self.world, has_average=has_average
            )
            if sizes.frozen:
                shares[below(name)] = frozen_share(
                    sizes.frozen, trainer, self.world, adapter=sizes.trained
                )
        for name in self.frozen:
            shares[name] = frozen_share(self.sizes(name).whole, trainer, self.world)
        return shares

    def _start(self, shares: dict[str, Share]) -> int:
        """See `train.memory.settle` and `train.strategy.DeepSpeedEngines.setup`."""
        held = most = 0
        for name in (*self.trained, *self.frozen):
            own = [shares[key] for key in (name, below(name)) if key in shares]
            parts = sum(share.parameters for share in own)
            whole = FLOAT * sum(self.sizes(name).whole)
            most = max(most, held + whole + (parts if parts < whole else 0))
            kept = [share for share in own if not share.is_offloaded]
            held += parts + sum(share.masters + share.averages for share in kept)
        return most

    def passed(self, found: Pass) -> PassMemory:
        """Memory of a pass over the samples of a micro-batch."""
        lora, model = self.lora(found.network), self.models[found.network]
        geometry = replace(self.geometry, network=_arguments(model))
        if lora is not None:
            geometry = replace(geometry, adapter=(lora.rank, tuple(lora.targets)))
        recomputes = self.config.trainer.activation_checkpointing and found.with_grad
        bare = replace(found, network="", scored=0, count=1)
        return pass_memory(geometry, bare, recomputes=recomputes)

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
        """Gradients of weights that several passes share, which wait until all have been summed.

        Autograd hands a parameter its gradient when the last of them is there.
        """
        trainer = self.config.trainer
        is_split = trainer.strategy == "deepspeed" and trainer.zero_stage >= 2
        waits = is_split or self.share > self.samples  # else they become the gradients
        return FLOAT * sum(self.sizes("student").trained) if waits else 0

    def _host_start(self) -> dict[str, int]:
        """Networks from exports are mapped, and only those that start fresh are made in memory."""
        fresh = [name for name in self.trained if not self.kind.network_sources[name]]
        return {"fresh networks": FLOAT * sum(sum(self.sizes(name).whole) for name in fresh)}

    def _host(self, shares: dict[str, Share]) -> dict[str, int]:
        trained = [shares[name] for name in self.trained]
        copies = 2 if self.kind.restarts_at_snapshot else 1
        states = sum(share.saved for share in trained)
        found = {
            "checkpoint copy": copies * states,
            "offloaded": sum(share.host for share in trained),
        }
        if self.stage.kind == "causal" and self.params.evict:
            found["eviction masks"] = (8 + 2 * self.samples) * self.tokens**2  # int64, bool
        return found

    def _exported(self) -> dict[str, int]:
        """Files of the export; those of networks in training are made in the memory of rank 0."""
        found = {}
        for stem, name in self.kind.exported.items():
            sizes = self.sizes(name)
            if name in self.trained:
                found[stem] = FLOAT * sum(sizes.whole)
        return found

    def _disk(self) -> dict[str, int]:
        stage = self.stage
        kept = stage.keep + 1 + (stage.steps // stage.keep_every if stage.keep_every else 0)
        kept = min(kept, stage.steps // stage.checkpoint_every + 1)
        found = {f"{kept} checkpoints": kept * self.checkpoint_bytes()}
        found["export"] = exported_bytes(self.config, self.name, self.like)
        if self.stage.kind == "salience" and self.params.targets == STORED:
            found["targets per clip"] = 2 * self.layers * self.tokens * len(PARTS)
        return found

    def checkpoint_bytes(self) -> int:
        """Of the files of all ranks, but for headers and the small state of a stage; exact."""
        shares = self._shares()
        return sum(
            shares[name].saved * (self.world if shares[name].masters else 1)
            for name in self.trained
        )


def _arguments(model: ModelConfig) -> tuple[tuple[str, Any], ...]:
    """Of `VideoTransformer`."""
    sizes = {key: value for key, value in vars(model).items() if key != "frames_per_block"}
    return tuple(sorted((sizes | {"patch_size": tuple(model.patch_size)}).items()))


def below(network: str) -> str:
    """What the frozen weights below the adapter of a network are called among the shares."""
    return f"{network} below its adapter"
