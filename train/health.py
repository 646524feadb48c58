"""When a job of several ranks must end: what ranks report about themselves, and the rules.

Everything here is decided from reports and a clock that are handed in.
"""

import re
import sys
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from configs.errors import UserError

BEAT_SECONDS = 1.0
"""Between two reports of a rank."""
LOST_SECONDS = 10.0
"""Silence that is enough once a collective has failed: then a peer is gone, the question is who."""
MAX_NAMED = 8
"""Ranks that a message names before it only counts them."""

ROOT = Path(__file__).resolve().parents[1]
COLLECTIVES = ("torch.distributed.distributed_c10d", "deepspeed.comm")
"""Modules whose calls wait for other ranks."""

RUNNING, BROKEN, FAILED, DONE = "running", "broken", "failed", "done"


@dataclass(frozen=True)
class Report:
    """What a rank says about itself.

    Attributes:
        host: Its machine.
        beat: Number of this report.
        step: The step under way, counted as in metrics.jsonl.
        span: Part of the step, as in `train.spans`.
        entered: Parts that have begun or ended within this step.
        place: Where its main thread stands.
        waits: Whether that is inside a collective.
        phase: `RUNNING`; `BROKEN`: a collective raised an error; `FAILED`: it raised one of its
            own; or `DONE`.
        error: In one line, if it failed.
        status: Exit status that the error asks for.
    """

    host: str
    beat: int = 0
    step: int = 0
    span: str = "start"
    entered: int = 0
    place: str = ""
    waits: bool = False
    phase: str = RUNNING
    error: str = ""
    status: int = 1


@dataclass(frozen=True)
class Verdict:
    """Why the job must end, in words, and with which exit status."""

    message: str
    status: int = 1


class Judge:
    """Looks at reports again and again and says when the job must end, and why.

    Args:
        reports: First report of each rank to look at, by rank.
        hang_seconds: Without progress of any rank; 0 = no limit.
        silence_seconds: Without a new report of a rank.
        now: Clock in seconds.
    """

    def __init__(
        self,
        reports: Mapping[int, Report],
        *,
        hang_seconds: float,
        silence_seconds: float,
        now: float,
    ) -> None:
        self.hang_seconds = hang_seconds
        self.silence_seconds = silence_seconds
        self._reports = dict(reports)
        self._heard = dict.fromkeys(reports, now)
        self._moved = now
        self._looked = now

    def look(self, reports: Mapping[int, Report], now: float) -> Verdict | None:
        """Take in the newest reports; a verdict if the job must end."""
        self._forgive_own_pause(now)
        for number, report in reports.items():
            if report.beat != self._reports[number].beat:
                self._heard[number] = now
        if {n: _progress(r) for n, r in reports.items()} != {
            n: _progress(r) for n, r in self._reports.items()
        }:
            self._moved = now
        self._reports = dict(reports)
        return self._failed() or self._silent(now) or self._hung(now)

    def lost(self, reason: str) -> Verdict:
        """The verdict of another rank when the store of rank 0 is gone."""
        report = self._reports[0]
        return Verdict(
            f"rank 0 on {report.host} gave no sign of life: its store does not answer "
            f"(last: step {report.step}, {report.span}; {reason})"
        )

    def _forgive_own_pause(self, now: float) -> None:
        """Time in which this process itself stood still counts against nobody."""
        pause = now - self._looked
        if pause > min(5 * BEAT_SECONDS, self.silence_seconds / 2):
            self._heard = {number: heard + pause for number, heard in self._heard.items()}
            self._moved += pause
        self._looked = now

    def _failed(self) -> Verdict | None:
        for number, report in self._reports.items():
            if report.phase == FAILED:
                message = f"rank {number} on {report.host} failed: {report.error}"
                return Verdict(message, report.status)
        return None

    def _silent(self, now: float) -> Verdict | None:
        limit = self.silence_seconds
        if any(report.phase == BROKEN for report in self._reports.values()):
            limit = min(limit, LOST_SECONDS)
        for number, report in self._reports.items():
            silence = now - self._heard[number]
            if report.phase in (RUNNING, BROKEN) and silence > limit:
                return Verdict(
                    f"rank {number} on {report.host} gave no sign of life for {silence:.0f} s "
                    f"(last: step {report.step}, {report.span})",
                )
        return None

    def _hung(self, now: float) -> Verdict | None:
        running = {n: r for n, r in self._reports.items() if r.phase == RUNNING}
        still = now - self._moved
        if not running or not 0 < self.hang_seconds < still:
            return None
        behind = furthest_behind(running)
        if behind:
            whose = f"{_ranks(behind)} {'hold' if len(behind) > 1 else 'holds'} up the others"
        else:
            whose = "none stands out"
        places: dict[str, list[int]] = {}
        for number in sorted(running, key=lambda number: (number not in behind, number)):
            report = running[number]
            text = f"on {report.host}, step {report.step}, {report.span}, at {report.place}"
            places.setdefault(text, []).append(number)
        where = "; ".join(f"{_ranks(numbers)} {text}" for text, numbers in places.items())
        return Verdict(f"no rank has made progress for {still:.0f} s, {whose}: {where}")


def furthest_behind(reports: Mapping[int, Report]) -> list[int]:
    """Ranks that keep the others waiting: fewest parts done, or if all are level, in no collective.

    Returns:
        Their numbers; none if nothing tells them from the others.
    """
    first = min(_progress(report) for report in reports.values())
    behind = [n for n, report in reports.items() if _progress(report) == first]
    if len(behind) == len(reports):
        behind = [number for number, report in reports.items() if not report.waits]
    return behind if len(behind) < len(reports) else []


def outcome_of(error: BaseException) -> dict[str, Any]:
    """The fields of a `Report` that tell of an error which ended a rank."""
    text, is_bad_input = " ".join(str(error).split()), isinstance(error, UserError)
    return {
        "phase": FAILED,
        "error": text if is_bad_input else f"{type(error).__name__}: {text}",
        "status": 2 if is_bad_input else 1,
    }


def standing() -> tuple[str, bool]:
    """Where the main thread of this process stands, and whether that is inside a collective.

    Returns:
        `file:line function` of the innermost call, and of the innermost call of ours if that is
        another; whether a collective waits there.
    """
    frames = list(_outwards(sys._current_frames().get(threading.main_thread().ident or 0)))
    if not frames:
        return "its end", False
    ours = next((frame for frame in frames if _is_ours(frame)), frames[0])
    place = _place(frames[0])
    if ours is not frames[0]:
        place += f", called from {_place(ours)}"
    return place, any(_is_collective(frame) for frame in frames)


def raised_in_collective(error: BaseException) -> bool:
    """Whether `error` came out of a collective, as it does on every rank when one of them dies."""
    if not isinstance(error, RuntimeError):
        return False
    trace = error.__traceback__
    while trace is not None:
        if _is_collective(trace.tb_frame):
            return True
        trace = trace.tb_next
    return re.search(r"\b(gloo|nccl)\b", str(error), re.IGNORECASE) is not None


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _is_collective(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith(COLLECTIVES)


def _is_ours(frame: FrameType) -> bool:
    path = Path(frame.f_code.co_filename)
    return path.is_relative_to(ROOT) and "site-packages" not in path.parts


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    if _is_ours(frame):
        path = path.relative_to(ROOT)
    elif "site-packages" in path.parts:
        path = Path(*path.parts[path.parts.index("site-packages") + 1 :])
    else:
        path = Path(*path.parts[-2:])
    return f"{path}:{frame.f_lineno} {frame.f_code.co_name}"


def _progress(report: Report) -> tuple[int, int]:
    return report.step, report.entered


def _ranks(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:MAX_NAMED]))
    more = f" and {len(numbers) - MAX_NAMED} more" if len(numbers) > MAX_NAMED else ""
    return f"{'ranks' if len(numbers) > 1 else 'rank'} {named}{more}"
