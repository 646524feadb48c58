"""What steps of training cost: seconds by part, rates, floating-point operations."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from train.flops import count_flops
from train.hardware import peak_flops
from train.ranks import world_size
from train.spans import SPANS

if TYPE_CHECKING:
    from train.stage import Stage

FLOPS, SAMPLES = "speed/flops", "speed/samples"
"""Of a step on one rank; sums that become rates in a row."""


class Speedometer:
    """Measures the steps of a stage. All its keys start with `speed/`.

    FLOPs are counted in the first step of each kind on each size of batch and remembered, in
    `Stage.counters`, so that a run that continues counts at the same steps as one that never
    stopped: a counting step runs without compiled code, whose last bits differ.

    Attributes:
        latest: Of the last step.
        has_counted: Whether the last step was slowed down by counting.
        peak_tflops: `trainer.peak_tflops`.
    """

    def __init__(self, stage: "Stage") -> None:
        self.latest: dict[str, float] = {}
        self.has_counted = False
        self.peak_tflops = 0.0
        self._stage = stage
        self._end = time.perf_counter()

    def start(self) -> None:
        """Begin with the wait for the first batch."""
        self._stage.spans.take()
        self._stage.spans.begin("data")
        self._end = time.perf_counter()

    @contextmanager
    def step(self, batch: Any) -> Iterator[None]:
        """Measure the block as one step on `batch`; ends the part `data`."""
        stage, size = self._stage, len(batch.seeds)
        kind = f"flops/{stage.step_kind(stage.completed)}/{size}"
        self.has_counted = kind not in stage.counters
        stage.spans.begin("other")
        start = time.perf_counter()
        with count_flops(stage.modules()) if self.has_counted else nullcontext() as counter:
            yield
        if counter is not None:
            stage.counters[kind] = counter.total
        parts = stage.spans.take()
        now = time.perf_counter()
        self.latest = {
            "speed/step_seconds": now - start,
            "speed/wait_seconds": start - self._end,
            FLOPS: float(stage.counters[kind]),
            SAMPLES: float(size * world_size()),
        }
        for name in (*SPANS, "other"):
            self.latest[f"speed/{name}_seconds"] = parts.get(name, 0.0)
        self._end = now

    def row(self, means: Mapping[str, float]) -> dict[str, float]:
        """Means over steps and ranks with sums replaced by rates, which follow from the means.

        `speed/tflops_per_second` is that of one device; `speed/mfu` is it over the peak, where
        that is known: most bfloat16 products per second, whatever the precision of the run.
        """
        row, stage = dict(means), self._stage
        flops, samples = row.pop(FLOPS), row.pop(SAMPLES)
        seconds = row["speed/step_seconds"] + row["speed/wait_seconds"]
        frames = samples * stage.config.frames
        row["speed/samples_per_second"] = samples / seconds
        row["speed/frames_per_second"] = frames / seconds
        row["speed/tokens_per_second"] = frames * stage.frame_seq_len / seconds
        row["speed/tflops_per_second"] = flops / seconds / 1e12
        peak = peak_flops(stage.device, self.peak_tflops)
        if peak is not None:
            row["speed/mfu"] = flops / seconds / peak
        return row
