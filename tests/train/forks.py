"""Runs by forked ranks: the libraries are imported once, which takes longer than a run.

python -m tests.train.forks RESULTS LIMIT < WAVES, both JSON. A wave is what runs at the same time:
name of a run to the words of its command line. The results are the exit status, seconds and
standard error of each rank: two, or as many as "ranks" says. The program is the toy, or
the one under "program". If a case has a list under "nodes", each rank is a node of its own, in that
network namespace and with those variables.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from tests.launch import held
from tests.train import exact, toy
from tests.train.conftest import ROOT, free_port

LIMIT = 150
"""Seconds of a wave, after which what still runs is killed."""


PROGRAMS = {"toy": toy.main, "exact": exact.main, "held": held.main}


def run_cases(*waves: dict[str, dict], folder: Path) -> dict[str, list[dict]]:
    """Run cases, wave after wave, from a process of their own; what became of the ranks of each."""
    results = folder / "results.json"
    environ = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    command = ["timeout", "-k", "10", str(60 + LIMIT * len(waves))]
    command += [sys.executable, "-m", "tests.train.forks", results]
    subprocess.run(command, input=json.dumps(waves), text=True, env=environ, cwd=ROOT, check=True)
    return json.loads(results.read_text())


def main(results: Path) -> None:
    """Run all waves."""
    found: dict[str, list[dict]] = {}
    waves = json.load(sys.stdin)
    if any("lora" in case["words"] for wave in waves for case in wave.values()):
        import peft  # noqa: F401  5 s, once for all ranks
    for wave in waves:
        found |= run_wave(wave, results)
    results.write_text(json.dumps(found))


def run_wave(cases: dict[str, dict], results: Path) -> dict[str, list[dict]]:
    """Run all cases at the same time: they mostly wait."""
    started = {name: start_ranks(case, results.parent / name) for name, case in cases.items()}
    ended = wait_for(list(started.values()), limit=LIMIT)
    return {
        name: [
            {
                "status": ended[pid][0],
                "seconds": ended[pid][1],
                "stderr": (results.parent / name / f"stderr-{number}").read_text(),
            }
            for number, pid in enumerate(pids)
        ]
        for name, pids in started.items()
    }


def start_ranks(case: dict, folder: Path) -> list[int]:
    """Fork the ranks of one case; their process numbers."""
    nodes, program = case.get("nodes"), PROGRAMS[case.get("program", "toy")]
    ranks = case.get("ranks", 2)
    folder.mkdir()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
    }
    pids = []
    for number in range(ranks):
        pid = os.fork()
        if pid == 0:
            os.environ.update(shared | {"RANK": str(number), "LOCAL_RANK": str(number)})
            if nodes is not None:
                own = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
                os.environ.update(own | nodes[number]["environ"])
                enter_namespace(nodes[number]["namespace"])
            where = case.get("folder", str(folder))
            become_rank(program, [where, *case["words"]], folder / f"stderr-{number}")
        pids.append(pid)
    return pids


def enter_namespace(name: str) -> None:
    """Let this process have the network of a namespace that `ip netns` made."""
    with Path(f"/run/netns/{name}").open() as file:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(file.fileno(), 0) != 0:
            raise OSError(ctypes.get_errno(), f"namespace {name}")


def become_rank(program: Callable, words: list[str], stderr: Path) -> None:
    """Run a program's main function as the interpreter would, with its exit statuses."""
    target = os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 2)
    status = 1
    try:
        program(words)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except toy.UserError:
        traceback.print_exc()
        status = 2
    except Exception:  # noqa: BLE001  as the interpreter would
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(cases: list[list[int]], *, limit: float) -> dict[int, tuple[int, float]]:
    """Exit status and seconds of each rank; what has not ended within the limit is killed.

    A stopped rank is killed as soon as the others of its case have ended.
    """
    ended, stopped, start = {}, set(), time.monotonic()
    while len(ended) < sum(map(len, cases)):
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        now = time.monotonic() - start
        if pid and os.WIFSTOPPED(status):
            stopped.add(pid)
        elif pid:
            ended[pid] = (os.waitstatus_to_exitcode(status), now)
        for pids in cases:
            left = set(pids) - ended.keys()
            if left and (left <= stopped or now > limit):
                for one in left:
                    os.kill(one, signal.SIGKILL)
        time.sleep(0.02)
    return ended


if __name__ == "__main__":
    # What every engine imports as it is built, 5 s of it.
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401

    main(Path(sys.argv[1]))
