"""What every engine of a stage really holds at the peak of a step, as a program of each rank.

python -m tests.launch.held FILE --kind distill --strategy deepspeed ... [--then FILE ...]
"""

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from configs.schema import RunConfig, TrackingConfig, TrainerConfig
from tests.train.exact import Shares, exact_stage
from tests.train.toy import command_lines
from train.engine import Engine
from train.fit import fit
from train.ranks import rank

STEPS = 4
"""The second update of a head that first gathers statistics, or of a student every second step."""


class Storages:
    """Counts memory once, however many tensors lie in it."""

    def __init__(self):
        self.seen: set[int] = set()

    def count(self, tensors: Iterable[Any]) -> int:
        """Bytes of the memory behind these tensors that has not been counted before."""
        found = {}
        for tensor in tensors:
            if isinstance(tensor, torch.Tensor) and tensor.numel():
                storage = tensor.untyped_storage()
                if storage.data_ptr() not in self.seen:
                    found[storage.data_ptr()] = storage.nbytes()
        self.seen |= found.keys()
        return sum(found.values())


def held(engine: Engine) -> dict[str, int]:
    """Bytes of an engine whose gradients are complete."""
    storages, parameters = Storages(), list(engine.module.parameters())
    zero = getattr(getattr(engine, "_engine", None), "optimizer", None)
    masters = engine._masters()
    moments = [
        value
        for master in masters
        for key, value in engine.optimizer.state[master].items()
        if key != "step"
    ]
    gradients = [p.grad for p in (*parameters, *masters)]
    for group in getattr(zero, "averaged_gradients", {}).values():
        gradients += group or []
    gradients += [getattr(zero, "grads_in_partition", None)]
    gradients += [getattr(zero, "grad_partitions_flat_buffer", None)]
    return {
        "parameters": storages.count(p.data for p in parameters)
        + storages.count(getattr(p, "ds_tensor", None) for p in parameters),
        "masters": storages.count(masters),
        "moments": storages.count(moments),
        "averages": storages.count(engine._ema),
        "gradients": storages.count(gradients),
    }


def main(words: list[str]) -> None:
    """Train as each command line says, one after the other."""
    for line in command_lines(words):
        train_as_told(line)


def train_as_told(words: list[str]) -> None:
    """Train as one command line says; every rank writes the most that its engines held."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--kind")
    parser.add_argument("--strategy")
    parser.add_argument("--zero_stage", type=int, default=2)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--persistent_params", type=int, default=0)
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--offload_optimizer", action="store_true")
    trainer = vars(parser.parse_args(words))
    path, kind = trainer.pop("path"), trainer.pop("kind")
    stage = exact_stage(kind, steps=STEPS, checkpoint_every=STEPS)
    found: dict[str, dict[str, int]] = {}

    class Watched(Shares):
        """Watches the engines, which are there by now."""

        def train_dataloader(self):
            for engine in stage.engines.values():
                watch(engine, found)
            return super().train_dataloader()

    config = RunConfig(
        name="held",
        stages={"test": stage.config},
        trainer=TrainerConfig(accelerator="cpu", threads=1, **trainer),
        tracking=TrackingConfig(wandb="disabled"),
    )
    fit(stage, Watched(STEPS), folder=path.with_suffix(""), config=config, stage_name="test")
    found["frozen"] = {
        name: Storages().count(
            x for p in network.parameters() for x in (p.data, getattr(p, "ds_tensor", None))
        )
        for name, network in stage.frozen.items()
    }
    files = (path.with_suffix("") / "checkpoints").glob("step-*/*.safetensors")
    found["checkpoint"] = {
        "bytes": sum(x.nbytes for file in files for x in master_tensors(file).values())
    }
    path.with_name(f"{path.name}-{rank()}").write_text(json.dumps(found))


def master_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint's file: what belongs to single elements of the networks."""
    kinds = ("master.", "exp_avg.", "exp_avg_sq.", "ema.")
    return {
        key: value
        for key, value in load_file(file).items()
        if key.startswith("engine.") and key.split(".", 2)[2].startswith(kinds)
    }


def watch(engine: Engine, found: dict[str, dict[str, int]]) -> None:
    """Look at an engine before every update, and where ZeRO-1 has all gradients."""

    def look() -> None:
        now = held(engine)
        before = found.get(engine.name, now)
        found[engine.name] = {key: max(before[key], now[key]) for key in now}

    def looking_first(function: Callable) -> Callable:
        def watched(*args: Any, **kwargs: Any) -> Any:
            look()
            return function(*args, **kwargs)

        return watched

    engine._update = looking_first(engine._update)
    zero = getattr(getattr(engine, "_engine", None), "optimizer", None)
    if hasattr(zero, "partition_gradients") and not zero.partition_gradients:
        zero.reduce_gradients = looking_first(zero.reduce_gradients)
