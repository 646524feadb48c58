"""Memory of a process: blocks that PyTorch frees on the CPU, weights mapped from files."""

import ctypes
import platform

import torch
from torch import nn

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3
"""Names of glibc's malloc.h."""


def keep_freed_memory() -> bool:
    """Let this process keep freed memory for its next tensors.

    By default glibc hands every large block back to the kernel and gets a fresh one, page by page
    and filled with zeros, for the next tensor: a fifth of a training step of a small network on
    one thread, less on more.

    Returns:
        Whether the C library is glibc and took the settings; others are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    # 32 MiB is the largest threshold that glibc takes; larger blocks still go back.
    settings = {M_MMAP_THRESHOLD: 32 << 20, M_TRIM_THRESHOLD: 2**31 - 1, M_TOP_PAD: 64 << 20}
    return all(libc.mallopt(key, value) == 1 for key, value in settings.items())


def settle(module: nn.Module, device: torch.device) -> None:
    """Give every tensor of `module` memory of its own on `device`, floats as float32.

    Until then weights may be mapped from a file, in the dtype of the file; they are taken over one
    by one, so that no second copy of the network exists on the way.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
        tensor.data = tensor.data.to(device, dtype, copy=True)
