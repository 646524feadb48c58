"""What every engine of a stage really holds at the peak of a step, as a program of each rank.

python -m tests.launch.held FILE.json --kind distill --strategy deepspeed [--zero_stage 3] ...
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from configs.schema import RunConfig, TrackingConfig, TrainerConfig
from tests.train.exact import Shares, exact_stage
from train.engine import Engine
from train.fit import fit
from train.ranks import rank


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
    """Train two steps; every rank writes what its engines held in the second."""
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
    stage = exact_stage(kind, steps=4)
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
        tracking=TrackingConfig(wandb="off"),
    )
    fit(stage, Watched(4), folder=path.with_suffix(""), config=config, stage_name="test")
    found["frozen"] = {
        name: Storages().count(
            x for p in network.parameters() for x in (p.data, getattr(p, "ds_tensor", None))
        )
        for name, network in stage.frozen.items()
    }
    path.with_name(f"{path.name}-{rank()}").write_text(json.dumps(found))


def watch(engine: Engine, found: dict[str, dict[str, int]]) -> None:
    update = engine._update

    def watched() -> float:
        now = held(engine)
        before = found.get(engine.name, now)
        found[engine.name] = {key: max(before[key], now[key]) for key in now}
        return update()

    engine._update = watched
