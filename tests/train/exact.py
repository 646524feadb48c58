"""Trajectories of every stage: as a program under a strategy; as a function by plain AdamW.

python -m tests.train.exact FOLDER/NAME.safetensors --kind distill --zero_stage 3 [--then ...]
"""

import argparse
import sys
import threading
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from configs.schema import LoraConfig, RunConfig, TrackingConfig, TrainerConfig
from data.batches import SwitchBatch
from tests.train.small_stages import batch, small_stage
from tests.train.toy import arrange, command_lines
from train.engine import Piece
from train.fit import fit
from train.ranks import rank, world_size
from train.stage import Stage, split_batch

STAGE_WORDS = ("kind", "steps", "clip", "micro_batch", "layers", "checkpoint_every")
BATCH = 4
"""Samples of a step, over all ranks."""
PARAMS = {
    "distill": {"student_every": 2, "prefix_frames": [8], "budgets": [30, 36], "student_steps": 2},
    "streaming": {"student_every": 2, "student_steps": 2, "switch_chance": 0.5},
}


def share(number: int, rank: int, world: int) -> SwitchBatch:
    """What a rank sees of batch `number`."""
    whole = batch(BATCH, 1 + BATCH * number)
    whole = SwitchBatch(**vars(whole), next_text=whole.text.flip(1))
    return list(split_batch(whole, world))[rank]


class Shares(L.LightningDataModule):
    """This rank's share of batch 0, 1, ..."""

    def __init__(self, steps: int):
        super().__init__()
        self.steps, self.start_batch = steps, 0

    def train_dataloader(self):
        sampler = range(self.start_batch, self.steps)
        return DataLoader(Numbered(), batch_size=None, sampler=sampler)


class Numbered(Dataset):
    def __getitem__(self, number: int):
        return share(number, rank(), world_size())


def exact_stage(kind: str, **changes) -> Stage:
    """A small stage; `changes` as in `small_stage`; `lora` is `distill` with adapters."""
    if kind == "lora":
        kind, changes = "distill", changes | {"lora": LoraConfig(rank=3, alpha=5.0)}
    return small_stage(kind, PARAMS.get(kind), batch=BATCH, log_every=5, ema=0.9, **changes)


def record(stage: Stage, step: int, found: dict[str, Tensor]) -> None:
    """Put all weights after a step into `found`; every rank must call it."""
    for name, engine in stage.engines.items():
        found |= {f"{step}/{name}/{key}": value for key, value in engine.weights().items()}


def train(path: Path, words: dict[str, Any]) -> None:
    """Train under a strategy; write the trajectory, and the averages at its end."""
    event = words.pop("event")
    stage = exact_stage(**{key: words.pop(key) for key in STAGE_WORDS})
    arrange(stage, event, ranks=2)
    steps = stage.config.steps
    trainer = TrainerConfig(accelerator="cpu", threads=1, persistent_params=0, **words)
    config = RunConfig(
        name="exact",
        stages={"test": stage.config},
        trainer=trainer,
        tracking=TrackingConfig(wandb="disabled"),
    )
    found: dict[str, Tensor] = {}
    update = stage.update

    def recorded(given, step):
        metrics = update(given, step)
        record(stage, step, found)
        found[f"{step}/norms"] = torch.tensor(
            [float(metrics[key]) for key in sorted(metrics) if key.startswith("grad_norm/")]
        )
        return metrics

    stage.update = recorded
    fit(stage, Shares(steps), folder=path.with_suffix(""), config=config, stage_name="test")
    for name, engine in stage.engines.items():
        found |= {f"ema/{name}/{k}": value for k, value in engine.weights(ema=True).items()}
    frozen = [p for p in stage.parameters() if not p.requires_grad]
    shares = [getattr(p, "ds_tensor", p).numel() for p in frozen]
    found["frozen_elements"] = torch.tensor(sum(shares))
    if rank() == 0:
        safetensors.torch.save_file(found, path)


class Meeting:
    """Where threads that play ranks exchange what they have."""

    def __init__(self, world: int):
        self.barrier = threading.Barrier(world, timeout=60)
        self.items: list[Any] = [None] * world
        self.own = threading.local()

    def exchange(self, value: Any) -> list[Any]:
        self.items[self.own.rank] = value
        self.barrier.wait()
        items = list(self.items)
        self.barrier.wait()
        return items


class PlainEngine:
    """A network, a plain AdamW, and gradients averaged over ranks in their order."""

    def __init__(self, name: str, module: nn.Module, settings: Any, meeting: Meeting):
        self.name, self.module, self.settings, self.meeting = name, module, settings, meeting
        self.trained = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.parameters = list(self.trained.values())
        self.average = [p.detach().clone() for p in self.parameters]
        self.first_gradient: dict[str, Tensor] = {}
        self.adamw = torch.optim.AdamW(
            self.parameters,
            lr=settings.lr,
            betas=tuple(settings.betas),
            weight_decay=settings.weight_decay,
            foreach=False,
        )

    def __call__(self, *args, **kwargs):
        return self.module(*args, **kwargs)

    def micro_batch(self, *, last: bool):
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, lr: float) -> float:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        everyone = self.meeting.exchange(grads)
        for number, parameter in enumerate(self.parameters):
            parameter.grad = sum(own[number] for own in everyone) / len(everyone)
        if not self.first_gradient:
            self.first_gradient = {name: p.grad.clone() for name, p in self.trained.items()}
        norm = torch.stack([p.grad.norm() for p in self.parameters]).norm()
        if self.settings.clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.clip)
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.step()
        self.adamw.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - self.settings.ema)
        return float(norm)

    def shard_state(self) -> dict[str, Tensor]:
        """Nothing: no stream is ever restarted here."""
        return {}

    def layout(self) -> list[Piece]:
        return []

    is_written_here = False

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        state = {key: value.detach().clone() for key, value in self.module.state_dict().items()}
        if ema:
            state |= dict(zip(self.trained, self.average, strict=True))
        return state


def plain(kind: str, *, world: int, steps: int, **changes) -> dict[str, Tensor]:
    """The trajectory that `train` must find, without any strategy: one thread per rank.

    Besides, the first gradient of every network.
    """
    meeting = Meeting(world)
    stages = []
    for _ in range(world):
        stage = exact_stage(kind, steps=steps, **changes)
        stage.engines = {
            name: PlainEngine(name, spec.module, spec.optim, meeting)
            for name, spec in stage.engine_specs().items()
            if spec.optim is not None
        }
        stages.append(stage)
    found: dict[str, Tensor] = {}

    def play(number: int) -> None:
        meeting.own.rank, stage = number, stages[number]
        for step in range(steps):
            metrics = stage.update(share(step, number, world), step)
            stage.completed += 1
            if number == 0:
                record(stage, step, found)
                found[f"{step}/norms"] = torch.tensor(
                    [metrics[key] for key in sorted(metrics) if key.startswith("grad_norm/")]
                )

    with (
        mock.patch("train.stage.world_size", return_value=world),
        mock.patch("train.salience.gather_objects", meeting.exchange),
    ):
        threads = [threading.Thread(target=play, args=(number,)) for number in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    for name, engine in stages[0].engines.items():
        found |= {f"gradient/{name}/{k}": value for k, value in engine.first_gradient.items()}
        found |= {f"ema/{name}/{k}": value for k, value in engine.weights(ema=True).items()}
    return found


def main(words: list[str]) -> None:
    """Train as each command line says, one after the other."""
    for line in command_lines(words):
        train_as_told(line)


def train_as_told(words: list[str]) -> None:
    """Train as one command line says."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    numbers = {"steps": 10, "zero_stage": 2, "devices": 2, "micro_batch": 0, "layers": 2}
    numbers["checkpoint_every"] = 100
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--kind")
    parser.add_argument("--event", default="", help="see `tests.train.toy.arrange`")
    parser.add_argument("--silence_seconds", type=float, default=60.0)
    parser.add_argument("--clip", type=float, default=0.0)
    parser.add_argument("--strategy", default="deepspeed")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--offload_optimizer", action="store_true")
    arguments = vars(parser.parse_args(words))
    train(arguments.pop("path"), arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
