"""What happens around the steps: progress, checkpoints, signals, records."""

import signal
import sys
import threading
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Self

import lightning as L
from lightning.pytorch.loggers import WandbLogger
from tqdm import tqdm

from configs.schema import TrackingConfig
from train.checkpoint import Shelf
from train.randomness import derive_seed, seed_generators
from train.ranks import host_group, on_any_rank, rank
from train.restore import agree_on_newest, restore, restore_random
from train.stage import Stage
from train.tracking import MACHINE_KEYS, JsonlLogger, RunInfo, build_wandb, close_wandb
from train.writer import CheckpointWriter

LINE_SECONDS = 10.0
"""Between two lines of progress where standard error is no terminal."""
FINISH_SECONDS = 30.0
"""That an error waits for a checkpoint that is being written."""
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopSignals:
    """Turns the first SIGTERM, SIGUSR1 or Ctrl-C into a request; a second Ctrl-C acts at once.

    A context: on leaving it, the handlers are those that were there on entering it.

    Attributes:
        received: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Only the main thread may handle signals.
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def install(self) -> None:
        """Take over the signals."""
        for number in self._previous:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        # No collective and no writing in here: the training loop looks at the request.
        self.received = number
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)


class Checkpoints(L.Callback):
    """Restores at the start; writes every so many steps, at the end, and on a stop signal.

    Attributes:
        stopped: Whether a rank was asked to stop.
    """

    def __init__(
        self, shelf: Shelf, *, every: int, signals: StopSignals, patience: timedelta
    ) -> None:
        self.shelf = shelf
        self.every = every
        self.signals = signals
        self.patience = patience
        self.stopped = False
        self._writer = CheckpointWriter(shelf)
        self._resumed: Path | None = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue from the newest whole checkpoint; engines are built by now, no loader is."""
        assert isinstance(pl_module, Stage)
        self._writer = CheckpointWriter(replace(self.shelf, group=host_group(self.patience)))
        self._resumed = agree_on_newest(self.shelf.folder)
        if self._resumed is not None:
            restore(pl_module, self._resumed)
        trainer.limit_train_batches = pl_module.config.steps - pl_module.completed
        trainer.datamodule.start_batch = pl_module.completed  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take the signals over from Lightning, whose own handlers run collectives."""
        self.signals.install()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the global generators as late as can be: making the loader draws from them."""
        if batch_idx > 0:
            return
        assert isinstance(pl_module, Stage)
        if self._resumed is None:
            seed_generators(derive_seed(pl_module.seed, "rank", rank()))
        else:
            restore_random(pl_module, self._resumed)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Start to write if it is time or if a rank was asked to stop."""
        assert isinstance(pl_module, Stage)
        flags = (self.signals.received is not None, self._writer.has_failed)
        stop, failed = on_any_rank(*flags, device=pl_module.device)
        if failed:
            self._writer.wait()
        finished = pl_module.completed >= pl_module.config.steps
        if stop or finished or pl_module.completed % self.every == 0:
            self._write(trainer, pl_module)
        if stop or finished:
            self._writer.wait()
        if stop:
            self.stopped = True
            trainer.should_stop = True

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A request that came after the last step counts, too."""
        (late,) = on_any_rank(self.signals.received is not None, device=pl_module.device)
        self.stopped = self.stopped or late

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let a checkpoint that is being written become whole."""
        self._writer.join(FINISH_SECONDS)

    def _write(self, trainer: L.Trainer, stage: Stage) -> None:
        rows = [logger for logger in trainer.loggers if isinstance(logger, JsonlLogger)]

        def bring_rows_to_disk() -> None:
            for logger in rows:
                logger.save()

        with stage.spans("checkpoint"):
            self._writer.start(stage.snapshot(), after=bring_rows_to_disk)


class Records(L.Callback):
    """Opens the places that metrics go to and closes them; must come after `Checkpoints`."""

    def __init__(self, tracking: TrackingConfig, about: RunInfo) -> None:
        self.tracking = tracking
        self.about = about

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rows beyond the restored step are dropped; W&B is told the configuration."""
        assert isinstance(pl_module, Stage)
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.open(resumed_step=pl_module.completed)
        if rank() == 0 and pl_module.completed < pl_module.config.steps:
            mirror = build_wandb(self.tracking, self.about)
            trainer.loggers = [*trainer.loggers, *([mirror] if mirror is not None else [])]

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Close whatever is open, also after an error."""
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                logger.close()
            elif isinstance(logger, WandbLogger):
                close_wandb(logger)
        trainer.loggers = [log for log in trainer.loggers if not isinstance(log, WandbLogger)]


class Progress(L.Callback):
    """A bar with stage, step, loss and time left; lines now and then without a terminal."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._bar: Any = None
        self._started = 0.0
        self._last_line = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin at the step that was resumed."""
        assert isinstance(pl_module, Stage)
        self._first_step = pl_module.completed
        self._started = self._last_line = time.monotonic()
        if rank() == 0 and sys.stderr.isatty():
            self._bar = tqdm(
                total=pl_module.config.steps,
                initial=pl_module.completed,
                desc=self.name,
                unit="step",
                dynamic_ncols=True,
            )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Show the step."""
        assert isinstance(pl_module, Stage)
        if rank() != 0:
            return
        if self._bar is not None:
            self._bar.set_postfix_str(_headline(pl_module), refresh=False)
            self._bar.update()
        elif self._is_time(pl_module):
            self._last_line = time.monotonic()
            sys.stderr.write(self._line(pl_module))
            sys.stderr.flush()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _is_time(self, stage: Stage) -> bool:
        due = time.monotonic() - self._last_line >= LINE_SECONDS
        return due or stage.completed == stage.config.steps

    def _line(self, stage: Stage) -> str:
        done = max(1, stage.completed - self._first_step)
        elapsed = time.monotonic() - self._started
        left = elapsed / done * (stage.config.steps - stage.completed)
        return (
            f"{self.name}: step {stage.completed}/{stage.config.steps}, {_headline(stage)}, "
            f"{tqdm.format_interval(left)} left\n"
        )


def _headline(stage: Stage) -> str:
    """The first loss that the stage reported for its last step, or its first value."""
    values = {
        key: value
        for key, value in stage.metrics.latest.items()
        if not key.startswith(MACHINE_KEYS)
    }
    if not values:
        return "no loss yet"
    key = next((key for key in values if "loss" in key), next(iter(values)))
    return f"{key} {values[key]:.4g}"
