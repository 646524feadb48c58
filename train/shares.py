"""What a rank holds of a network under every strategy, in bytes, from the sizes of its parameters.

The same numbers as `train/strategy.py` makes come true, but before anything is allocated. Weights,
gradients and optimiser states are float32 everywhere. Where DeepSpeed's layout decides, this is
that of release 0.19; a test compares with what its engines hold.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from configs.schema import TrainerConfig

FLOAT = 4
"""Bytes of a float32."""
BUCKET = 500_000_000
"""Elements of the buffer through which DeepSpeed sends gradients (`reduce_bucket_size`)."""
LIVE = 1_000_000_000
"""Parameters that ZeRO-3 keeps whole at once, at most (`stage3_max_live_parameters`)."""


@dataclass(frozen=True)
class Share:
    """Bytes of one network on one rank. What is offloaded lies on the host, all else on the device.

    Attributes:
        parameters: The weights that forward passes read, or the rank's part of them.
        masters: Float32 weights that the optimiser updates, where they are not the parameters.
        moments: Both of AdamW; there from the first step on.
        averages: Moving average of the weights.
        gradients: The most that exists at once in a step.
        buffers: Gradients on their way to other ranks; whole weights that ZeRO-3 collects.
        is_offloaded: Whether masters, moments and averages lie on the host, and `host_buffers`.
        host_buffers: Gradients and new weights there.
    """

    parameters: int
    masters: int = 0
    moments: int = 0
    averages: int = 0
    gradients: int = 0
    buffers: int = 0
    is_offloaded: bool = False
    host_buffers: int = 0

    @property
    def states(self) -> int:
        """Bytes that the optimiser keeps from step to step."""
        return self.masters + self.moments + self.averages

    @property
    def saved(self) -> int:
        """Bytes that this rank brings into a checkpoint: weights once, and the rest."""
        return self.states + (0 if self.masters else self.parameters)

    @property
    def device(self) -> int:
        """Bytes on the device at the peak."""
        kept = 0 if self.is_offloaded else self.states
        return self.parameters + kept + self.gradients + self.buffers

    @property
    def host(self) -> int:
        """Bytes on the host."""
        return self.states + self.host_buffers if self.is_offloaded else 0


def frozen_share(
    sizes: Sequence[int], trainer: TrainerConfig, world: int, *, adapter: Sequence[int] = ()
) -> Share:
    """Of weights that are only read: whole, but under ZeRO-3.

    Args:
        sizes: Elements of each parameter.
        trainer: Strategy.
        world: Ranks.
        adapter: Elements of the parameters of the adapter that is trained above them, if any.
    """
    is_taken_apart = adapter or any(size > trainer.persistent_params for size in sizes)
    if not (_zero_stage(trainer) == 3 and is_taken_apart):
        return Share(parameters=FLOAT * sum(sizes))
    live = _live([*sizes, *adapter], trainer) - _live(adapter, trainer)
    return Share(_sharded(sizes, trainer, world), buffers=FLOAT * live)


def trained_share(
    sizes: Sequence[int], trainer: TrainerConfig, world: int, *, has_average: bool, rank: int = 0
) -> Share:
    """Of a network in training.

    Args:
        sizes: Elements of each trainable parameter, in the network's order.
        trainer: Strategy.
        world: Ranks.
        has_average: Whether `OptimConfig.ema` is above 0.
        rank: Whose share; ranks differ in gradients alone, and only under ZeRO-1 and 2.
    """
    whole, zero = FLOAT * sum(sizes), _zero_stage(trainer)
    if zero in (None, 0):
        buffers = {"single": 0, "ddp": whole}.get(trainer.strategy, min(whole, FLOAT * BUCKET))
        average = whole if has_average else 0
        return Share(whole, moments=2 * whole, averages=average, gradients=whole, buffers=buffers)
    part = FLOAT * part_size(sizes, zero, world)
    return Share(
        parameters=part * world if zero < 3 else _sharded(sizes, trainer, world),
        masters=part,
        moments=2 * part,
        averages=part if has_average else 0,
        buffers=FLOAT * (BUCKET if zero < 3 else BUCKET + _live(sizes, trainer)),
        is_offloaded=trainer.offload_optimizer,
        **_gradients(sizes, trainer, world, rank, part),
    )


def part_size(sizes: Sequence[int], zero: int, world: int) -> int:
    """Elements of a rank's part of a network, padding included.

    ZeRO-1 and 2 cut all parameters in a row into parts of an even number of elements each; ZeRO-3
    cuts every parameter.
    """
    if zero == 3:
        return sum(-(-size // world) for size in sizes)
    unit = 2 * world
    return -(-sum(sizes) // unit) * unit // world


def _zero_stage(trainer: TrainerConfig) -> int | None:
    return trainer.zero_stage if trainer.strategy == "deepspeed" else None


def _sharded(sizes: Sequence[int], trainer: TrainerConfig, world: int) -> int:
    """Bytes of a rank's part of every parameter under ZeRO-3, and of the small ones as a whole."""
    small = sum(size for size in sizes if size <= trainer.persistent_params)
    return FLOAT * (part_size(sizes, 3, world) + small)


def _live(sizes: Sequence[int], trainer: TrainerConfig) -> int:
    """Elements of large parameters that are whole at once, at most."""
    return min(LIVE, sum(size for size in sizes if size > trainer.persistent_params))


def _gradients(
    sizes: Sequence[int], trainer: TrainerConfig, world: int, rank: int, part: int
) -> dict[str, int]:
    """Bytes of gradients on the device, and with offloading on the host."""
    zero, whole = trainer.zero_stage, FLOAT * sum(sizes)
    if trainer.offload_optimizer and zero == 3:
        return {"gradients": 0, "host_buffers": 2 * part}
    # ZeRO-1 has them all when the backward pass ends, and then sends them through the bucket.
    arriving = whole if zero == 1 else 0
    if trainer.offload_optimizer:
        largest = FLOAT * max(sizes)
        # Gradients and new weights of the part, and a parameter on its way, on either side.
        return {"gradients": arriving + largest, "host_buffers": 2 * part + largest}
    if zero == 3:
        return {"gradients": part}
    kept = FLOAT * crossing(sizes, world, rank)
    return {"gradients": max(arriving, kept + max(0, arriving - FLOAT * BUCKET))}


def crossing(sizes: Sequence[int], world: int, rank: int) -> int:
    """Elements of the parameters of which a rank's part under ZeRO-1 or 2 has some, as wholes.

    Padding at the end of the last part is among them.
    """
    part = part_size(sizes, 2, world)
    low, high = rank * part, (rank + 1) * part
    placed = zip(sizes, accumulate(sizes), strict=True)
    whole = sum(size for size, end in placed if end > low and end - size < high)
    return whole + max(0, high - max(low, sum(sizes)))


def exchanged_bytes(sizes: Sequence[int], trainer: TrainerConfig, world: int) -> int:
    """Bytes that a rank sends so that one pass of a network finds its weights: ZeRO-3 alone.

    Args:
        sizes: Elements of each parameter.
        trainer: Strategy.
        world: Ranks.
    """
    if _zero_stage(trainer) != 3:
        return 0
    large = sum(size for size in sizes if size > trainer.persistent_params)
    return FLOAT * large * (world - 1) // world


def update_bytes(sizes: Sequence[int], trainer: TrainerConfig, world: int) -> int:
    """Bytes that a rank sends for an update: gradients, and new weights where they are split.

    A ring's all-reduce sends everything twice, a reduce-scatter or an all-gather once. DeepSpeed
    all-reduces the buckets of ZeRO-1 and 2.
    """
    zero = _zero_stage(trainer)
    times = {None: 2, 0: 2, 1: 3, 2: 3, 3: 1}[zero]
    return times * FLOAT * sum(sizes) * (world - 1) // world
