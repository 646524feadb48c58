"""How many floating-point operations a step of training is, counted while it runs."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from models.block import Block

aten = torch.ops.aten


def attention_flops(query: torch.Size, key: torch.Size, value: torch.Size) -> int:
    """Of softmax attention, both products; masked pairs count.  [B, N, S, D] each."""
    return int(sdpa_flop_count(query, key, value))


def _attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
    return attention_flops(query.shape, key.shape, value.shape)


def _attention_backward(grad: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> int:
    # Four products. Kernels that make the scores once more do a fifth, which trains nothing.
    return 2 * attention_flops(query.shape, key.shape, value.shape)


KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
FORMULAS: dict[Any, Callable[..., int]] = {
    getattr(aten, f"_scaled_dot_product_{kernel}{ending}"): formula
    for kernel in KERNELS
    for ending, formula in (("", _attention), ("_backward", _attention_backward))
}
"""Attention counts alike in every kernel; torch's registry lacks the CPU's and adds the fifth
product of the others."""


class FlopCounter(TorchDispatchMode):
    """Counts the matrix products, convolutions and attention that run while it is on.

    What a multiplication and an addition do counts as two. Not counted: all that goes value by
    value, activations that are recomputed for the backward pass, and kernels that torch does not
    dispatch (the Triton kernel of salience targets).

    Attributes:
        total: So far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator as it would run otherwise, and count it."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        operator = func.overloadpacket
        # With gradients enabled within a backward pass: activations are being recomputed.
        is_repeated = torch._C._current_graph_task_id() != -1 and torch.is_grad_enabled()
        if not is_repeated:
            if operator in FORMULAS:
                self.total += FORMULAS[operator](*args, **kwargs)
            elif operator in flop_registry:
                self.total += flop_registry[operator](*args, **kwargs, out_val=result)
        return result


@contextmanager
def count_flops(modules: Iterable[nn.Module]) -> Iterator[FlopCounter]:
    """Count what runs in the block; compiled layers run as they were written meanwhile.

    Args:
        modules: All that may be compiled.
    """
    with FlopCounter() as counter:
        if any(isinstance(module, Block) and module.is_compiled for module in modules):
            # Or else torch would see a counter at work and never compile these layers again.
            with torch.compiler.set_stance("force_eager"):
                yield counter
        else:
            yield counter
