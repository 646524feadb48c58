"""An alarm when the losses of a stage run apart, from its rows of metrics alone.

The rule looks at means over windows of rows. Of each loss, the last window is compared with the
lowest one before it: its growth. If meanwhile another loss has fallen, that counts too, up to as
much as the growth itself: a critic that collapses while the student's loss doubles is no
harmless doubling. In the demo the student's loss, at its healthiest, grows by 1.5.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

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


class Windows:
    """Means of the losses over windows of rows, as far as the rule needs them.

    It takes one row after the other, each at the same cost, and holds the last windows only.

    Args:
        length: Rows of a window.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._begin(frozenset())

    def add(self, row: Row) -> None:
        """Take in the next row; one without a finite number for every loss does not count."""
        names = self._names | {key for key in row if key.startswith(LOSS)}
        if names != self._names:  # no row before had a number for every loss
            self._begin(names)
        values = {name: row.get(name) for name in sorted(names)}
        numbers = {k: v for k, v in values.items() if v is not None and math.isfinite(v)}
        if len(numbers) < len(values) or not values:
            return
        self._sums.append({name: self._sums[-1][name] + v for name, v in numbers.items()})
        if len(self._sums) <= self.length:
            return
        first, last = self._sums.popleft(), self._sums[-1]
        self._latest.append({name: (last[name] - first[name]) / self.length for name in numbers})
        if len(self._latest) > self.length:
            earlier = self._latest.popleft()
            for name, mean in earlier.items():
                if mean > 0 and (name not in self._lowest or mean < self._lowest[name][name]):
                    self._lowest[name] = earlier

    def alarms(self, factor: float) -> dict[str, Alarm]:
        """Those after the last row, by network; see `find_alarms`."""
        alarms = {}
        for name in sorted(self._lowest):
            then, now = self._lowest[name], self._latest[-1]
            growth = now[name] / then[name]
            falls = [then[key] / now[key] for key in now if key != name and now[key] > 0]
            if growth * max(1.0, min(growth, max(falls, default=1.0))) > factor:
                short = name.removeprefix(LOSS)
                alarms[short] = Alarm(short, _without_prefix(then), _without_prefix(now))
        return alarms

    def _begin(self, names: frozenset[str]) -> None:
        self._names = names
        # Before the oldest window that may still grow, and after each row since.
        self._sums: deque[dict[str, float]] = deque([dict.fromkeys(sorted(names), 0.0)])
        self._latest: deque[dict[str, float]] = deque()
        self._lowest: dict[str, dict[str, float]] = {}


def find_alarms(rows: Iterable[Row], *, factor: float, length: int) -> dict[str, Alarm]:
    """Alarms after the last of `rows`, by network.

    Rows without a number for every loss do not count: networks may be trained at different steps.

    Args:
        rows: Of metrics, oldest first.
        factor: Growth above which there is an alarm.
        length: Rows of a window; with fewer than two windows there is no alarm.
    """
    windows = Windows(length)
    for row in rows:
        windows.add(row)
    return windows.alarms(factor)


class Alarms(L.Callback):
    """Puts `alarm/NETWORK` = 1 into the row of metrics; must come after `Records`.

    On standard error and in W&B an alarm is told of once, and again only after it has gone.
    """

    def __init__(self, tracking: TrackingConfig) -> None:
        self.factor, self.length = tracking.alarm_factor, tracking.alarm_rows
        self._windows = Windows(self.length)
        self._previous: set[str] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Continue behind the rows that are there."""
        assert isinstance(pl_module, Stage)
        if rank() != 0 or self.factor == 0 or self.length == 0:
            return
        for logger in trainer.loggers:
            if isinstance(logger, JsonlLogger):
                with logger.path.open() as lines:
                    for row in map(json.loads, lines):
                        self._windows.add(row)
                        self._previous = _marks(row)
        pl_module.watch_row = lambda row, step: self.watch(row, step, trainer)

    def watch(self, row: Mapping[str, float], step: int, trainer: L.Trainer) -> dict[str, float]:
        """What to add to the new row of metrics."""
        self._windows.add(row)
        alarms = self._windows.alarms(self.factor)
        marks = {f"{ALARM}{name}": 1.0 for name in alarms}
        for mark, alarm in zip(marks, alarms.values(), strict=True):
            if mark not in self._previous:
                text = alarm.text(step)
                log.warning(text)
                alert(trainer.loggers, title="losses diverge", text=text)
        self._previous = set(marks)
        return marks


def _without_prefix(values: Mapping[str, float]) -> dict[str, float]:
    return {key.removeprefix(LOSS): value for key, value in values.items()}


def _marks(row: Row) -> set[str]:
    return {key for key in row if key.startswith(ALARM)}
