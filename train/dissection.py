"""A step taken apart: loss and gradient of each sample alone, and where they stop being finite."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from train.engine import Engine, SingleEngine
from train.randomness import generators_of
from train.stage import Stage, split_batch


@dataclass
class Finding:
    """What one sample alone does in a step.

    Attributes:
        losses: By network.
        grad_norms: By network.
        inputs: Tensors of the sample itself that are not finite.
        module: First module, by its name, whose output is not finite.
        parameters: Parameters whose gradient is not finite, of each network the last ones first,
            as the backward pass comes to them; all, if the loss itself is not finite.
    """

    losses: dict[str, float] = field(default_factory=dict)
    grad_norms: dict[str, float] = field(default_factory=dict)
    inputs: list[str] = field(default_factory=list)
    module: str | None = None
    parameters: list[str] = field(default_factory=list)

    @property
    def is_finite(self) -> bool:
        """Whether all of it is."""
        numbers = [*self.losses.values(), *self.grad_norms.values()]
        return not self.inputs and all(math.isfinite(number) for number in numbers)


class Bystander(SingleEngine):
    """In an engine's place: gradients are computed, looked at and dropped; nothing is updated."""

    is_written_here = False

    def __init__(self, engine: Engine) -> None:
        Engine.__init__(self, engine.name, engine.module, engine.settings)
        self.norm = math.nan
        self.not_finite: list[str] = []

    def step(self, lr: float) -> float:
        """Measure the gradient in place of using it."""
        gradients = {
            f"{self.name}.{name}": parameter.grad
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        }
        self.norm = float(torch.nn.utils.get_total_norm(list(gradients.values())))
        backwards = reversed(gradients.items())
        self.not_finite = [name for name, value in backwards if not _is_finite(value)]
        self.module.zero_grad(set_to_none=True)
        return self.norm


class Loner:
    """One sample of the batches of a stage, going through its steps alone.

    It shares the networks of the stage and has a running state of its own, so it can live in a
    stream beside the stage: call `observe` for each step of the stream, before the stage's own.

    Args:
        stage: Whose engines exist.
        index: Of the sample in the batch.
    """

    def __init__(self, stage: Stage, index: int) -> None:
        self.index = index
        self.stage = copy.copy(stage)  # a second set of attributes around the same networks
        self.stage.config = replace(stage.config, batch=1, micro_batch=0)
        self.bystanders = {name: Bystander(engine) for name, engine in stage.engines.items()}
        self.stage.counters = dict(stage.counters)
        self.stage.engines = dict(self.bystanders)
        self.stage.setup_stage()

    def observe(self, batch: Any, step: int) -> Finding:
        """What the sample does in step number `step` (from 0) of the stage, on its batch."""
        own = list(split_batch(batch, len(batch.seeds)))[self.index]
        self.stage.completed = step
        tensors = _named_tensors(self.stage.batch_at_work(own))
        found = Finding(inputs=[name for name, value in tensors.items() if not _is_finite(value)])
        with (
            torch.random.fork_rng(devices=generators_of(self.stage.device)),
            _first_not_finite(self.stage, found),
            self.stage.autocast(),
        ):
            reported = self.stage.update(own, step)
        found.losses = _by_network(reported, "loss/")
        found.grad_norms = _by_network(reported, "grad_norm/")
        for bystander in self.bystanders.values():
            found.parameters += bystander.not_finite
        return found


@contextmanager
def _first_not_finite(stage: Stage, found: Finding) -> Iterator[None]:
    """Note in `found` the first module of the stage whose output is not finite."""

    def watch(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            if found.module is None and not all(map(_is_finite, _tensors_in(output))):
                found.module = name

        return look

    groups = (stage.networks, stage.frozen)
    handles = [
        module.register_forward_hook(watch(name))
        for group in groups
        for name, module in group.named_modules()
        if name
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_network(reported: Mapping[str, Any], prefix: str) -> dict[str, float]:
    return {
        key.removeprefix(prefix): float(value)
        for key, value in reported.items()
        if key.startswith(prefix)
    }


def _named_tensors(batch: Any) -> dict[str, Tensor]:
    """The tensors of a batch, but for targets, which may be undefined."""
    values = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, Tensor) and name != "targets"
    }


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors_in(item)
    elif is_dataclass(value):
        for entry in fields(value):
            yield from _tensors_in(getattr(value, entry.name))


def _is_finite(value: Tensor) -> bool:
    return bool(value.isfinite().all())
