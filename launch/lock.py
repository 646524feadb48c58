"""The lock of a run folder: one launch at a time, and ranks that do not wait for a dead leader.

Rank 0 holds the lock while it works and renews its time stamp. The other ranks watch the stamp
change; they compare it with nothing but itself, as clocks of machines differ.
"""

import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

from configs.errors import UserError
from train.world import NONE, launched_world

LOCK = ".lock"
POLL_SECONDS = 0.2
BEAT_SECONDS = 2.0
"""Between two renewals of the time stamp."""
LEADER_SECONDS = 300.0
"""Without a sign of rank 0: imports from a cold network file system may take minutes."""


class PlanError(UserError):
    """A step cannot run now, or the run folder is in use."""


@contextmanager
def hold_lock(root: Path) -> Iterator[str]:
    """Keep other processes out of the run folder `root` until the block ends.

    The lock belongs to the process: it ends with it however it ends, and forked loader workers do
    not inherit it. (It also ends if the process opens and closes the file once more.)

    Yields:
        What the lock file says: process, machine and time; no two holders have the same.

    Raises:
        PlanError: If another process holds it.
    """
    root.mkdir(parents=True, exist_ok=True)
    with (root / LOCK).open("a+") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            owner = file.read().strip() or "unknown"
            raise PlanError(
                f"run folder {str(root)!r} must be free, found process {owner} at work in it; wait "
                "for it to end, stop it, or choose another name=..."
            ) from None
        owner = f"{os.getpid()} on {socket.gethostname()} since {datetime.now().isoformat()}"
        file.truncate(0)
        file.write(owner)
        file.flush()
        ended = threading.Event()
        heart = threading.Thread(target=_renew, args=(file.fileno(), ended), daemon=True)
        heart.start()
        try:
            yield owner
        finally:
            ended.set()
            heart.join()
            file.truncate(0)


def _renew(descriptor: int, ended: threading.Event) -> None:
    while not ended.wait(BEAT_SECONDS):
        os.utime(descriptor)


def wait_for_leader(root: Path, is_ready: Callable[[str], bool]) -> None:
    """Return when `is_ready`, while rank 0 is at work in the run folder `root`.

    Args:
        root: The run folder.
        is_ready: Given what the lock file says, or "" as long as nobody has been seen alive.

    Raises:
        PlanError: If rank 0 does not hold the lock: it has ended, or works in another folder of
            this name.
    """
    parent = os.getppid() if _is_child_of_leader() else None
    last, _ = _read_lock(root)
    seen, is_alive = time.monotonic(), False
    while True:
        is_orphan = parent is not None and os.getppid() != parent
        stamp, owner = _read_lock(root)
        if stamp != last:
            last, seen, is_alive = stamp, time.monotonic(), True
        if is_ready(owner if is_alive else ""):
            return
        if is_orphan:
            raise PlanError(
                f"rank 0 must be at work in run folder {str(root)!r}, found its process {parent}, "
                "which started this rank, at its end; see what it said"
            )
        if time.monotonic() - seen > LEADER_SECONDS:
            raise PlanError(
                f"rank 0 must be at work in run folder {str(root)!r} as this rank sees it, found "
                f"no sign of it for {LEADER_SECONDS:.0f} s; see what rank 0 said, and give a "
                "runs_dir that all nodes share"
            )
        time.sleep(POLL_SECONDS)


def _read_lock(root: Path) -> tuple[int | None, str]:
    """Time stamp and content; the stamp first: the content may be newer, never older."""
    try:
        with (root / LOCK).open() as file:  # opening it also makes NFS ask the server
            return os.fstat(file.fileno()).st_mtime_ns, file.read()
    except FileNotFoundError:
        return None, ""


def _is_child_of_leader() -> bool:
    """Whether Lightning started this process from rank 0."""
    return "LOCAL_RANK" in os.environ and launched_world().launcher == NONE
