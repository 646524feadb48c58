"""What the C library does with memory that PyTorch frees on the CPU."""

import ctypes
import platform

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
