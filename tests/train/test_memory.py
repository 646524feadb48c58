"""Freed memory that stays with the process."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys, torch
from train.memory import keep_freed_memory
if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    tensors = [torch.ones(1 << 20) for _ in range(8)]  # 4 MiB each
    return tensors[0].sum()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_kept_memory_is_not_asked_of_the_kernel_again():
    counts = {
        word: int(subprocess.run([sys.executable, "-c", FAULTS, word],
                                 check=True, capture_output=True, text=True).stdout)
        for word in ("keep", "default")
    }  # fmt: skip
    assert counts["keep"] * 10 < counts["default"], counts
