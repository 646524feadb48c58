"""Runs of the toy by forked ranks: the libraries are imported once, which takes longer than a run.

python -m tests.train.forks RESULTS < CASES, both JSON: name of a run to the words of its command
line, and to the exit status, seconds and standard error of each rank.
"""

import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path

import deepspeed  # noqa: F401

from tests.train import toy
from tests.train.conftest import free_port

RANKS = 2


def main(results: Path) -> None:
    cases = json.load(sys.stdin)
    found = {}
    for name, words in cases.items():
        found[name] = run_ranks(words, results.parent / name)
    results.write_text(json.dumps(found))


def run_ranks(words: list[str], folder: Path) -> list[dict]:
    """Run one case to its end; a rank that is left after the others, or stopped, is killed."""
    folder.mkdir()
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(RANKS),
        "LOCAL_WORLD_SIZE": str(RANKS),
    }
    start = time.monotonic()
    ranks = {}
    for number in range(RANKS):
        own = {"RANK": str(number), "LOCAL_RANK": str(number)}
        pid = os.fork()
        if pid == 0:
            os.environ.update(shared | own)
            become_rank([str(folder), *words], folder / f"stderr-{number}")
        ranks[pid] = number
    ended = wait_for(ranks, limit=60.0)
    return [
        {
            "status": ended[number][0],
            "seconds": ended[number][1] - start,
            "stderr": (folder / f"stderr-{number}").read_text(),
        }
        for number in range(RANKS)
    ]


def become_rank(words: list[str], stderr: Path) -> None:
    """Run the toy as a program would, with its exit statuses."""
    target = os.open(stderr, os.O_WRONLY | os.O_CREAT)
    os.dup2(target, 2)
    status = 0
    try:
        toy.main(words)
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException as error:
        traceback.print_exc()
        status = 2 if isinstance(error, toy.UserError) else 1
    finally:
        sys.stderr.flush()
        os._exit(status)


def wait_for(ranks: dict[int, int], *, limit: float) -> dict[int, tuple[int, float]]:
    """Exit status and end of each rank; what has not ended within the limit is killed.

    A stopped rank is killed as soon as all others have ended.
    """
    ended, stopped, deadline = {}, set(), time.monotonic() + limit
    while len(ended) < len(ranks):
        pid, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
        if pid and os.WIFSTOPPED(status):
            stopped.add(ranks[pid])
        elif pid:
            ended[ranks[pid]] = (os.waitstatus_to_exitcode(status), time.monotonic())
        elif time.monotonic() > deadline or len(ended) + len(stopped) == len(ranks):
            for left, number in ranks.items():
                if number not in ended:
                    os.kill(left, signal.SIGKILL)
        else:
            time.sleep(0.05)
    return ended


if __name__ == "__main__":
    main(Path(sys.argv[1]))
