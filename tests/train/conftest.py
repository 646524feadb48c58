import os
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SECONDS = 240


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def run_program():
    """run_program(module, words, ranks=1) -> exit statuses; ranks that hang are killed."""

    def run(module, *words, ranks: int = 1, seconds: float = SECONDS) -> list[int]:
        command = [sys.executable, "-m", module, *map(str, words)]
        shared = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        if ranks > 1:
            shared |= {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free_port()),
                "WORLD_SIZE": str(ranks),
                "LOCAL_WORLD_SIZE": str(ranks),
                "GROUP_RANK": "0",
                "TORCHELASTIC_RUN_ID": "toy",
            }
        processes = []
        for number in range(ranks):
            own = {"RANK": str(number), "LOCAL_RANK": str(number)} if ranks > 1 else {}
            processes.append(subprocess.Popen(command, env=shared | own, cwd=ROOT))
        deadline = time.monotonic() + seconds
        try:
            return [process.wait(deadline - time.monotonic()) for process in processes]
        finally:
            for process in processes:
                process.kill()

    return run


@pytest.fixture(scope="session")
def run_toy(run_program):
    """run_toy(words, ranks=1, seconds=...) -> exit statuses of the toy program."""
    return partial(run_program, "tests.train.toy")


@pytest.fixture(scope="session")
def run_python():
    """run_python(code) -> exit status of a fresh interpreter at the root of the checkout."""

    def run(code: str) -> int:
        own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, env=own, cwd=ROOT, timeout=SECONDS, check=False).returncode

    return run
