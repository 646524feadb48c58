"""One engine per trainable network: its forward pass, gradients, AdamW and moving average.

Stages talk to engines only, so that the strategy below them can change.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from configs.schema import OptimConfig
from train.ranks import rank

EMA_VERSION = 1
"""Of the way in which averages are kept: a blend towards the float32 masters after each step."""


class NonFiniteGradientError(RuntimeError):
    """A gradient became infinite or undefined; training must stop at its last checkpoint.

    Attributes:
        norm: Of the gradient.
    """

    norm = float("nan")


@dataclass(frozen=True)
class EngineSpec:
    """A network and how it is trained; without `optim` it is frozen and gets no engine."""

    module: nn.Module
    optim: OptimConfig | None


@dataclass(frozen=True)
class Piece:
    """Some consecutive elements of a parameter, and where they lie in the masters of a rank.

    Attributes:
        name: Of the parameter.
        start: First element, of the flattened parameter.
        length: Number of elements.
        master: Number of the master.
        offset: Place of the first element in the flattened master.
    """

    name: str
    start: int
    length: int
    master: int
    offset: int


def build_optimizer(
    module: nn.Module, settings: OptimConfig, *, is_fused: bool
) -> torch.optim.AdamW:
    """AdamW over all trainable parameters of `module`, in one group.

    Args:
        module: The network.
        settings: Of the optimiser.
        is_fused: One pass over memory: several times faster with many small tensors, but the last
            bit of a weight may depend on where it lies in memory, so not for slices.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(
        parameters,
        lr=settings.lr,
        betas=(settings.betas[0], settings.betas[1]),
        weight_decay=settings.weight_decay,
        foreach=not is_fused,
        fused=is_fused,
    )


class Engine(ABC):
    """A trainable network with its optimiser.

    The float32 tensors that the optimiser updates are called masters. They are the parameters
    themselves, the same on all ranks; engines that hold slices of them override what differs.

    Attributes:
        name: Of the network, as in `StageConfig.optimizers`.
        module: The bare network. Call the engine, not the module, where gradients are wanted.
        settings: Of the optimiser.
    """

    def __init__(self, name: str, module: nn.Module, settings: OptimConfig) -> None:
        self.name = name
        self.module: Any = module
        self.settings = settings
        self._ema: list[Tensor] = []

    @abstractmethod
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the network."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`, which is already divided by the number of micro-batches."""

    @abstractmethod
    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Around the forward and backward passes of one micro-batch.

        Args:
            last: Whether it is the last one before `step`; ranks need to agree only then.
        """

    def layout(self) -> list[Piece]:
        """What the masters of this rank are made of; padding is left out."""
        named = [(name, p) for name, p in self.module.named_parameters() if p.requires_grad]
        return [Piece(name, 0, p.numel(), number, 0) for number, (name, p) in enumerate(named)]

    @property
    def is_written_here(self) -> bool:
        """Whether a checkpoint takes this rank's masters, or those of another that are the same."""
        return rank() == 0

    @abstractmethod
    def _update(self) -> float:
        """Clip, update the masters, clear the gradients; the norm of the gradient before."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that holds the masters."""

    def _masters_changed(self) -> None:
        """Carry new values of the masters over to the parameters of the network."""
        return

    def close(self) -> None:
        """Let go of everything outside this object; the engine is of no use afterwards."""
        return

    def step(self, lr: float) -> float:
        """Clip by norm, one step of AdamW, clear the gradients, update the moving average.

        A parameter without a gradient counts as one with a gradient of zero.

        Args:
            lr: Learning rate of this step.

        Returns:
            Norm of the gradient over all parameters and ranks, before clipping.

        Raises:
            NonFiniteGradientError: If that norm is infinite or undefined.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = self._update()
        if self._ema:
            with torch.no_grad():
                torch._foreach_lerp_(self._ema, self._masters(), 1 - self.settings.ema)
        return norm

    def weights(self, ema: bool = False) -> dict[str, Tensor]:
        """The whole state dict of the network as float32 copies on the CPU, on rank 0.

        All ranks must call this together; the others get an empty dictionary.

        Args:
            ema: Whether to return the moving average of the parameters in their place.

        Raises:
            ValueError: If the moving average is asked for and `OptimConfig.ema` is 0.
        """
        if not ema:
            return self._state_copy()
        if not self._ema:
            raise ValueError(
                f"optimizers.{self.name}.ema must be above 0 for averaged weights to exist, "
                "found 0; set it, or ask for the weights themselves"
            )
        with self._average_swapped_in():
            return self._state_copy()

    def shard_state(self) -> dict[str, Tensor]:
        """Everything exact that this rank holds of the network: references, not copies.

        Masters, moments and step counters of AdamW, moving average, buffers of the module; flat,
        but for buffers. Empty if not `is_written_here`.
        """
        if not self.is_written_here:
            return {}
        state = {f"master.{i}": master.flatten() for i, master in enumerate(self._masters())}
        for i, master in enumerate(self._masters()):
            for key, value in self.optimizer.state[master].items():
                state[f"{key}.{i}"] = value.flatten()
        if self._ema:
            state |= {f"ema.{i}": average.flatten() for i, average in enumerate(self._ema)}
            state["ema_version"] = torch.tensor([EMA_VERSION])
        return state | {f"buffer.{key}": buffer for key, buffer in self._buffers()}

    @torch.no_grad()
    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        """Take in what `train.restore.assemble` made for this rank, bit for bit.

        Args:
            state: Like `shard_state`: everything in `held_tensors`, and moments if there are any.
        """
        for key, tensor in self.held_tensors().items():
            tensor.copy_(state[key].view_as(tensor))
        for i, master in enumerate(self._masters()):
            own = self.optimizer.state[master]
            own.clear()
            if "exp_avg.0" in state:
                own["step"] = state[f"step.{i}"].reshape(()).clone().to(self._step_device(master))
                for kind in ("exp_avg", "exp_avg_sq"):
                    own[kind] = state[f"{kind}.{i}"].view_as(master).clone().to(master.device)
        self._masters_changed()

    def _step_device(self, master: Tensor) -> torch.device:
        """Where AdamW counts the steps of a master: fused kernels want the number beside it."""
        is_fused = bool(self.optimizer.param_groups[0].get("fused"))
        return master.device if is_fused else torch.device("cpu")

    def held_tensors(self) -> dict[str, Tensor]:
        """Masters, moving average and buffers of this rank, by their keys in `shard_state`."""
        held = {f"master.{i}": master for i, master in enumerate(self._masters())}
        held |= {f"ema.{i}": average for i, average in enumerate(self._ema)}
        return held | {f"buffer.{key}": buffer for key, buffer in self._buffers()}

    def _start_average(self) -> None:
        if self.settings.ema > 0:
            self._ema = [master.detach().clone() for master in self._masters()]

    def _masters(self) -> list[Tensor]:
        return [master for group in self.optimizer.param_groups for master in group["params"]]

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        parameters = {name for name, _ in self.module.named_parameters()}
        for key, value in self.module.state_dict().items():
            if key not in parameters:
                yield key, value

    def _state_copy(self) -> dict[str, Tensor]:
        if rank() != 0:
            return {}
        return {key: host_copy(value) for key, value in self.module.state_dict().items()}

    @contextmanager
    def _average_swapped_in(self) -> Iterator[None]:
        self._exchange_average()
        try:
            yield
        finally:
            self._exchange_average()

    @torch.no_grad()
    def _exchange_average(self) -> None:
        for master, average in zip(self._masters(), self._ema, strict=True):
            own = master.detach().clone()
            master.copy_(average)
            average.copy_(own)
        self._masters_changed()

    def _clip(self) -> float:
        """Scale the gradients of whole masters down to the norm that is set; the norm before."""
        masters = self._masters()
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])  # type: ignore[misc]
        length = self._check_finite(float(norm))
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.settings.clip, norm)
        return length

    def _check_finite(self, norm: float) -> float:
        if not (0 <= norm < float("inf")):
            error = NonFiniteGradientError(
                f"the gradient of {self.name!r} must be finite, its norm is {norm}; lower "
                f"optimizers.{self.name}.lr or clip harder, then continue from the last checkpoint"
            )
            error.norm = norm
            raise error
        return norm


class SingleEngine(Engine):
    """A network trained by one process with plain AdamW."""

    def __init__(self, name: str, module: nn.Module, settings: OptimConfig) -> None:
        super().__init__(name, module, settings)
        self._optimizer = build_optimizer(module, settings, is_fused=True)
        self._start_average()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW whose masters are the parameters."""
        return self._optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the network."""
        return self.module(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def _update(self) -> float:
        for master in self._masters():
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = self._clip()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return norm


class ReplicatedEngine(SingleEngine):
    """A network that every rank holds whole; ranks average their gradients (DDP)."""

    def __init__(self, name: str, module: nn.Module, settings: OptimConfig) -> None:
        super().__init__(name, module, settings)
        self._wrapped = DistributedDataParallel(module, broadcast_buffers=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the network."""
        return self._wrapped(*args, **kwargs)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """Gradients are averaged in the last one."""
        return nullcontext() if last else self._wrapped.no_sync()


def build_engines(
    specs: Mapping[str, EngineSpec], engine_type: type[SingleEngine]
) -> dict[str, Engine]:
    """An engine for every network of `specs` that is trained."""
    return {
        name: engine_type(name, spec.module, spec.optim)
        for name, spec in specs.items()
        if spec.optim is not None
    }


def host_copy(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU, in float32 where `value` is of a floating type."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()
