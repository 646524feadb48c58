"""Ends a whole job when one of its ranks dies, hangs or fails, and says which rank and where.

Every rank reports each second to a store that rank 0 hosts. Rank 0 looks at all reports, the others
at those of rank 0 and at its verdict. Two threads per rank: the courier talks to the store, which
does not answer while rank 0 is stopped; the judge never waits for anything. A process that is alone
is not watched.
"""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from typing import Any, Self

import lightning as L
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from torch.distributed import DistError, TCPStore

from configs.schema import TrainerConfig
from train.checkpoint import WriteError
from train.health import (
    BEAT_SECONDS,
    BROKEN,
    DONE,
    FAILED,
    LOST_SECONDS,
    RUNNING,
    Judge,
    Report,
    Verdict,
    outcome_of,
    raised_in_collective,
    standing,
)
from train.ranks import gather_objects, is_distributed, rank
from train.stage import NonFiniteError
from train.world import NONE, launched_world

VERDICT = "verdict"
TOGETHER = (NonFiniteError, WriteError)
"""Errors that all ranks raise at the same place, after they have agreed; no rank tells another."""

_children: list[subprocess.Popen] = []
"""Ranks that Lightning started from this process; later stages of the run have the same."""


class Watchdog(L.Callback):
    """Watches all ranks while a stage trains; a context around the training.

    Args:
        config: Of the processes.
    """

    def __init__(self, config: TrainerConfig) -> None:
        self.config = config
        self._beat = min(BEAT_SECONDS, config.silence_seconds / 6)
        self._outcome: dict[str, Any] = {"phase": RUNNING}
        """The part of the own report that the main thread decides; replaced, never changed."""
        self._reports: dict[int, Report] = {}
        self._verdict: Verdict | None = None
        self._lost = ""
        self._published, self._wake = threading.Event(), threading.Event()
        self._is_judged = True
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._store: Any = None
        self._stage: Any = None
        self._entered_before = 0
        self._parent: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if not self._threads:
            return
        if error is not None and not isinstance(error, TOGETHER):
            self._fail(error)
            _kill_ranks()
        elif rank() == 0:
            self._publish({"phase": DONE})
            # The store is here, so this rank leaves last; the judge bounds the wait.
            while any(report.phase != DONE for report in self._reports.values()):
                time.sleep(self._beat / 10)
                self._wake.set()
        else:
            self._is_judged = False
            self._publish({"phase": DONE})
        self._is_judged = False
        self._over.set()
        self._wake.set()
        for thread in self._threads:
            thread.join(5 * self._beat)

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Begin; all ranks are there and can agree on the store."""
        if not is_distributed():
            return
        assert isinstance(trainer.strategy, ParallelStrategy)
        assert trainer.strategy.cluster_environment is not None
        self._stage = pl_module
        _adopt_children(trainer)
        if rank() > 0 and launched_world().launcher == NONE:
            self._parent = os.getppid()
        self._reports = self._open_store(trainer.strategy.cluster_environment.main_address)
        for target in (self._carry, self._judge):
            self._threads.append(threading.Thread(target=target, daemon=True))
            self._threads[-1].start()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Count parts from here: what only one rank does between steps is no lead."""
        self._entered_before = self._stage.spans.entered if self._stage is not None else 0

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Tell the others at once, before anything is closed, unless they know by themselves."""
        if self._threads and not isinstance(exception, TOGETHER):
            self._fail(exception)

    def _open_store(self, address: str) -> dict[int, Report]:
        """Open the store on all ranks; the first reports that this rank has to look at."""
        own, port = Report(socket.gethostname()), 0
        if rank() == 0:
            self._store = TCPStore(address, 0, is_master=True, wait_for_workers=False)
            self._store.set(VERDICT, "")
            port = self._store.port
        first = gather_objects((own, port))
        if self._store is None:
            self._store = TCPStore(address, first[0][1], is_master=False, wait_for_workers=False)
        self._store.set(str(rank()), json.dumps(asdict(own)))
        gather_objects(None)  # every key exists from here on, so that no read waits for one
        # Only rank 0 looks at all: with hundreds of ranks, all looking at all is too much.
        numbers = range(len(first)) if rank() == 0 else (0, rank())
        return {number: first[number][0] for number in numbers}

    def _fail(self, error: BaseException) -> None:
        """Publish an error of this rank, and give the others the time to read it."""
        if self._outcome["phase"] == FAILED:
            return
        if raised_in_collective(error):
            # Most likely the fault of another rank; if so, the judge ends this process here.
            self._publish({"phase": BROKEN})
            time.sleep(min(self.config.silence_seconds, LOST_SECONDS) + 4 * self._beat)
        self._publish(outcome_of(error))
        time.sleep(3 * self._beat)

    def _publish(self, outcome: dict[str, Any]) -> None:
        """Let the courier carry `outcome` to the store now."""
        self._published.clear()
        self._outcome = outcome
        self._wake.set()
        self._published.wait(5 * self._beat)

    def _carry(self) -> None:
        """The courier: bring the own report to the store, fetch those to look at."""
        numbers, beat = list(self._reports), 0
        # What has been published last is carried in any case, however long the store takes.
        while not (self._over.is_set() and self._published.is_set()):
            self._wake.wait(self._beat)
            self._wake.clear()
            outcome, beat = self._outcome, beat + 1
            report = self._own_report(beat, outcome)
            try:
                self._store.set(str(rank()), json.dumps(asdict(report)))
                found = self._store.multi_get([VERDICT, *map(str, numbers)])
            except DistError as error:
                self._lost = str(error).partition("\n")[0]
                return
            verdict, *reports = (json.loads(text or "null") for text in found)
            self._reports = {n: Report(**r) for n, r in zip(numbers, reports, strict=True)}
            self._verdict = Verdict(**verdict) if verdict is not None else None
            if outcome is self._outcome:
                self._published.set()

    def _own_report(self, beat: int, outcome: dict[str, Any]) -> Report:
        place, waits = standing()
        return Report(
            host=socket.gethostname(),
            beat=beat,
            step=self._stage.completed + 1,
            span=self._stage.spans.current,
            entered=self._stage.spans.entered - self._entered_before,
            place=place,
            waits=waits,
            **outcome,
        )

    def _judge(self) -> None:
        """Look at what the courier brought; end this process if the job must end."""
        judge = Judge(
            self._reports,
            hang_seconds=self.config.hang_seconds if rank() == 0 else 0.0,
            silence_seconds=self.config.silence_seconds,
            now=time.monotonic(),
        )
        while not self._over.wait(self._beat):
            verdict = self._verdict or judge.look(self._reports, time.monotonic())
            if self._lost:
                verdict = judge.lost(self._lost)
            if verdict is None or not self._is_judged:
                continue
            if rank() == 0 and self._verdict is None:
                self._store.set(VERDICT, json.dumps(asdict(verdict)))
            if self._outcome["phase"] != FAILED:
                self._end(verdict)

    def _end(self, verdict: Verdict) -> None:
        """Say why, leave nothing behind, and be gone."""
        sys.stderr.write(f"rank {rank()}: {verdict.message}; this rank ends, too\n")
        sys.stderr.flush()
        if rank() == 0:
            time.sleep(3 * self._beat)  # the others read the verdict meanwhile
        _kill_ranks()
        for worker in multiprocessing.active_children():
            worker.kill()
        if self._verdict is None and self._parent == os.getppid():
            # Rank 0 started this process and answers no more; stopped, it would stay for ever.
            os.kill(self._parent, signal.SIGKILL)
        os._exit(verdict.status)


def _adopt_children(trainer: L.Trainer) -> None:
    """Take over the ranks that Lightning started as children of this process.

    Lightning's own observer, which kills this process without a word when a child has died, holds
    the same list; once that is empty, it goes.
    """
    launcher = trainer.strategy.launcher
    if isinstance(launcher, _SubprocessScriptLauncher):
        _children.extend(launcher.procs)
        launcher.procs.clear()


def _kill_ranks() -> None:
    """Kill the ranks that this process has started, stopped ones included."""
    for rank_process in _children:
        rank_process.kill()
