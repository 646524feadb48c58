"""An alarm when the losses of a stage run apart, from its rows of metrics alone.

The rule looks at means over windows of rows. Of each loss, the last window is compared with the
lowest one before it: its growth. If meanwhile another loss has fallen, that counts too, up to as
much as the growth itself: a critic that collapses while the student's loss doubles is no
harmless doubling. In the demo the student's loss, at its healthiest, grows by 1.5.
"""

import itertools
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import lightning as L

from configs.schema import TrackingConfig
from train.ranks import rank
from train.stage import Stage
from train.tracking import JsonlLogger, alert

log = logging.getLogger(__name__)

LOSS, ALARM = "loss/", "alarm/"
Row = Mapping[str, float | None]


@dataclass(frozen=True)
class Alarm:
    """A loss that grows too much.

    Attributes:
        network: Whose loss.
        then: Mean of every loss in the window where this one was lowest.
        now: In the last window.
    """

    network: str
    then: dict[str, float]
    now: dict[str, float]

    def text(self, step: int) -> str:
        """One sentence: every loss then and now, and which one moves."""
        moved = ", ".join(
            f"{name} {self.then[name]:.3g} -> {value:.3g}" for name, value in self.now.items()
        )
        return (
            f"the losses diverge at step {step}, {self.network!r} moves up: {moved} "
            "(lowest earlier mean -> mean of the last rows)"
        )


def find_alarms(rows: Sequence[Row], *, factor: float, length: int) -> dict[str, Alarm]:
    """Alarms after the last of `rows`, by network.

    Rows without a number for every loss do not count: networks may be trained at different steps.

    Args:
        rows: Of metrics, oldest first.
        factor: Growth above which there is an alarm.
        length: Rows of a window; with fewer than two windows there is no alarm.
    """
    names = sorted({key for row in rows for key in row if key.startswith(LOSS)})
    whole = [[row.get(name) for name in names] for row in rows]
    numbers = [[v for v in values if v is not None] for values in whole if None not in values]
    windows = [dict(zip(names, means, strict=True)) for means in _window_means(numbers, length)]
    alarms = {}
    for name in names:
        earlier = [window for window in windows[:-length] if window[name] > 0]
        if not earlier:
            continue
        then, now = min(earlier, key=itemgetter(name)), windows[-1]
        growth = now[name] / then[name]
        falls = [then[key] / now[key] for key in names if key != name and now[key] > 0]
        if growth * max(1.0, min(growth, max(falls, default=1.0))) > factor:
            short = name.removeprefix(LOSS)
            alarms[short] = Alarm(short, _without_prefix(then), _without_prefix(now))
    return alarms


class Alarms(L.Callback):
    """Puts `alarm/NETWORK` = 1 into the row of metrics; must come after `Records`.

    On standard error and in W&B an alarm is told of once, and again only after it has gone.
    """

    def __init__(self, tracking: TrackingConfig) -> None:
        self.factor, self.length = tracking.alarm_factor, tracking.alarm_rows
        self._rows: list[Row] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue behind the rows that are there."""
        assert isinstance(pl_module, Stage)
        if rank() != 0 or self.factor == 0 or self.length == 0:
            return
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                lines = logger.path.read_text().splitlines()
                self._rows += [_relevant(json.loads(line)) for line in lines]
        pl_module.watch_row = lambda row, step: self.watch(row, step, trainer)

    def watch(self, row: Mapping[str, float], step: int, trainer: L.Trainer) -> dict[str, float]:
        """What to add to the new row of metrics."""
        previous = self._rows[-1] if self._rows else {}
        self._rows.append(_relevant(row))
        alarms = find_alarms(self._rows, factor=self.factor, length=self.length)
        marks = {f"{ALARM}{name}": 1.0 for name in alarms}
        self._rows[-1] = {**self._rows[-1], **marks}
        for name, alarm in alarms.items():
            if f"{ALARM}{name}" not in previous:
                text = alarm.text(step)
                log.warning(text)
                alert(trainer.loggers, title="losses diverge", text=text)
        return marks


def _window_means(rows: Sequence[Sequence[float]], length: int) -> list[list[float]]:
    """Mean of every column over each window of `length` rows that follow each other."""
    sums = [[0.0] * len(rows[0])] if rows else []
    for row in rows:
        sums.append([total + value for total, value in zip(sums[-1], row, strict=True)])
    return [
        [(b - a) / length for a, b in zip(first, last, strict=True)]
        for first, last in zip(sums, itertools.islice(sums, length, None), strict=False)
    ]


def _without_prefix(values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix(LOSS): value for key, value in values.items()}


def _relevant(row: Mapping[str, Any]) -> Row:
    return {key: value for key, value in row.items() if key.startswith((LOSS, ALARM))}
