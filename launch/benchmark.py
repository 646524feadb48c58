"""What all benchmarks share: their arguments, the machine, fair timing, peak memory, the record."""

import argparse
import os
import platform
import shlex
import statistics
import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from configs.errors import UserError
from launch.steps import say, write_record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what every benchmark takes."""
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="JSON record")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of torch on the CPU")
    parser.add_argument(
        "--repeats", type=int, default=7, metavar="N", help="medians are over these"
    )


def check_arguments(arguments: argparse.Namespace, *, positive: Sequence[str] = ()) -> None:
    """Raise `UserError` if a benchmark could not run or its record not be written.

    Args:
        arguments: With those of `add_arguments`.
        positive: Further names that must be whole numbers above zero.
    """
    for name in ("threads", "repeats", *positive):
        value = getattr(arguments, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, found {value}")
    if arguments.device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, found {arguments.device!r}; choose one")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda needs a CUDA device, found none; take --device cpu")
    trial = arguments.out.with_name(f"{arguments.out.name}.part")
    try:
        if arguments.out.is_dir():
            raise IsADirectoryError(21, "it is a folder")
        trial.open("w").close()
        trial.unlink()
    except OSError as error:
        raise UserError(
            f"--out must be a file that can be written, found {str(arguments.out)!r} "
            f"({error.strerror}); choose another"
        ) from error


def hardware(device: str) -> dict[str, Any]:
    """The machine as a reader would want to know it."""
    found: dict[str, Any] = {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
    }
    if device == "cuda":
        found["gpu"] = torch.cuda.get_device_name()
    return found


def _processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if platform.system() == "Linux" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def versions() -> dict[str, str | None]:
    """Of what decides about speed; None where it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "triton"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def time_interleaved(
    functions: Mapping[str, Callable[[], Any]], *, repeats: int, device: str
) -> dict[str, float]:
    """Median seconds of each function, all of them in turn, so that a slow minute hits all alike.

    Args:
        functions: By name; each is called once beforehand.
        repeats: Rounds.
        device: Whose work has to be complete before the clock is read.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(repeats + 1):
        for name, function in functions.items():
            _finish(device)
            start = time.perf_counter()
            function()
            _finish(device)
            if number:
                seconds[name].append(time.perf_counter() - start)
        if number:
            last = ", ".join(f"{name} {values[-1]:.3f} s" for name, values in seconds.items())
            say(f"round {number}/{repeats}: {last}")
    return {name: statistics.median(values) for name, values in seconds.items()}


def _finish(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def peak_allocated(function: Callable[[], Any], *, device: str | None = None) -> int:
    """Bytes of tensors at the peak of a call, above what there was when it began.

    On CUDA the allocator itself tells. On a CPU torch's allocator keeps no count, and a profile of
    it takes gigabytes for a call of seconds; there, every operator's results are followed from
    the moment they are returned until their memory is freed, in bounded memory and some 20
    microseconds per operator. Not seen are an operator's own work space, tensors that no
    operator made (from numpy, say), memory outside torch, and that memory from before is freed.

    Args:
        function: Called once.
        device: cpu or cuda; if not given, cuda where there is one.
    """
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _Meter() as meter:
        function()
    return meter.peak


class _Meter(TorchDispatchMode):
    """Counts the bytes of CPU storages that operators make while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._sizes: dict[int, int] = {}  # of living storages made in the call
        self._watches: dict[int, weakref.ref] = {}  # all living storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator; what it was given and we do not know was there before."""
        kwargs = kwargs or {}
        for given in tree_iter((args, kwargs)):
            if isinstance(given, Tensor):
                self._watch(given, is_ours=False)
        result = func(*args, **kwargs)
        for made in tree_iter((result, kwargs)):  # `out` may have been resized
            if isinstance(made, Tensor):
                self._watch(made, is_ours=True)
        self.peak = max(self.peak, self.current)
        return result

    def _watch(self, tensor: Tensor, *, is_ours: bool) -> None:
        if tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._watches:
            self._watches[key] = weakref.ref(storage, lambda _: self._forget(key))
            if is_ours:
                self._sizes[key] = 0
        if key in self._sizes:
            self.current += storage.nbytes() - self._sizes[key]
            self._sizes[key] = storage.nbytes()

    def _forget(self, key: int) -> None:
        self.current -= self._sizes.pop(key, 0)
        del self._watches[key]


def write_result(
    arguments: argparse.Namespace,
    result: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    *,
    verb: str,
) -> None:
    """Write the record of a benchmark: its result, or each of several, with command and machine."""
    others = ("name", "act", "config")
    given = {name: value for name, value in vars(arguments).items() if name not in others}
    words = [shlex.quote(word) for word in getattr(arguments, "config", [])]
    words += [f"--{name.replace('_', '-')} {shlex.quote(str(v))}" for name, v in given.items()]
    about = {
        "command": f"python -m launch bench {verb} {' '.join(words)}",
        "threads": torch.get_num_threads(),
        "repeats": arguments.repeats,
        "device": arguments.device,
        "hardware": hardware(arguments.device),
        "versions": versions(),
    }
    if isinstance(result, Mapping):
        write_record(arguments.out, about | dict(result))
    else:
        write_record(arguments.out, [about | dict(one) for one in result])
    say(f"written to {arguments.out}")
