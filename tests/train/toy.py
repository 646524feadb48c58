"""A stage of milliseconds per step, for tests; as a program it trains in a process of its own.

python -m tests.train.toy FOLDER [--steps N] [--strategy deepspeed] [--event kill:3] ...
"""

import argparse
import gc
import math
import os
import signal
import sys
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import lightning as L
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from configs.errors import UserError
from configs.schema import (
    DataConfig,
    OptimConfig,
    RunConfig,
    StageConfig,
    TrackingConfig,
    TrainerConfig,
)
from train import checkpoint
from train.failures import TrainingFailure
from train.fit import Interrupted, fit
from train.randomness import sample_noise
from train.ranks import rank, world_size
from train.stage import Stage
from train.world import process_rank

WIDTH = 6


@dataclass
class ToyBatch:
    """Vectors and their seeds.  [B, WIDTH], [B]"""

    latents: Tensor
    seeds: Tensor

    def to(self, device, **kwargs):
        return replace(self, latents=self.latents.to(device), seeds=self.seeds.to(device))


def toy_batch(number: int, *, size: int, rank: int, world: int) -> ToyBatch:
    """This rank's share of batch `number`, `size` samples in all; ranks hold neighbours."""
    share = size // world
    seeds = torch.arange(share) + size * number + share * rank
    return ToyBatch(sample_noise((WIDTH,), seeds, "data"), seeds)


class ToyBatches(IterableDataset):
    def __init__(self, owner):
        self.owner = owner

    def __iter__(self) -> Iterator[ToyBatch]:
        owner = self.owner
        for number in range(owner.start_batch, owner.num_batches):
            yield toy_batch(number, size=owner.batch_size, rank=rank(), world=world_size())


class ToyData(L.LightningDataModule):
    def __init__(self, *, batch_size: int, num_batches: int, workers: int = 0):
        super().__init__()
        self.start_batch, self.num_batches, self.batch_size = 0, num_batches, batch_size
        self.workers = workers

    def train_dataloader(self):
        return DataLoader(ToyBatches(self), batch_size=None, num_workers=self.workers)


def toy_network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(WIDTH, 5), nn.SiLU(), nn.Linear(5, WIDTH))


class ToyStage(Stage):
    """A student every second step, a critic every step, global randomness, a running mean."""

    uses_global_noise = True

    def setup_stage(self):
        self.mean = torch.zeros(WIDTH)

    def step_kind(self, step: int):
        return "both" if step % 2 == 0 else "critic"

    def update(self, batch: ToyBatch, step: int):
        with self.spans("rollout"):
            self.at_update(step)
        metrics = {}
        if step % 2 == 0:
            before = self.output(batch)
            metrics |= self.optimise("student", self.student_loss, self.micro_batches(batch))
            metrics["moved"] = (self.output(batch) - before).abs().max()
        metrics |= self.optimise("critic", self.critic_loss, self.micro_batches(batch))
        self.mean = self.mean.lerp(batch.latents.mean(dim=0), 0.1)
        self.counters["critic_steps"] = self.counters.get("critic_steps", 0) + 1
        return metrics

    @torch.no_grad()
    def output(self, batch: ToyBatch) -> Tensor:
        """Of the student as it is now."""
        return self.engine("student")(batch.latents).float()

    def student_loss(self, batch: ToyBatch) -> Tensor:
        x = self.engine("student")(batch.latents)
        with torch.no_grad():
            direction = self.engine("critic")(x) - self.frozen["teacher"](x)
        return F.mse_loss(x, (x - direction).detach())

    def critic_loss(self, batch: ToyBatch) -> Tensor:
        noise = (
            torch.randn(batch.latents.shape) if self.uses_global_noise else batch.latents.flip(1)
        )
        with torch.no_grad():
            x = self.engine("student")(batch.latents)
        return F.mse_loss(self.engine("critic")(x + 0.1 * noise), noise)

    def at_update(self, step: int) -> None:
        """A place where tests let things happen."""

    def preview(self, batch: ToyBatch) -> Tensor:
        torch.rand(3)  # must not move the global generator
        return torch.zeros(1, 4, 3, 16, 16)

    def extra_state(self):
        return {"mean": self.mean}

    def load_extra_state(self, states):
        self.mean = sum(state["mean"] for state in states) / len(states)


class ToyStream(ToyStage):
    """Holds a stream of three steps that no checkpoint can hold."""

    restarts_at_snapshot = True

    def setup_stage(self):
        super().setup_stage()
        self.stream = None

    def update(self, batch, step):
        if self.stream is None:
            self.mark_restart_point()
            self.stream = [torch.zeros(WIDTH)]
        metrics = super().update(batch, step)
        self.stream.append(self.stream[-1] + batch.latents.mean(dim=0))
        metrics["stream"] = self.stream[-1].sum()
        if len(self.stream) > 3:
            self.stream = None
        return metrics


def toy_config(**changes) -> RunConfig:
    """A run with one stage `toy`; `changes` are fields of its sections."""
    optim = OptimConfig(
        lr=1e-2, warmup=2, ema=changes.pop("ema", 0.9), clip=changes.pop("clip", 1.0)
    )
    stage = StageConfig(
        kind="toy",
        steps=changes.pop("steps", 6),
        batch=changes.pop("batch", 4),
        frames=1,
        optimizers={"student": optim, "critic": replace(optim, lr=3e-2, ema=0.0)},
        checkpoint_every=changes.pop("checkpoint_every", 2),
        log_every=changes.pop("log_every", 3),
        micro_batch=changes.pop("micro_batch", 0),
        sample_every=changes.pop("sample_every", 0),
        keep=changes.pop("keep", 2),
    )
    tracking = changes.pop("tracking", TrackingConfig(wandb="disabled"))
    data = DataConfig(workers=changes.pop("workers", 0))
    trainer = TrainerConfig(accelerator="cpu", threads=1, **changes)
    return RunConfig(
        name="toy", stages={"toy": stage}, data=data, trainer=trainer, tracking=tracking
    )


def toy_stage(config: RunConfig, kind: type[Stage] = ToyStage) -> Stage:
    return kind(
        config.stages["toy"],
        seed=7,
        networks={"student": toy_network(1), "critic": toy_network(2)},
        frozen={"teacher": toy_network(3)},
    )


def train(folder: Path, config: RunConfig, stage: Stage | None = None, **options) -> Stage:
    """Train to the end and return the stage."""
    settings = config.stages["toy"]
    stage = toy_stage(config) if stage is None else stage
    data = ToyData(
        batch_size=settings.batch, num_batches=settings.steps, workers=config.data.workers
    )
    fit(stage, data, folder=folder, config=config, stage_name="toy", **options)
    return stage


def final_weights(stage: Stage) -> dict[str, Tensor]:
    weights = {
        f"{name}.{key}": value
        for name, engine in stage.engines.items()
        for key, value in engine.weights().items()
    }
    if stage.config.optimizers["student"].ema:
        averaged = stage.engine("student").weights(ema=True)
        weights |= {f"average.{key}": value for key, value in averaged.items()}
    return weights | {"mean": stage.mean}


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def command_lines(words: list[str]) -> list[list[str]]:
    """The command lines that one holds, separated by `--then`."""
    ends = [*(where for where, word in enumerate(words) if word == "--then"), len(words)]
    return [words[start + 1 : end] for start, end in pairwise([-1, *ends])]


def main(words: list[str]) -> None:
    """Train as each command line says, one after the other."""
    for line in command_lines(words):
        folder, networks = train_as_told(line)
        gc.collect()
        if rank() == 0:
            (folder / "still_held").write_text(str(sum(elements(one()) for one in networks)))


def elements(network: nn.Module | None) -> int:
    """Elements of the parameters of a network, of this rank's shares of them at least."""
    parameters = [] if network is None else list(network.parameters())
    return sum(max(p.numel(), getattr(p, "ds_tensor", p).numel()) for p in parameters)


def train_as_told(words: list[str]) -> tuple[Path, list[weakref.ref]]:
    """Train as one command line says; the folder, and the networks, which nothing needs now."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    numbers = {"steps": 6, "zero_stage": 2, "devices": 0, "batch": 4, "micro_batch": 0, "keep": 2}
    numbers["workers"] = 0
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("clip", 1.0), ("hang_seconds", 60.0), ("silence_seconds", 60.0)):
        parser.add_argument(f"--{name}", type=float, default=default)
    parser.add_argument("--strategy", default="single")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--kind", default="ToyStage")
    parser.add_argument("--persistent_params", type=int, default=0)
    parser.add_argument("--offload_optimizer", action="store_true")
    parser.add_argument("--event", default="", help="WHAT:STEP[:RANK], see `arrange`")
    parser.add_argument("--no_noise", action="store_true", help="nothing but the data is random")
    arguments = vars(parser.parse_args(words))
    folder, event, kind = (arguments.pop(key) for key in ("folder", "event", "kind"))
    has_noise = not arguments.pop("no_noise")
    config = toy_config(**arguments)
    stage = toy_stage(config, globals()[kind])
    stage.uses_global_noise = has_noise
    arrange(stage, event, ranks=int(os.environ.get("WORLD_SIZE", config.trainer.devices or 1)))
    try:
        train(folder, config, stage)
    except Interrupted as stop:
        (folder / "interrupted").write_text(str(stop.step))
        save_weights(stage, folder / f"stopped-{stop.step}.safetensors")
        if "--then" not in sys.argv:
            raise
        return folder, []
    except TrainingFailure as error:
        if "--then" not in sys.argv:
            raise
        (folder / f"rank-{rank()}-failed").write_text(str(error))
        return folder, []
    save_weights(stage, folder / "final.safetensors")
    stage.close()
    networks = [*stage.networks.values(), *stage.frozen.values()]
    return folder, [weakref.ref(network) for network in networks]


def save_weights(stage: Stage, path: Path) -> None:
    weights = final_weights(stage)
    if rank() == 0:
        safetensors.torch.save_file(weights, path)


def arrange(stage: Stage, event: str, *, ranks: int) -> None:
    """Let `event` happen: WHAT:STEP[:RANK], by default on the last rank.

    kill, stop, term, int: a signal within a step, after its first update. sleep: a hang. raise: a
    bug. refuse: bad input. nan: a poisoned batch. inf: a loss of the critic that is infinite, with
    a finite gradient. save, saved: SIGKILL within the writing of the rank's file, or after it.
    pointer: SIGKILL between the appearance of the checkpoint and the pointer to it (what rank 0
    alone does). slow:SECONDS: what every step of every rank waits.
    """
    what, step, place = (*event.split(":"), "", "")[:3]
    if what == "slow":
        stage.at_update = lambda now: time.sleep(float(step))
    elif what and process_rank() == int(place or ranks - 1):
        EVENTS[what](stage, int(step))


def meet(action):
    """An event: do `action` at the start of the step."""

    def arranged(stage: Stage, step: int) -> None:
        stage.at_update = lambda now: action() if now == step else None

    return arranged


def hang():
    time.sleep(600)


def fail(error):
    raise error


def send(number: int):
    return lambda stage, step: after(stage, "optimise", step, lambda: os.kill(os.getpid(), number))


def poison(stage: Stage, step: int) -> None:
    update = stage.update
    stage.update = lambda batch, now: update(
        replace(batch, latents=batch.latents * math.nan) if now == step else batch, now
    )


def lose(stage: Stage, step: int) -> None:
    loss = stage.critic_loss
    stage.critic_loss = lambda batch: loss(batch) + (math.inf if stage.completed == step else 0)


def kill_in_save(stage: Stage, step: int) -> None:
    save_file = safetensors.torch.save_file

    def save(tensors, target, metadata=None):
        if f"/step-{step:08d}.part/" in str(target):
            Path(target).write_bytes(b"torn")
            kill()
        save_file(tensors, target, metadata)

    safetensors.torch.save_file = save


def kill_when_saved(stage: Stage, step: int) -> None:
    write_rank = checkpoint._write_rank

    def written(snapshot, part):
        entry = write_rank(snapshot, part)
        return kill() if snapshot.step == step else entry

    checkpoint._write_rank = written


def kill_before_pointer(stage: Stage, step: int) -> None:
    original = Path.replace

    def point(own, target):
        newest = checkpoint.newest_whole(own.parent) if own.name.startswith("newest") else None
        if newest is not None and checkpoint.step_of(newest) == step:
            kill()
        return original(own, target)

    Path.replace = point


EVENTS = {
    "kill": send(signal.SIGKILL),
    "term": send(signal.SIGTERM),
    "int": send(signal.SIGINT),
    "stop": send(signal.SIGSTOP),
    "sleep": meet(hang),
    "raise": meet(lambda: fail(ZeroDivisionError("a bug"))),
    "refuse": meet(lambda: fail(UserError("the input must fit, found none; give another"))),
    "nan": poison,
    "inf": lose,
    "save": kill_in_save,
    "saved": kill_when_saved,
    "pointer": kill_before_pointer,
}


def after(stage: Stage, method: str, step: int, action) -> None:
    """Do `action` once, after the first call of a method of the stage in a step."""
    original, done = getattr(stage, method), []

    def call(*arguments, **options):
        result = original(*arguments, **options)
        if stage.completed == step and not done:
            done.append(step)
            action()
        return result

    setattr(stage, method, call)


if __name__ == "__main__":
    main(sys.argv[1:])
