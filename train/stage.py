"""The base of all stages: one LightningModule that trains networks through engines.

A stage overrides `update`, and where it needs to `setup_stage`, `preview`, `extra_state` and
`load_extra_state`. It counts its own steps: Lightning's `global_step` counts calls of optimisers.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields, replace
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from configs.errors import ConfigError
from configs.schema import StageConfig
from train.checkpoint import Snapshot, capture
from train.engine import Engine, EngineSpec, NonFiniteGradientError
from train.hardware import take_memory
from train.kind import StageKind, rank_share
from train.ranks import world_size
from train.spans import Spans
from train.speed import Speedometer
from train.tracking import MetricWindow


class NonFiniteError(RuntimeError):
    """A loss on some rank, or a gradient, is not finite; raised on all ranks, nothing is updated.

    Attributes:
        network: Whose loss or gradient.
        loss: On this rank.
        norm: Of the gradient over all ranks.
    """

    def __init__(self, network: str, *, loss: float, norm: float) -> None:
        super().__init__(f"the loss of {network!r} is {loss}, the norm of its gradient {norm}")
        self.network, self.loss, self.norm = network, loss, norm


class Stage(StageKind, L.LightningModule):
    """Networks in training, frozen networks beside them, and one update per batch.

    Attributes:
        config: Of this stage.
        seed: Of this stage; all its randomness follows from it and from the samples' own seeds.
        params: The stage's own settings, a dataclass.
        networks: Trainable networks by engine name.
        frozen: Networks that are only read; in evaluation mode, without gradients.
        engines: By name; there from the moment the strategy has been set up.
        completed: Steps that are done.
        counters: Whole numbers that a checkpoint keeps, `updates/NETWORK` among them.
        frames_per_block: Latent frames denoised together.
        frame_seq_len: Tokens per latent frame.
        negative_text: Vectors of `text.negative`, float32 [T, E]; None where guidance is off.
        metrics: What has been reported since the last row of metrics.
        spans: Where the time of the steps goes.
        speed: What steps cost.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        seed: int,
        networks: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module] | None = None,
        params: Any = None,
        frames_per_block: int = 1,
        frame_seq_len: int = 1,
        negative_text: Tensor | None = None,
    ) -> None:
        super().__init__()
        if set(config.optimizers) != set(networks):
            raise ConfigError(
                f"optimizers of a {config.kind!r} stage must name its trainable networks "
                f"{sorted(networks)}, found {sorted(config.optimizers)}"
            )
        self.automatic_optimization = False
        self.config = config
        self.seed = seed
        self.params = params
        self.frames_per_block = frames_per_block
        self.frame_seq_len = frame_seq_len
        self.negative_text: Tensor | None
        self.register_buffer("negative_text", negative_text, persistent=False)
        self.networks = nn.ModuleDict(dict(networks))
        self.frozen = nn.ModuleDict(dict(frozen or {}))
        self.frozen.requires_grad_(False).eval()
        self.engines: dict[str, Engine] = {}
        self.closing: list[Callable[[], None]] = []
        """What a strategy wants done at the end, besides closing the engines."""
        self.completed = 0
        self.counters: dict[str, int] = {}
        self.metrics = MetricWindow()
        self.spans = Spans()
        self.uses_bf16 = False
        self.identity: dict[str, Any] = {}
        """What a checkpoint must have in common with the run that continues it."""
        self.watch_row: Callable[[dict[str, float], int], dict[str, float]] | None = None
        """From a new row of metrics and its step to what is added to the row."""
        self.speed = Speedometer(self)
        self._restart_point: Snapshot | None = None
        self.setup_stage()

    @property
    def block_len(self) -> int:
        """Tokens of one block."""
        return self.frames_per_block * self.frame_seq_len

    def setup_stage(self) -> None:
        """Give the stage's own attributes their first values."""
        return

    def sampler_sigmas(self) -> tuple[list[float], bool] | None:
        """Noise levels of the exported network's sampler and whether it renoises, if it has one."""
        return None

    def cache_policy(self) -> dict[str, Any] | None:
        """Cache policy that the exported student was trained under, if it was under one.

        Name and parameters as in `models.kv_policies`, and fields of `models.kv_spec.CacheSpec`.
        """
        return None

    def engine_specs(self) -> dict[str, EngineSpec]:
        """Every network of this stage by name; the frozen ones without settings."""
        specs = {
            name: EngineSpec(network, self.config.optimizers[name])
            for name, network in self.networks.items()
        }
        return specs | {name: EngineSpec(network, None) for name, network in self.frozen.items()}

    def close(self) -> None:
        """Let go of engines and of what a strategy has built around the networks."""
        for action in [*(engine.close for engine in self.engines.values()), *self.closing]:
            action()
        self.engines, self.closing = {}, []

    def engine(self, name: str) -> Engine:
        """The engine of a trainable network."""
        return self.engines[name]

    def update(self, batch: Any, step: int) -> dict[str, float | Tensor]:
        """Do step number `step` (from 0) on `batch`; return the terms to report, scalars.

        The progress bar shows the first key with `loss` in it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define update(batch, step)")

    def step_kind(self, step: int) -> str:
        """Steps of the same kind, on batches of the same size, take the same arithmetic.

        Asked before `update`; must follow from what a checkpoint holds.
        """
        return "step"

    def preview(self, batch: Any) -> Tensor | None:
        """Latents to show as videos, made without gradients and with generators of its own.

        Returns:
            Latents [B, F, C, H, W], or None if this stage has nothing to show.
        """
        return None

    def preview_salience(self, batch: Any) -> Tensor | None:
        """What the head says of the tokens that `preview` shows, `later`, mean over layers.

        Returns:
            Standardised; None if there is no head or nothing to show.  [B, F, rows, columns]
        """
        return None

    def extra_state(self) -> dict[str, Tensor]:
        """Tensors beyond engines and counters that this rank needs to continue exactly."""
        return {}

    def load_extra_state(self, states: Sequence[dict[str, Tensor]]) -> None:
        """Bring back what `extra_state` returned.

        Args:
            states: This rank's own; on another number of ranks, those of the ranks that it stands
                for, several or none.
        """
        saved = any(states)
        assert not saved, f"{type(self).__name__} saves extra state, so it must load it"

    def mark_restart_point(self) -> None:
        """Copy the state of this moment, for stages with `restarts_at_snapshot`.

        Called in `update`, before anything has changed.
        """
        with self.spans("checkpoint"):
            self._restart_point = capture(self)

    def snapshot(self) -> Snapshot:
        """The state that a checkpoint made now shall hold."""
        if self.restarts_at_snapshot and self._restart_point is not None:
            return self._restart_point
        return capture(self)

    def lr(self, name: str, step: int) -> float:
        """Learning rate of a network at step `step` (from 0): warm-up, then cosine or constant."""
        settings = self.config.optimizers[name]
        if step < settings.warmup:
            return settings.lr * (step + 1) / settings.warmup
        if settings.schedule == "constant":
            return settings.lr
        progress = (step - settings.warmup) / max(1, self.config.steps - settings.warmup)
        cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
        return settings.lr * (settings.floor + (1 - settings.floor) * cosine)

    def micro_batches(self, batch: Any) -> list[Any]:
        """This rank's share of a batch in equal parts of `config.micro_batch` samples."""
        share = rank_share(self.config, world_size())
        return list(split_batch(batch, share // (self.config.micro_batch or share)))

    def optimise(
        self, name: str, loss: Callable[[Any], Tensor], parts: Sequence[Any]
    ) -> dict[str, Tensor | float]:
        """Backward passes over the micro-batches and one step of the engine `name`.

        Args:
            name: Of the engine.
            loss: From a part to a scalar, the mean over the part; a part's graph is gone before
                the next part's is built.
            parts: Of equal size, such as `micro_batches(batch)`.

        Returns:
            What to report: `loss/<name>`, the mean over the parts; `grad_norm/<name>`, the norm
            before clipping; `lr/<name>`.

        Raises:
            NonFiniteError: If the loss on any rank or the gradient is not finite.
        """
        engine, count = self.engines[name], len(parts)
        total: Tensor | float = 0.0
        for number, part in enumerate(parts, start=1):
            with engine.micro_batch(last=number == count):
                with self.spans("score"):
                    value = loss(part) / count
                with self.spans("backward"):
                    engine.backward(_tell_all_ranks(value))
            total = total + value.detach()
        rate = self.lr(name, self.completed)
        try:
            with self.spans("optimizer"):
                norm = engine.step(rate)
        except NonFiniteGradientError as error:
            raise NonFiniteError(name, loss=float(total), norm=error.norm) from error
        updates = f"updates/{name}"
        self.counters[updates] = self.counters.get(updates, 0) + 1
        return {f"loss/{name}": total, f"grad_norm/{name}": norm, f"lr/{name}": rate}

    def batch_at_work(self, batch: Any) -> Any:
        """The batch whose samples a step on `batch` computes with."""
        return batch

    def autocast(self) -> AbstractContextManager:
        """Bfloat16 arithmetic if the run asks for it; weights stay float32.

        Nothing is cached: a cached weight would outlive the step of the optimiser that changes it,
        and under ZeRO-3 every rank would come to hold the whole network.
        """
        return torch.autocast(
            self.device.type, dtype=torch.bfloat16, enabled=self.uses_bf16, cache_enabled=False
        )

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One step: `update`, then the metrics; Lightning calls it."""
        with self.speed.step(batch), self.autocast():
            reported = self.update(batch, self.completed)
            values = {key: float(value) for key, value in reported.items()}  # waits for the device
        self.completed += 1
        self.metrics.add(values | self.speed.latest)
        if self.completed % self.config.log_every == 0 or self.completed == self.config.steps:
            self._report_row()

    def on_train_start(self) -> None:
        """What comes now is waiting for the first batch; Lightning calls it after callbacks."""
        self.speed.start()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """The same for the next batch."""
        self.spans.begin("data")

    def configure_optimizers(self) -> None:
        """Nothing: the engines own the optimisers."""
        return

    def _report_row(self) -> None:
        row = self.speed.row(self.metrics.close(take_memory(self.device)))
        if self.watch_row is not None:
            row |= self.watch_row(row, self.completed)
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step=self.completed)


def _tell_all_ranks(loss: Tensor) -> Tensor:
    """`loss`, but its gradient is undefined if it is not finite.

    The norm of the gradient, which all ranks share, then says so without a word more between them:
    an infinite loss can have a finite gradient.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, torch.nan)


def split_batch(batch: Any, count: int) -> Iterator[Any]:
    """A dataclass of tensors and lists in `count` equal parts along their first axis.

    Raises:
        ValueError: If the length of the first axis is no multiple of `count`.
    """
    if count == 1:
        yield batch
        return
    values = {entry.name: getattr(batch, entry.name) for entry in fields(batch)}
    size = len(next(iter(values.values())))
    if size % count:
        raise ValueError(f"a batch must hold a multiple of {count} samples, found {size}")
    part = size // count
    for start in range(0, size, part):
        yield replace(
            batch, **{name: value[start : start + part] for name, value in values.items()}
        )
