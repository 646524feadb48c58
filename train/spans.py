"""Where the time of a step goes, and where a rank is just now."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SPANS = ("data", "rollout", "score", "backward", "optimizer", "checkpoint")
"""What a step is made of: waiting for the batch; generating; losses, the networks that judge
included; gradients; updates and moving averages; copying and writing the state."""


class Spans:
    """A stop-watch per part of a step. Parts do not nest: an inner one interrupts the outer.

    Attributes:
        current: Part that is under way, or "other".
        entered: Parts that have begun or ended so far; does not stand still while a rank works on.
        seconds: Time spent in each part since the last `take`.
        synchronise: Called before every reading of the clock, for devices that work ahead.
    """

    def __init__(self) -> None:
        self.current = "other"
        self.entered = 0
        self.seconds: dict[str, float] = {}
        self.synchronise: Callable[[], None] | None = None
        self._since = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Count the time of the block as `name`, one of `SPANS`."""
        assert name in SPANS, name
        outer = self.current
        self.begin(name)
        try:
            yield
        finally:
            self.begin(outer)

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call, "other" among them; starts anew."""
        self.begin(self.current)
        taken, self.seconds = self.seconds, {}
        return taken

    def begin(self, name: str) -> None:
        """Count the time from now on as `name`, one of `SPANS` or "other"."""
        if self.synchronise is not None:
            self.synchronise()
        now = time.perf_counter()
        self.seconds[self.current] = self.seconds.get(self.current, 0.0) + now - self._since
        self.current, self._since = name, now
        self.entered += 1
