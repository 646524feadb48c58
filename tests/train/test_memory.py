"""Freed memory that stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from train.memory import keep_freed_memory
assert keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
    return tensors[0].sum()
for _ in range(4):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
PAGES = 10 * 8 * 1024
"""What the ten steps touch."""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_asked_of_the_kernel_again():
    command = [sys.executable, "-c", FAULTS]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert int(done.stdout) < PAGES / 10
