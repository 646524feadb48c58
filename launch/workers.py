"""Processes that share the jobs of an evaluation."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch

from configs.schema import RunConfig
from launch.arena import Arena, device_of, load_arena
from launch.contest import Job
from train.memory import keep_freed_memory


def run_jobs(
    arena: Arena, jobs: Sequence[Job], *, ckpts: Sequence[Path], clips: Path
) -> Iterator[tuple[Job, list[dict[str, Any]]]]:
    """Run jobs and yield each with its rows when it is done, in any order.

    On a CPU `trainer.threads` jobs run at a time, each in a process with one thread: a rollout is
    a long chain of small operations, which several threads slow down rather than speed up.
    """
    workers = min(config_workers(arena.config), len(jobs))
    if workers <= 1:
        for job in jobs:
            yield job, arena.run(job)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(arena.config, tuple(ckpts), clips),
    )
    try:
        futures = {pool.submit(_run_in_worker, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def config_workers(config: RunConfig) -> int:
    """Processes that share the jobs."""
    return 1 if device_of(config).type == "cuda" else config.trainer.threads


_worker: dict[str, Arena] = {}
"""The arena of this process, where it is a worker."""


def _start_worker(config: RunConfig, ckpts: Sequence[Path], clips: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    _worker["arena"] = load_arena(config, ckpts, clips)


def _end_with_parent() -> None:
    """A parent that was killed cannot stop its workers; they must notice."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _run_in_worker(job: Job) -> list[dict[str, Any]]:
    return _worker["arena"].run(job)
