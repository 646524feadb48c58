"""Whole plans at a small size: real clips, and kills in every stage."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from configs.load import load_config
from launch.__main__ import main
from launch.export import find_export, load_export, read_manifest
from train.tracking import MACHINE_KEYS

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


def run_tiny(folder: Path) -> list[str]:
    """The command that carries out the tiny plan with a checkpoint at every step."""
    overrides = [f"runs_dir={folder}"]
    overrides += [f"stages.{stage}.checkpoint_every=1" for stage in STAGES]
    return [sys.executable, "-m", "launch", "run", TINY, *overrides]


def without_clocks(value: Any) -> Any:
    if isinstance(value, list):
        return [without_clocks(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: without_clocks(value[key])
        for key in value
        if not key.startswith(MACHINE_KEYS) and not key.endswith("_per_second")
    }


def read_lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def at_work(stage: str) -> tuple[str, str]:
    return f"{stage}/checkpoints/step-*/COMPLETE.json", f"{stage}/DONE.json"


# What a step of the plan has written when it is killed, and what must not be there yet.
AT_WORK = {
    "world": ("data/world/clip-000003.mp4", "data/world/world.json"),
    "ingest": ("data/raw/.*.part-*", "data/raw/manifest.json"),
    "encode": ("data/latents/.*.part-*", "data/latents/manifest.json"),
    **{name: at_work(name) for name in STAGES[: STAGES.index("salience")]},
    "targets": ("data/targets-salience/.*.part-*", "data/targets-salience/manifest.json"),
    **{name: at_work(name) for name in STAGES[STAGES.index("salience") :]},
    "evaluate": ("evaluate/rows.jsonl", "evaluate/DONE.json"),
}


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_a_kill_in_every_step_changes_no_bit_of_the_result(tmp_path):
    subprocess.run(run_tiny(tmp_path / "whole"), cwd=ROOT, check=True, timeout=200)
    command, run = run_tiny(tmp_path / "killed"), tmp_path / "killed" / "tiny"
    for name, (begun, done) in AT_WORK.items():
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 100
        while not list(run.glob(begun)):
            assert process.poll() is None, f"the run ended before {name}"
            assert time.monotonic() < deadline, name
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        assert not (run / done).exists(), f"the kill must hit {name} at work"
    subprocess.run(command, cwd=ROOT, check=True, timeout=200)
    for stage in STAGES:
        found, expected = (tmp_path / name / "tiny" / stage for name in ("killed", "whole"))
        files = [read_manifest(find_export(folder))["files"] for folder in (found, expected)]
        assert files[0] == files[1], f"{stage} differs after a kill"
        rows = [without_clocks(read_lines(f / "metrics.jsonl")) for f in (found, expected)]
        assert rows[0] == rows[1], f"metrics of {stage} differ after a kill"
    results = [
        without_clocks(json.loads((tmp_path / name / "tiny/evaluate/results.json").read_text()))
        for name in ("killed", "whole")
    ]
    assert results[0] == results[1]


@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_two_ranks_carry_out_the_whole_plan_and_only_one_writes_records(tmp_path):
    overrides = [f"runs_dir={tmp_path}", "evaluate.stages=[]", "trainer.strategy=deepspeed"]
    overrides += ["trainer.devices=2", "trainer.accelerator=cpu"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*torchrun, "--nproc-per-node=2", "-m", "launch", "run", TINY, *overrides]
    # A rank that waits for ever must end the test: torchrun stops its children on SIGTERM.
    guarded = ["timeout", "-k", "10", "580", *command]
    done = subprocess.run(guarded, cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.count("step 4/11 teacher: running") == 1
    assert done.stdout.count("all 11 steps complete") == 1
    for stage in STAGES:
        assert load_export(tmp_path / "tiny" / stage).manifest["stage"] == stage
