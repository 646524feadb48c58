import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch.distributed as dist

from configs.errors import UserError
from tests.train.forks import run_cases
from train.health import (
    BROKEN,
    DONE,
    Judge,
    Report,
    furthest_behind,
    outcome_of,
    raised_in_collective,
    standing,
)

ROOT = Path(__file__).parents[2]
SILENCE, HANG = 4, 8
LATE = 40
"""Seconds within which a job of two ranks has started, met its event and ended, at the latest."""


def judge(reports, *, hang=100.0, silence=20.0) -> Judge:
    return Judge(reports, hang_seconds=hang, silence_seconds=silence, now=0.0)


def ranks(**changes) -> dict[int, Report]:
    """Three ranks on three hosts; `changes` are fields by rank, such as r1={"step": 2}."""
    return {n: replace(Report(f"h{n}"), **changes.get(f"r{n}", {})) for n in range(3)}


def watch(one: Judge, reports, until: float):
    """Look each second while only rank 0 and 2 still report; the first verdict and its time."""
    for now in range(1, int(until) + 1):
        beating = {n: replace(r, beat=now if n != 1 else r.beat) for n, r in reports.items()}
        verdict = one.look(beating, float(now))
        if verdict is not None:
            return now, verdict
    return None, None


def test_a_rank_that_stops_reporting_is_named_after_the_silence():
    reports = ranks(r1={"step": 7, "span": "backward"})
    now, verdict = watch(judge(reports), reports, 50)
    assert now == 21
    expected = "rank 1 on h1 gave no sign of life for 21 s (last: step 7, backward)"
    assert (verdict.message, verdict.status) == (expected, 1)


def test_silence_is_believed_sooner_once_a_collective_has_failed():
    reports = ranks(r2={"phase": BROKEN})
    assert watch(judge(reports), reports, 50)[0] == 11


def test_a_rank_that_is_done_may_be_silent():
    reports = ranks(r1={"phase": DONE}, r0={"step": 3})
    assert watch(judge(reports, hang=0.0), reports, 500) == (None, None)


def test_an_error_is_told_at_once_with_its_status():
    failed = ranks(r2=outcome_of(UserError("the shards must exist,\nfound none")))
    verdict = judge(ranks()).look(failed, 1.0)
    assert verdict.message == "rank 2 on h2 failed: the shards must exist, found none"
    assert verdict.status == 2
    bug = judge(ranks()).look(ranks(r0=outcome_of(KeyError("x"))), 1.0)
    assert (bug.message, bug.status) == ("rank 0 on h0 failed: KeyError: 'x'", 1)


def test_time_in_which_the_judge_itself_stood_still_counts_against_nobody():
    one = judge(ranks())
    assert one.look(ranks(), 1.0) is None
    assert one.look(ranks(), 1000.0) is None
    assert one.look(ranks(), 1002.0) is None


def test_without_progress_the_rank_that_is_behind_is_named_with_its_place():
    places = {"r0": {"step": 4, "entered": 6, "place": "a.py:1 f", "waits": True}}
    places["r2"] = places["r0"]
    places["r1"] = {"step": 4, "entered": 5, "span": "rollout", "place": "b.py:2 g"}
    one = judge(ranks(**places), hang=30.0, silence=1e9)
    message = None
    for now in range(1, 40):
        verdict = one.look({n: replace(r, beat=now) for n, r in ranks(**places).items()}, now)
        if verdict is not None:
            message = verdict.message
            break
    assert now == 31
    assert message == (
        "no rank has made progress for 31 s, rank 1 holds up the others: rank 1 on h1, step 4, "
        "rollout, at b.py:2 g; rank 0 on h0, step 4, start, at a.py:1 f; rank 2 on h2, step 4, "
        "start, at a.py:1 f"
    )


def test_progress_of_one_rank_or_no_limit_is_no_hang():
    one, unlimited = judge(ranks(), hang=30.0, silence=1e9), judge(ranks(), hang=0.0, silence=1e9)
    for now in range(1, 100):
        assert one.look(ranks(r2={"entered": now // 25}), now) is None
        assert unlimited.look(ranks(), now) is None


@pytest.mark.parametrize(
    ("changes", "behind"),
    [
        ({"r0": {"step": 2}, "r1": {"step": 2}, "r2": {"step": 1, "entered": 9}}, [2]),
        ({"r0": {"waits": True}, "r2": {"waits": True}}, [1]),
        ({f"r{n}": {"waits": True} for n in range(3)}, []),
        ({}, []),
    ],
)
def test_who_holds_up_the_others(changes, behind):
    assert furthest_behind(ranks(**changes)) == behind


def test_a_place_is_the_innermost_call_and_the_innermost_of_ours():
    found = []
    thread = threading.Thread(target=lambda: (time.sleep(0.2), found.append(standing())))
    thread.start()
    subprocess.run(["sleep", "0.5"], check=True)
    thread.join()
    place, waits = found[0]
    assert re.fullmatch(
        r"(python[\d.]+/)?\S+\.py:\d+ \w+, called from tests/train/test_watchdog\.py:\d+ "
        r"test_a_place_is_the_innermost_call_and_the_innermost_of_ours",
        place,
    )
    assert not waits


def test_errors_of_collectives_are_told_from_errors_of_our_own():
    with pytest.raises(TypeError) as own:
        dist.all_reduce(None)
    assert not raised_in_collective(own.value)
    error = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    assert raised_in_collective(error)
    assert not raised_in_collective(RuntimeError("shapes do not match"))


CASES = {
    "normal": [],
    "killed": ["--event", "kill:3", "--silence_seconds", SILENCE],
    "stopped": ["--event", "stop:3", "--silence_seconds", SILENCE],
    "asleep": ["--event", "sleep:3", "--hang_seconds", HANG],
    "bug": ["--event", "raise:3"],
    "refused": ["--event", "refuse:3:0"],
    "host_killed": ["--event", "kill:3:0"],
    "host_stopped": ["--event", "stop:3:0", "--silence_seconds", SILENCE],
}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """What became of both ranks in every case: exit status, seconds, standard error."""
    cases = {
        name: {"words": ["--strategy", "deepspeed", *map(str, words)]}
        for name, words in CASES.items()
    }
    return run_cases(cases, folder=tmp_path_factory.mktemp("watchdog"))


def last_line(rank) -> str:
    return rank["stderr"].strip().splitlines()[-1]


def ends(found, *, statuses):
    assert [rank["status"] for rank in found] == statuses
    assert max(rank["seconds"] for rank in found) < LATE


@pytest.mark.timeout(300)
def test_a_job_that_ends_normally_is_left_alone(two_ranks):
    ends(two_ranks["normal"], statuses=[0, 0])
    assert "this rank ends" not in "".join(rank["stderr"] for rank in two_ranks["normal"])


@pytest.mark.parametrize(
    ("case", "statuses"), [("killed", [1, -9]), ("stopped", [1, -9]), ("host_stopped", [-9, 1])]
)
def test_a_rank_that_is_killed_or_stopped_ends_the_others(two_ranks, case, statuses):
    ends(two_ranks[case], statuses=statuses)
    dead = statuses.index(-9)
    line = last_line(two_ranks[case][1 - dead])
    assert re.fullmatch(
        rf"rank {1 - dead}: rank {dead} on \S+ gave no sign of life for \d+ s "
        r"\(last: step \d, \w+\); this rank ends, too",
        line,
    )


def test_rank_0_that_is_killed_is_missed_at_its_store(two_ranks):
    ends(two_ranks["host_killed"], statuses=[-9, 1])
    line = last_line(two_ranks["host_killed"][1])
    assert re.match(r"rank 1: rank 0 on \S+ gave no sign of life: its store does not answer", line)


def test_a_rank_that_hangs_is_named_with_the_place_where_it_hangs(two_ranks):
    ends(two_ranks["asleep"], statuses=[1, 1])
    for rank in two_ranks["asleep"]:
        line = last_line(rank)
        assert re.search(r"no rank has made progress for \d+ s, rank 1 holds up the others: ", line)
        assert re.search(r"rank 1 on \S+, step 4, rollout, at tests/train/toy\.py:\d+ hang", line)
        assert re.search(r"rank 0 on \S+, step 4, \w+, at torch/distributed/\S+ all_reduce", line)


def test_an_error_keeps_its_traceback_and_the_others_say_one_line(two_ranks):
    ends(two_ranks["bug"], statuses=[1, 1])
    assert last_line(two_ranks["bug"][1]) == "ZeroDivisionError: a bug"
    lines = two_ranks["bug"][0]["stderr"].strip().splitlines()
    failed = r"rank 0: rank 1 on \S+ failed: ZeroDivisionError: a bug; this rank ends, too"
    assert [bool(re.fullmatch(failed, line)) for line in lines] == [True]


def test_bad_input_on_one_rank_ends_all_with_status_2(two_ranks):
    ends(two_ranks["refused"], statuses=[2, 2])
    assert re.fullmatch(
        r"rank 1: rank 0 on \S+ failed: the input must fit, found none; give another; "
        "this rank ends, too",
        last_line(two_ranks["refused"][1]),
    )


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "event",
    ["stop:3:1", pytest.param("stop:3:0", marks=SLOW), pytest.param("raise:3:1", marks=SLOW)],
)
@pytest.mark.timeout(300)
def test_lightnings_own_children_leave_no_process_behind(tmp_path, event):
    folder = tmp_path / "run"
    words = ["--strategy", "deepspeed", "--devices", "2", "--silence_seconds", str(SILENCE)]
    command = [sys.executable, "-m", "tests.train.toy", str(folder), *words, "--event", event]
    environ = {key: value for key, value in os.environ.items() if key not in LAUNCHERS}
    environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environ, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    try:
        err = process.communicate(timeout=200)[1]
    finally:
        left = processes_of(folder)
        for pid in left:
            os.kill(pid, signal.SIGKILL)
    assert left == []
    what, _, rank = event.split(":")
    assert process.returncode == (-9 if event == "stop:3:0" else 1)
    happened = {"stop": r"gave no sign of life for \d+ s", "raise": "failed: ZeroDivisionError"}
    other = 1 - int(rank)
    assert re.search(rf"^rank {other}: rank {rank} on \S+ {happened[what]}", err, re.MULTILINE)


LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK")
"""What a test before may have left in this process."""


def processes_of(folder: Path) -> list[int]:
    """Processes with `folder` on their command line that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder).encode() in words:
            found.append(int(path.name))
    return found
