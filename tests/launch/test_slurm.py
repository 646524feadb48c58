"""The sbatch script: what it asks for, and what it does, with programs in place of SLURM's."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load_config
from launch.__main__ import main
from launch.plan import plan_steps
from launch.slurm import build_script
from launch.steps import step_keys
from tests.launch.test_cli import fails
from train.checkpoint import newest_whole, step_of

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
SIZE = ["--nodes", "2", "--gpus-per-node", "1"]
MANY = "trainer.strategy=deepspeed"

RECORD_ARGUMENTS = f"""#!{sys.executable}
import json, os, sys
json.dump(sys.argv[1:], open(os.environ["SEEN"], "w"))
"""

TWO_TASKS = f"""#!{sys.executable}
# Starts what follows the options twice on this machine and passes signals on, as srun does.
import os, signal, subprocess, sys
words = sys.argv[1:]
while words[0].startswith("--"):
    words.pop(0)
common = os.environ | {{"SLURM_NTASKS": "2", "SLURM_NNODES": "1", "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0",
    "SLURM_STEP_ID": "0", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_NAME": "toy"}}
tasks = [
    subprocess.Popen(words, env=common | {{"SLURM_PROCID": str(n), "SLURM_LOCALID": str(n)}})
    for n in range(2)
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
statuses = [task.wait() for task in tasks]
sys.exit(max(status if status >= 0 else 128 - status for status in statuses))
"""


SCONTROL = """#!/bin/sh
if [ "$1" = show ]; then
  echo "JobId=$3 JobName=toy"
  echo "   JobState=${{JOB_STATE:-RUNNING}} Reason=None"
else
  echo "$@" >> {log}
fi
"""


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """cluster(srun) -> puts programs called srun and scontrol first in PATH."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def program(name, text):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)

    def install(srun):
        program("srun", srun)
        program("scontrol", SCONTROL.format(log=tmp_path / "scontrol.log"))
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.delenv(name, raising=False)

    return install


def requeued(tmp_path) -> list[str]:
    log = tmp_path / "scontrol.log"
    return log.read_text().splitlines() if log.exists() else []


def toy_script(tmp_path, *words) -> Path:
    """The script of a job whose tasks train the toy below `tmp_path`/run."""
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "tests.train.toy", str(folder), *map(str, words)]
    script = tmp_path / "job.sh"
    script.write_text(
        build_script(
            command,
            nodes=1,
            devices=2,
            cpus=1,
            uses_gpus=False,
            job_name="toy",
            logs=tmp_path,
            done=folder / "final.safetensors",
            key="F32",  # a word of that file
            limits={},
        )
    )
    return script


def test_the_script_asks_for_one_task_per_gpu_and_a_signal_in_time(tmp_path, capsys):
    options = ["--time", "24:00:00", "--partition", "gpu", "--account", "me", "--job-name", "x.y"]
    words = ["slurm", TINY, MANY, f"runs_dir={tmp_path}", *SIZE, *options, "data.workers=3"]
    assert main(words) == 0
    script = capsys.readouterr().out
    expected = """job-name=x.y nodes=2 ntasks-per-node=1 cpus-per-task=5 gpus-per-node=1
        time=24:00:00 partition=gpu account=me signal=B:USR1@300 requeue open-mode=append"""
    found = re.findall(r"^#SBATCH --(.*)$", script, re.MULTILINE)
    assert found == [*expected.split(), f'output="{tmp_path}/tiny/slurm/%x-%j.log"']
    assert (tmp_path / "tiny" / "slurm").is_dir()
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_every_word_reaches_the_tasks_as_it_was_typed(tmp_path, cluster, monkeypatch):
    cluster(RECORD_ARGUMENTS)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.chdir(tmp_path)
    odd = "source.path=$(touch broken) '\"; touch broken\n# {x} ../é"
    script, overrides = tmp_path / "job.sh", [MANY, f"runs_dir={tmp_path}", odd]
    words = ["fit", TINY, *overrides, "--stage", "teacher"]
    size = ["--nodes=1", "--gpus-per-node=2", f"--out={script}"]
    assert main(["slurm", TINY, *overrides, *size, "--verb", "fit", "--stage", "teacher"]) == 0
    subprocess.run(["bash", script], check=True, timeout=20, cwd="/")
    seen = json.loads((tmp_path / "seen").read_text())
    options = ["--nodes=1", "--ntasks-per-node=2", "--cpus-per-task=2", "--kill-on-bad-exit=1"]
    assert seen == [*options, sys.executable, "-m", "launch", *words]
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["modle.num_layers=2", MANY, *SIZE], "'modle' is not a key of the configuration"),
        (SIZE, r"trainer\.strategy=single runs one process, found 2"),
        ([MANY, "trainer.devices=2", *SIZE], r"trainer\.devices=2 must be what the launcher"),
        ([MANY, *SIZE, "--verb", "fit"], "--stage belongs to --verb fit"),
        ([MANY, *SIZE, "--stage", "teacher"], "--stage belongs to --verb fit"),
        ([MANY, *SIZE, "--verb", "fit", "--stage", "techer"], "did you mean 'teacher'"),
        ([MANY, "--nodes", "0", "--gpus-per-node", "1"], "--nodes must be 1 or more, found 0"),
        ([MANY, *SIZE, "--partition", "a b"], "--partition must be letters, digits"),
        ([MANY, *SIZE, "stages.teacher.kind=x"], "stage kind must be one of"),
        ([MANY, "--nodes", "2", "--gpus-per-node", "4"], r"ranks x micro_batch = 8 x 1, found 4"),
    ],
)
def test_what_cannot_work_fails_here_and_not_in_the_queue(capsys, tmp_path, words, message):
    error = fails(capsys, "slurm", TINY, f"runs_dir={tmp_path}/runs", *words)
    assert re.search(message, error)
    assert not (tmp_path / "runs").exists()


def test_a_job_out_of_time_saves_requeues_and_the_next_one_ends_it(tmp_path, cluster):
    cluster(TWO_TASKS)
    common = ("--strategy", "deepspeed", "--event", "slow:0.2", "--steps", 24)
    script = toy_script(tmp_path, *common)
    environ = os.environ | {"OMP_NUM_THREADS": "1"}
    job = subprocess.Popen(["timeout", "-k", "10", "200", "bash", script], env=environ, cwd=ROOT)
    checkpoints = tmp_path / "run" / "checkpoints"
    deadline = time.monotonic() + 150
    while newest_whole(checkpoints) is None:
        assert job.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    shell = int(Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()[0])
    os.kill(shell, signal.SIGUSR1)
    assert job.wait(timeout=120) == 0
    assert requeued(tmp_path) == ["requeue 5"]
    stopped = int((tmp_path / "run" / "interrupted").read_text())
    assert step_of(newest_whole(checkpoints)) == stopped < 24
    assert not (tmp_path / "run" / "final.safetensors").exists()
    again = ["timeout", "-k", "10", "200", "bash", script]
    subprocess.run(again, env=environ, cwd=ROOT, check=True)
    assert step_of(newest_whole(checkpoints)) == 24
    assert (tmp_path / "run" / "final.safetensors").exists()
    assert requeued(tmp_path) == ["requeue 5"]


FAKE_TASK = """#!/bin/sh
trap 'echo USR1 >> "$SEEN"; exit {usr1}' USR1
trap 'echo TERM >> "$SEEN"; exit {term}' TERM
touch "$SEEN"
i=0; while [ $i -lt 200 ]; do i=$((i + 1)); sleep 0.05; done
exit 99
"""


@pytest.mark.parametrize(
    ("sent", "task", "status", "queued"),
    [
        ("USR1", {"usr1": 0, "term": 0}, 0, True),
        ("USR1", {"usr1": 138, "term": 0}, 0, True),
        ("USR1", {"usr1": 1, "term": 0}, 1, False),
        ("USR1", {"usr1": 2, "term": 0}, 2, False),
        ("TERM", {"usr1": 0, "term": 0}, 0, True),
        ("TERM", {"usr1": 0, "term": 143}, 143, True),
        ("TERM", {"usr1": 0, "term": 3}, 3, False),
    ],
)
def test_signals_reach_the_tasks_and_only_what_can_continue_is_requeued(
    tmp_path, cluster, monkeypatch, sent, task, status, queued
):
    cluster(FAKE_TASK.format(**task))
    seen = tmp_path / "seen"
    monkeypatch.setenv("SEEN", str(seen))
    job = subprocess.Popen(["bash", toy_script(tmp_path)])
    deadline = time.monotonic() + 20
    while not seen.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(getattr(signal, f"SIG{sent}"))
    assert job.wait(timeout=20) == (0 if queued else status)
    assert seen.read_text() == f"{sent}\n"
    assert requeued(tmp_path) == (["requeue 5"] if queued else [])


@pytest.mark.parametrize("status", [0, 1])
def test_a_job_that_ends_by_itself_is_not_requeued(tmp_path, cluster, status):
    cluster(f"#!/bin/sh\nexit {status}\n")
    script = toy_script(tmp_path)
    assert subprocess.run(["bash", script], check=False, timeout=20).returncode == status
    assert requeued(tmp_path) == []


@pytest.mark.parametrize(
    ("sent", "record", "state", "queued"),
    [
        ("USR1", "this plan: F32", "RUNNING", False),
        ("USR1", "an older one: F64", "RUNNING", True),
        ("TERM", "this plan: F32", "PREEMPTED", False),
        ("TERM", "an older one: F64", "PREEMPTED", True),
        ("TERM", "an older one: F64", "CANCELLED", False),
    ],
)
def test_a_job_that_is_done_or_cancelled_is_not_requeued(
    tmp_path, cluster, monkeypatch, sent, record, state, queued
):
    cluster(FAKE_TASK.format(usr1=0, term=0))
    monkeypatch.setenv("SEEN", str(tmp_path / "seen"))
    monkeypatch.setenv("JOB_STATE", state)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final.safetensors").write_text(record)
    job = subprocess.Popen(["bash", toy_script(tmp_path)])
    while not (tmp_path / "seen").exists():
        time.sleep(0.02)
    job.send_signal(getattr(signal, f"SIG{sent}"))
    assert job.wait(timeout=20) == 0
    assert requeued(tmp_path) == (["requeue 5"] if queued else [])


def test_the_script_looks_for_the_key_of_the_last_step(tmp_path, capsys):
    words = [TINY, MANY, f"runs_dir={tmp_path}"]

    def sought(*more: str) -> str:
        assert main(["slurm", *words, *more, *SIZE]) == 0
        return re.search(r"grep -qsF (.*); }$", capsys.readouterr().out, re.MULTILINE)[1]

    keys = step_keys(plan_steps(load_config(words)))
    assert sought() == f"{keys['report']} {tmp_path}/tiny/report/DONE.json"
    teacher = ["--verb", "fit", "--stage", "teacher"]
    record = f"{tmp_path}/tiny/teacher/DONE.json"
    assert sought(*teacher) == f"{keys['teacher']} {record}"
    changed = sought(*teacher, "stages.teacher.steps=9")
    assert changed.endswith(record)
    assert keys["teacher"] not in changed
    words.append("evaluate.stages=[]")
    keys = step_keys(plan_steps(load_config(words)))
    assert sought() == f"{keys['control']} {tmp_path}/tiny/control/DONE.json"
