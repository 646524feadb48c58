"""Which settings make a stage smaller that does not fit, and how much smaller."""

import dataclasses
import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any, NamedTuple

from configs.errors import ConfigError
from configs.schema import LoraConfig, RunConfig
from launch.forecast_memory import StageMeter
from launch.forecast_networks import Like
from launch.plan import check_stages
from train.hardware import MEMORY_GB
from train.kinds import stage_kind

USABLE = 0.92
"""Share of a GPU's memory that tensors get: the rest is for CUDA, NCCL and gaps between tensors."""


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The machines that a run is planned for.

    Attributes:
        gpu: Name of the device, a key of `PEAK_FLOPS`.
        nodes: Of them.
        gpus_per_node: Ranks of a node.
        efficiency: Share of the device's peak that training is assumed to reach.
    """

    gpu: str
    nodes: int
    gpus_per_node: int
    efficiency: float

    @property
    def ranks(self) -> int:
        """Number of processes."""
        return self.nodes * self.gpus_per_node

    @property
    def usable_bytes(self) -> int:
        """Memory for tensors on each device."""
        return int(USABLE * MEMORY_GB[self.gpu] * 1e9)


@dataclasses.dataclass
class Knob:
    """A setting that has been turned, and what it makes of a stage.

    Attributes:
        setting: As an override, or words.
        device_bytes: On the fullest device.
        fits: Whether that is no more than a device has.
    """

    setting: str
    device_bytes: int
    fits: bool


Plan = tuple[RunConfig, Cluster]
SMALLER = {"budgets": "tokens", "budget_tokens": "tokens", "chunk_frames": "frames"}
"""Settings of stages that may be lower by a block, and what they count."""


def find_knobs(config: RunConfig, name: str, cluster: Cluster, like: Like) -> list[Knob]:
    """What single settings would do; if none is enough, the best of them together."""
    plan, labels, used, least = (config, cluster), [], set(), math.inf
    turned = [_turned(turn, name, like) for turn in _turns(plan, name)]
    while not any(knob.fits for knob in turned):
        options = [
            (_turned(turn, name, like), turn) for turn in _turns(plan, name) if turn.key not in used
        ]
        if not options:
            break
        best, turn = min(options, key=lambda option: option[0].device_bytes)
        if best.device_bytes >= least:
            break
        least = best.device_bytes
        plan = turn.plan
        used.add(turn.key)
        labels.append(best.setting)
        if len(labels) > 1:
            turned.append(Knob(" ".join(labels), best.device_bytes, best.fits))
    return turned


def _turned(turn: "Turn", name: str, like: Like) -> Knob:
    config, cluster = turn.plan
    meter = StageMeter(config, name, cluster.ranks, like)
    size = sum(meter.measure().device(meter.trained).values())
    return Knob(turn.label, size, size <= cluster.usable_bytes)


class Turn(NamedTuple):
    """A plan with one setting changed."""

    key: str
    label: str
    plan: Plan


def _turns(plan: Plan, name: str) -> Iterator[Turn]:
    """Settings that can lower the memory of a stage, each turned alone."""
    config, cluster = plan
    wider = dataclasses.replace(cluster, nodes=2 * cluster.nodes)
    wanted = [Turn("nodes", f"--nodes {wider.nodes}", (config, wider))]
    for key, shown, changed in _settings(config, name):
        wanted.append(Turn(key, f"{key}={shown}".replace(" ", ""), (changed, cluster)))
    for turn in wanted:
        try:
            check_stages(turn.plan[0], ranks=turn.plan[1].ranks)
        except ConfigError:
            continue  # nothing that this plan could have
        yield turn


def _settings(config: RunConfig, name: str) -> Iterator[tuple[str, Any, RunConfig]]:
    """Key, value as text, and the config with it; where that makes a difference."""
    stage, trainer, own = config.stages[name], config.trainer, f"stages.{name}"
    block = config.model.frames_per_block
    tokens = block * config.frame_seq_len
    if not trainer.activation_checkpointing:
        yield (
            "trainer.activation_checkpointing",
            "true",
            with_recomputation(config, recomputes=True),
        )
    if trainer.strategy == "deepspeed" and trainer.zero_stage > 0:
        yield from _zero_settings(config)
    if stage.micro_batch != 1:
        yield f"{own}.micro_batch", "1", _staged(config, name, micro_batch=1)
    if stage.lora is None and stage_kind(stage.kind).takes_lora and find_spec("peft"):
        lora = LoraConfig()
        yield f"{own}.lora.rank", lora.rank, _staged(config, name, lora=lora)
    for key, less in SMALLER.items():
        if key in stage.params:
            found, unit = stage.params[key], tokens if less == "tokens" else block
            lower = [one - unit for one in found] if isinstance(found, list) else found - unit
            changed = _staged(config, name, params=stage.params | {key: lower})
            yield f"{own}.params.{key}", str(lower), changed
    frames = stage.frames - block
    if frames > 0:
        yield f"{own}.frames", str(frames), _staged(config, name, frames=frames)


def _zero_settings(config: RunConfig) -> Iterator[tuple[str, Any, RunConfig]]:
    trainer = config.trainer
    if trainer.zero_stage < 3 and not trainer.compile:
        zero = dataclasses.replace(trainer, zero_stage=trainer.zero_stage + 1)
        yield "trainer.zero_stage", zero.zero_stage, dataclasses.replace(config, trainer=zero)
    if not trainer.offload_optimizer:
        host = dataclasses.replace(trainer, offload_optimizer=True)
        yield "trainer.offload_optimizer", "true", dataclasses.replace(config, trainer=host)


def _staged(config: RunConfig, name: str, **changes: Any) -> RunConfig:
    changed = dataclasses.replace(config.stages[name], **changes)
    return dataclasses.replace(config, stages=config.stages | {name: changed})


def with_recomputation(config: RunConfig, *, recomputes: bool) -> RunConfig:
    """A config with activation checkpointing on or off."""
    trainer = dataclasses.replace(config.trainer, activation_checkpointing=recomputes)
    return dataclasses.replace(config, trainer=trainer)
