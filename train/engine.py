"""One engine per trainable network: its forward pass, gradients, AdamW and moving average.

Stages talk to engines only, so that the strategy below them can change.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from configs.schema import OptimConfig


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
    themselves, or this rank's slices of them.

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
    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`, which is already divided by the number of micro-batches.

        Args:
            loss: A scalar.
            last: Whether this is the last micro-batch before `step`.
        """

    @abstractmethod
    def _update(self) -> float:
        """Clip, update the masters, clear the gradients; the norm of the gradient before."""

    @property
    @abstractmethod
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW that holds the masters."""

    @abstractmethod
    def _masters_changed(self) -> None:
        """Carry new values of the masters over to the parameters of the network."""

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
        """The whole state dict of the network as float32 copies on the CPU.

        All ranks must call this together.

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

        Masters, moments and step counters of AdamW, moving average, buffers of the module.
        """
        state = {f"master.{i}": master for i, master in enumerate(self._masters())}
        for i, master in enumerate(self._masters()):
            for key, value in self.optimizer.state[master].items():
                state[f"{key}.{i}"] = value
        state |= {f"ema.{i}": average for i, average in enumerate(self._ema)}
        return state | {f"buffer.{key}": buffer for key, buffer in self._buffers()}

    @torch.no_grad()
    def load_shard_state(self, state: Mapping[str, Tensor]) -> None:
        """Bring back what `shard_state` of the same rank returned, bit for bit.

        Raises:
            ValueError: If a tensor is missing, left over, or of another shape.
        """
        expected = {f"master.{i}": master for i, master in enumerate(self._masters())}
        expected |= {f"ema.{i}": average for i, average in enumerate(self._ema)}
        expected |= {f"buffer.{key}": buffer for key, buffer in self._buffers()}
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in state.items():
            if key in expected:
                _check_shape(f"{self.name}/{key}", value, expected[key])
                continue
            kind, _, number = key.rpartition(".")
            if kind not in ("step", "exp_avg", "exp_avg_sq"):
                raise ValueError(f"{self.name}/{key} must be a tensor of this engine, it is not")
            moments.setdefault(int(number), {})[kind] = value
        missing = sorted(expected.keys() - state.keys())
        if missing:
            raise ValueError(f"the state of {self.name} must hold {missing}, they are missing")
        for key, tensor in expected.items():
            tensor.copy_(state[key])
        self._load_moments(moments)
        self._masters_changed()

    def _load_moments(self, moments: dict[int, dict[str, Tensor]]) -> None:
        for i, master in enumerate(self._masters()):
            self.optimizer.state[master].clear()
            for kind, value in moments.get(i, {}).items():
                # AdamW counts its steps in a tensor on the CPU.
                target = "cpu" if kind == "step" else master.device
                self.optimizer.state[master][kind] = value.detach().clone().to(target)

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
        return {key: host_copy(value) for key, value in self.module.state_dict().items()}

    @contextmanager
    def _average_swapped_in(self) -> Iterator[None]:
        own = [master.detach().clone() for master in self._masters()]
        self._set_masters(self._ema)
        try:
            yield
        finally:
            self._set_masters(own)

    @torch.no_grad()
    def _set_masters(self, values: list[Tensor]) -> None:
        for master, value in zip(self._masters(), values, strict=True):
            master.copy_(value)
        self._masters_changed()

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

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`."""
        loss.backward()

    def _masters_changed(self) -> None:
        """Nothing: the masters are the parameters."""

    def _update(self) -> float:
        masters = self._masters()
        for master in masters:
            if master.grad is None:
                master.grad = torch.zeros_like(master)
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])  # type: ignore[misc]
        length = self._check_finite(float(norm))
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.settings.clip, norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return length


def build_single_engines(specs: Mapping[str, EngineSpec]) -> dict[str, Engine]:
    """A `SingleEngine` for every network of `specs` that is trained."""
    return {
        name: SingleEngine(name, spec.module, spec.optim)
        for name, spec in specs.items()
        if spec.optim is not None
    }


def host_copy(value: Tensor) -> Tensor:
    """A contiguous copy on the CPU, in float32 where `value` is of a floating type."""
    dtype = torch.float32 if value.is_floating_point() else value.dtype
    return value.detach().to("cpu", dtype, copy=True).contiguous()


def _check_shape(name: str, found: Tensor, expected: Tensor) -> None:
    if found.shape != expected.shape or found.dtype != expected.dtype:
        raise ValueError(
            f"{name} must be {expected.dtype} of shape {tuple(expected.shape)}, "
            f"found {found.dtype} of shape {tuple(found.shape)}"
        )
