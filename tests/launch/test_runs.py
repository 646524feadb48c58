"""Whole plans at a small size: real clips, and kills in every stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from configs.load import load_config
from launch.__main__ import main
from launch.export import find_export, load_export, read_manifest

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")
STAGES = ["teacher", "causal", "salience_causal", "distill", "salience", "streaming", "control"]


def test_real_clips_go_through_every_stage_and_a_second_run_has_nothing_to_do(tmp_path, capfd):
    clips = ROOT / "configs" / "clips.yaml"
    words = ["run", str(clips), f"runs_dir={tmp_path}", f"source.path={ROOT}/configs/clips.jsonl"]
    assert main(words) == 0
    config = load_config(words[1:])
    for name in config.stages:
        assert load_export(tmp_path / "clips" / name).manifest["stage"] == name
        rows = (tmp_path / "clips" / name / "metrics.jsonl").read_text().splitlines()
        assert len(rows) == 2
    capfd.readouterr()
    assert main(words) == 0
    assert capfd.readouterr().out == f"all 7 steps complete in {tmp_path / 'clips'}\n"


def train(folder: Path) -> list[str]:
    """The command that trains the tiny plan without its evaluation."""
    overrides = [f"runs_dir={folder}", "evaluate.stages=[]"]
    overrides += [f"stages.{stage}.checkpoint_every=1" for stage in STAGES]
    return [sys.executable, "-m", "launch", "run", TINY, *overrides]


def without_clocks(path: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    clocks = ("_seconds", "_per_second")
    return [{key: row[key] for key in row if not key.endswith(clocks)} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_kill_in_every_stage_changes_no_bit_of_the_result(tmp_path):
    subprocess.run(train(tmp_path / "whole"), cwd=ROOT, check=True, timeout=200)
    command, run = train(tmp_path / "killed"), tmp_path / "killed" / "tiny"
    kills = 0
    for stage in STAGES:
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while not list(run.glob(f"{stage}/checkpoints/step-*/COMPLETE.json")):
            assert process.poll() is None, "the run ended before the stage"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        kills += not (run / stage / "DONE.json").exists()
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
    assert kills == len(STAGES), "every kill must hit its stage at work"
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    for stage in STAGES:
        found, expected = (tmp_path / name / "tiny" / stage for name in ("killed", "whole"))
        files = [read_manifest(find_export(folder))["files"] for folder in (found, expected)]
        assert files[0] == files[1], f"{stage} differs after a kill"
        rows = [without_clocks(folder / "metrics.jsonl") for folder in (found, expected)]
        assert rows[0] == rows[1], f"metrics of {stage} differ after a kill"


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_ranks_carry_out_the_whole_plan_and_only_one_writes_records(tmp_path):
    overrides = [f"runs_dir={tmp_path}", "evaluate.stages=[]", "trainer.strategy=deepspeed"]
    overrides += ["trainer.devices=2", "trainer.accelerator=cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "launch", "run", TINY, *overrides]
    # A rank that waits for ever must end the test: torchrun stops its children on SIGTERM.
    guarded = ["timeout", "-k", "10", "280", *command]
    done = subprocess.run(guarded, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("step 4/10 teacher: running") == 1
    assert done.stdout.count("all 10 steps complete") == 1
    for stage in STAGES:
        assert load_export(tmp_path / "tiny" / stage).manifest["stage"] == stage
