"""`plan`: what a run will take of every rank, before anything is allocated.

Memory is compared with that of a named GPU; where a stage does not fit, single settings are turned
one by one and then together, and the new numbers are given. Times are a prediction: operations over
the GPU's peak and an efficiency that is assumed.
"""

import argparse
import dataclasses
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import ConfigError, UserError
from configs.load import load_config, nearest
from configs.schema import RunConfig
from launch.forecast_flops import pass_flops
from launch.forecast_knobs import Cluster, Knob, find_knobs, with_recomputation
from launch.forecast_memory import StageMeter
from launch.forecast_networks import Like, missing_inputs, read_like
from launch.forecast_passes import step_passes
from launch.plan import check_stages
from train.hardware import PEAK_FLOPS
from train.shares import exchanged_bytes, update_bytes
from train.world import SLURM, World, check_world

GPUS = {name.lower().replace(" ", "-"): name for name in PEAK_FLOPS}
"""Names on the command line."""


@dataclasses.dataclass
class StageForecast:
    """What a stage takes; bytes are of one rank unless a name says otherwise.

    Attributes:
        name: Of the stage.
        kind: Of the stage.
        networks: Parameters of each network, adapters among them.
        missing: Paths of inputs by role that are not there and count as the run's own model.
        device: Bytes at the fullest moment, by what they are for.
        moment: Which moment that is.
        other_activations: `activations` and `workspace` with `trainer.activation_checkpointing` the
            other way.
        usable_bytes: Of the device.
        start_bytes: On the device before the first step, when one network after the other is put
            there whole and then shared out.
        host_start: While the stage is built.
        host: While it trains.
        host_end: Of rank 0, while the stage is exported.
        mapped_bytes: Inputs in the page cache of each node, shared by its ranks.
        disk: Of all ranks together.
        sent_bytes: To other ranks, in a mean step.
        flops: Of a mean step, as `speed/tflops` counts.
        executed: With what activation checkpointing repeats.
        step_seconds: Predicted, without communication and waiting.
        hours: Of the stage.
        knobs: Settings that lower `device`, where it is too much.
    """

    name: str
    kind: str
    networks: dict[str, int]
    missing: dict[str, str]
    device: dict[str, int]
    moment: str
    other_activations: int
    usable_bytes: int
    start_bytes: int
    host_start: dict[str, int]
    host: dict[str, int]
    host_end: dict[str, int]
    mapped_bytes: int
    disk: dict[str, int]
    sent_bytes: int
    flops: float
    executed: float
    step_seconds: float
    hours: float
    knobs: list[Knob] = dataclasses.field(default_factory=list)

    @property
    def device_bytes(self) -> int:
        """On the device at the fullest moment."""
        return sum(self.device.values())

    @property
    def fits(self) -> bool:
        """Whether the device has so much."""
        return max(self.device_bytes, self.start_bytes) <= self.usable_bytes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb, besides the config."""
    parser.add_argument("--gpu", default="h100", choices=[*GPUS], help="h100 by default")
    number = {"type": int, "metavar": "N"}
    parser.add_argument("--nodes", **number, help="trainer.num_nodes or 1 by default")  # type: ignore[arg-type]
    parser.add_argument("--gpus-per-node", **number, help="trainer.devices or 1 by default")  # type: ignore[arg-type]
    parser.add_argument("--stage", metavar="NAME", help="only this one")
    parser.add_argument(
        "--like",
        action="append",
        default=[],
        metavar="PATH=FILE",
        help="count the input PATH, while it is not there, as `model` in the config FILE; may be "
        "given several times",
    )
    parser.add_argument(
        "--efficiency",
        type=float,
        default=0.4,
        metavar="SHARE",
        help="of the GPU's bfloat16 peak that training reaches; 0.4 is assumed",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers there")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="write a picture there")


def run(arguments: argparse.Namespace) -> None:
    """Print the forecast of a run, and write it to the files that are asked for.

    Raises:
        UserError: If the config cannot work, or a file cannot be written.
    """
    from launch.forecast_table import draw, table
    from launch.steps import say

    config = load_config(arguments.config)
    cluster = _cluster(config, arguments)
    like = read_like(arguments.like, config)
    with _uncollected():
        stages = forecast(config, cluster, stage=arguments.stage, like=like)
    say(table(config, cluster, stages))
    if arguments.json:
        record = {"cluster": dataclasses.asdict(cluster), "stages": [_record(s) for s in stages]}
        _write(arguments.json, json.dumps(record, indent=2).encode())
    if arguments.figure:
        _write(arguments.figure, draw(config, cluster, stages, arguments.figure.suffix))


def forecast(
    config: RunConfig, cluster: Cluster, *, stage: str | None = None, like: Like | None = None
) -> list[StageForecast]:
    """What every stage takes.

    Args:
        config: Of the run.
        cluster: Where it shall run.
        stage: Only this one.
        like: Models that inputs are counted as which are not there, by path.

    Raises:
        UserError: If the config cannot work on these ranks or with the inputs that are there, or
            there is no such stage.
    """
    devices = {"devices": cluster.gpus_per_node, "num_nodes": cluster.nodes}
    check_world(config.trainer, World(SLURM, 0, **devices))
    check_stages(config, ranks=cluster.ranks)
    if stage is not None and stage not in config.stages:
        raise ConfigError(
            f"--stage must name a stage of the plan, one of {list(config.stages)}, found "
            f"{stage!r}{nearest(stage, config.stages)}"
        )
    if not config.stages:
        raise ConfigError("a plan must have stages, found none; add some under stages")
    names = [name for name in config.stages if stage in (None, name)]
    return [_stage(config, name, cluster, like or {}) for name in names]


def _stage(config: RunConfig, name: str, cluster: Cluster, like: Like) -> StageForecast:
    meter = StageMeter(config, name, cluster.ranks, like)
    memory = meter.measure()
    flops, executed = _operations(config, name, meter)
    seconds = executed / (PEAK_FLOPS[cluster.gpu] * cluster.efficiency)
    is_on = config.trainer.activation_checkpointing
    other = with_recomputation(config, recomputes=not is_on)
    moment = StageMeter(other, name, cluster.ranks, like).measure().moment
    found = StageForecast(
        name=name,
        kind=meter.stage.kind,
        networks={network: sum(meter.sizes(network).whole) for network in meter.models},
        missing=missing_inputs(config, name, like),
        device=memory.device(meter.trained),
        moment=memory.moment.name,
        other_activations=moment.parts.get("activations", 0) + moment.parts.get("workspace", 0),
        usable_bytes=cluster.usable_bytes,
        start_bytes=memory.start,
        host_start=memory.host_start,
        host=memory.host,
        host_end=memory.host_end,
        mapped_bytes=memory.mapped,
        disk=memory.disk,
        sent_bytes=_sent(config, name, meter),
        flops=flops,
        executed=executed,
        step_seconds=seconds,
        hours=seconds * meter.stage.steps / 3600,
    )
    if not found.fits:
        found.knobs = find_knobs(config, name, cluster, like)
    return found


def _operations(config: RunConfig, name: str, meter: StageMeter) -> tuple[float, float]:
    """Of a mean step on one rank: those of the model, and those that are executed."""
    flops = executed = 0.0
    for found in step_passes(config, name):
        cost = pass_flops(meter.config_of(found.network), found, meter.lora(found.network))
        count = found.count * meter.share
        flops += count * (cost.forward + cost.backward)
        if config.trainer.activation_checkpointing:
            executed += count * cost.repeated
    return flops, flops + executed


def _sent(config: RunConfig, name: str, meter: StageMeter) -> int:
    """Bytes that a rank sends in a mean step."""
    total, parts = 0.0, meter.share // meter.samples
    student = 1 / getattr(meter.params, "student_every", 1)
    everything = step_passes(config, name)
    for network in (*meter.trained, *meter.frozen):
        sizes = meter.sizes(network)
        passes = [found for found in everything if found.network == network]
        count = sum(found.count * (1 + found.with_grad) for found in passes) * parts
        total += count * exchanged_bytes(sizes.whole, config.trainer, meter.world)
        if network in meter.trained:
            share = student if network == "student" else 1
            total += share * update_bytes(sizes.trained, config.trainer, meter.world)
    return int(total)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without garbage collection, which would look at all objects of torch every few seconds."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _cluster(config: RunConfig, arguments: argparse.Namespace) -> Cluster:
    nodes = arguments.nodes or max(1, config.trainer.num_nodes)
    devices = arguments.gpus_per_node or max(1, config.trainer.devices)
    for option, value in (("--nodes", nodes), ("--gpus-per-node", devices)):
        if value < 1:
            raise UserError(f"{option} must be above 0, found {value}; name what you have")
    if not 0 < arguments.efficiency <= 1:
        raise UserError(
            f"--efficiency must lie above 0 and not above 1, found {arguments.efficiency}; "
            "speed/mfu of an earlier run is a good guess"
        )
    return Cluster(GPUS[arguments.gpu], nodes, devices, arguments.efficiency)


def _record(found: StageForecast) -> dict[str, Any]:
    return dataclasses.asdict(found) | {"device_bytes": found.device_bytes, "fits": found.fits}


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears whole."""
    part = path.with_name(f"{path.name}.part")
    try:
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise UserError(
            f"{str(path)!r} must be writable, found {error.strerror}; check the folder"
        ) from error
