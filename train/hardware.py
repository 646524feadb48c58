"""What the device of this process can do at most, and how much of its memory is in use."""

import os
import resource
from pathlib import Path

import torch

PEAK_FLOPS = {
    "B200": 2250e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "GH200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense bfloat16 products per second by words of the device's name; the first that fits counts.

Source: NVIDIA's data sheets of each product (tensor cores, bfloat16; where a sheet gives the
number with sparsity, half of it).
"""

MEMORY_GB = {
    "B200": 180,
    "H200 NVL": 141,
    "H200": 141,
    "GH200": 96,
    "H100 NVL": 94,
    "H100 PCIe": 80,
    "H100": 80,
    "A100": 80,
    "L40S": 48,
    "RTX 4090": 24,
}
"""Memory in GB (1e9 bytes) of the same devices; of an A100, the larger one."""


def peak_flops(device: torch.device, given_tflops: float = 0.0) -> float | None:
    """Most floating-point operations per second that `device` could do in bfloat16.

    Args:
        device: Of this process.
        given_tflops: `trainer.peak_tflops`; 0 = look the device up.

    Returns:
        None for a device that is not in `PEAK_FLOPS`, such as any CPU.
    """
    if given_tflops > 0:
        return given_tflops * 1e12
    if device.type != "cuda":
        return None
    return peak_of_name(torch.cuda.get_device_name(device))


def peak_of_name(name: str) -> float | None:
    """The entry of `PEAK_FLOPS` whose words are all in a device's name, or None."""
    words = set(name.replace("-", " ").split())
    if "Laptop" in words:
        return None
    fitting = (peak for key, peak in PEAK_FLOPS.items() if set(key.split()) <= words)
    return next(fitting, None)


_peaks: dict[torch.device, int] = {}
"""Most bytes allocated on a CUDA device since `forget_peaks`, up to the last `take_memory`."""


def forget_peaks() -> None:
    """Let `peak_gigabytes` begin anew, with what torch has counted since the last `take_memory`."""
    _peaks.clear()


def peak_gigabytes(device: torch.device) -> float:
    """Most memory in GB (1e9 bytes) that this process has held, whatever `take_memory` has reset.

    Returns:
        On CUDA allocated on `device` since `forget_peaks`; on a CPU resident since the process
        began.
    """
    if device.type == "cuda":
        return _note_peak(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # KiB on Linux


def _note_peak(device: torch.device) -> int:
    _peaks[device] = max(_peaks.get(device, 0), torch.cuda.max_memory_allocated(device))
    return _peaks[device]


def take_memory(device: torch.device) -> dict[str, float]:
    """Memory in GB (1e9 bytes), by metric.

    Returns:
        On CUDA `memory/allocated_gb` and `memory/reserved_gb`, the peaks since the last call. On a
        CPU `memory/resident_gb`, what this process holds now, where /proc tells.
    """
    if device.type == "cuda":
        _note_peak(device)
        found = {
            "memory/allocated_gb": torch.cuda.max_memory_allocated(device) / 1e9,
            "memory/reserved_gb": torch.cuda.max_memory_reserved(device) / 1e9,
        }
        torch.cuda.reset_peak_memory_stats(device)
        return found
    table = Path("/proc/self/statm")
    if not table.exists():
        return {}
    pages = int(table.read_text().split()[1])
    return {"memory/resident_gb": pages * os.sysconf("SC_PAGE_SIZE") / 1e9}
