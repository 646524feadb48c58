"""The few agreements that ranks make; every function works without a process group, too."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def is_distributed() -> bool:
    """Whether a process group with more than one rank exists."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Number of this process, 0 if it is alone."""
    return dist.get_rank() if is_distributed() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if is_distributed() else 1


def barrier() -> None:
    """Return when every rank has come here."""
    if is_distributed():
        dist.barrier()


def host_group(timeout: timedelta) -> Any:
    """A group of all ranks that talks from host to host, for use in a thread of its own.

    All ranks must call this together. None where there is no process group.

    Args:
        timeout: Longest wait of a rank for another.
    """
    return dist.new_group(backend="gloo", timeout=timeout) if is_distributed() else None


def on_any_rank(*flags: bool, device: torch.device | str = "cpu") -> tuple[bool, ...]:
    """Whether each flag holds on at least one rank.

    Args:
        flags: Of this rank; all ranks give as many.
        device: One that the process group can reduce on.
    """
    if not is_distributed():
        return flags
    values = torch.tensor(flags, dtype=torch.int32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    return tuple(bool(value) for value in values.tolist())


def gather_objects(value: Any, group: Any = None) -> list[Any]:
    """`value` of every rank, in rank order, on every rank.

    Args:
        value: Anything that can be pickled.
        group: From `host_group`; None = the group that training uses.
    """
    if not is_distributed():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values
