"""A dry run does everything once and leaves nothing."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from launch import dry_run as dry
from launch.__main__ import main
from launch.lock import PlanError, hold_lock
from train.teacher import Teacher

SMALL = ["stages.teacher.batch=2", "evaluate.stages=[]"]


def tree(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.name != ".lock"}


def test_fit_does_one_step_of_a_stage_with_real_inputs_and_leaves_nothing(tiny, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    assert main(["fit", *tiny, "--stage", "teacher", *SMALL]) == 0
    before = tree(run)
    capsys.readouterr()
    for stage, loss in (("teacher", "loss/teacher"), ("causal", "loss/student")):
        assert main(["fit", *tiny, "--stage", stage, "--dry-run", *SMALL]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].startswith(f"dry run of stage {stage}: {loss} ")
        parts = [line.partition(":")[0].strip() for line in lines[1:-1]]
        expected = ["networks, inputs and engines", "training", "checkpoint written"]
        expected += ["checkpoint read back and compared", "export written and loaded"]
        expected += ["peak memory"]
        assert [part for part in parts if part != "sample video"] == expected
        assert ("sample video" in parts) is (stage == "teacher")
        assert lines[-1] == f"dry run: everything works; nothing of it is left in {run}"
        assert tree(run) == before


def test_a_stage_whose_inputs_are_missing_is_refused_also_dry(tiny, tmp_path, capsys):
    before = tree(tmp_path)
    assert main(["fit", *tiny, "--stage", "distill", "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert "step 'distill' needs ['causal', 'teacher'] complete" in error
    assert tree(tmp_path) == before


def test_a_dry_run_that_fails_leaves_nothing_either(tiny, tmp_path, capsys, monkeypatch):
    before = tree(tmp_path)
    (tmp_path / "runs" / "tiny" / dry.SCRATCH / "of-a-killed-one").mkdir(parents=True)
    restore = dry.restore

    def broken(stage, folder):
        restore(stage, folder)
        stage.networks["teacher"].patch_embedding.bias.data[1] += 1e-3

    monkeypatch.setattr(dry, "restore", broken)
    assert main(["fit", *tiny, "--stage", "teacher", "--dry-run", *SMALL]) == 2
    error = capsys.readouterr().err
    assert "must read back as it was written, its 'engine.teacher.master.1' does not" in error
    assert tree(tmp_path) == before


def test_a_loss_that_is_not_finite_is_told_without_a_record_that_is_gone(
    tiny, tmp_path, capsys, monkeypatch
):
    before, loss = tree(tmp_path), Teacher.loss
    monkeypatch.setattr(Teacher, "loss", lambda stage, batch: loss(stage, batch) + torch.inf)
    assert main(["fit", *tiny, "--stage", "teacher", "--dry-run", *SMALL]) == 2
    error = capsys.readouterr().err
    assert (
        "dry run of stage 'teacher': losses and gradients must be finite, loss/teacher was inf"
        in (error)
    )
    assert "in step 1; train it without --dry-run" in error
    assert tree(tmp_path) == before


def test_the_shrunk_run_trains_every_network_of_every_stage(tmp_path):
    root = Path(__file__).parents[2]
    config = load_config([str(root / "configs" / "demo.yaml"), f"runs_dir={tmp_path}"])
    names = [name for name in config.stages if name != "teacher"]
    small = dry.shrink(config, names, {"teacher"}, scratch=tmp_path / "scratch")
    assert list(small.stages) == names
    for name, stage in small.stages.items():
        is_head = stage.kind == "salience"
        assert stage.steps == (2 if is_head else 1)
        assert stage.params.get("student_every", 1) == 1
        assert stage.batch == config.stages[name].batch
        assert stage.params.get("targets", "online") == "online"
    assert small.stages["causal"].inputs == {"teacher": str(tmp_path / "demo" / "teacher")}
    assert small.stages["distill"].inputs["student"] == config.stages["distill"].inputs["student"]
    assert config.stages["distill"].steps > 1, "the run itself stays as it is"


@pytest.mark.slow
def test_a_whole_plan_runs_dry_after_its_data_and_with_a_finished_stage(tiny, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    assert main(["fit", *tiny, "--stage", "teacher"]) == 0
    before = tree(run)
    assert main(["run", *tiny, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "the data is needed anyway" in out
    tried = [line.split()[4].rstrip(":") for line in out.splitlines() if "dry run of stage" in line]
    assert tried == [name for name in load_config(tiny).stages if name != "teacher"]
    assert "dry run of evaluate: " in out
    assert tree(run) == before


STALE = "4711 on somewhere since long ago"
LIGHTNING = [sys.executable]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def leave_killed_dry_run(run: Path) -> None:
    """What a dry run that was killed at work leaves in a run folder."""
    (run / dry.SCRATCH).mkdir(parents=True)
    (run / dry.SCRATCH / dry.READY).write_text(STALE)
    (run / ".lock").write_text(STALE)


def test_a_rank_does_not_take_part_in_a_dry_run_that_was_killed(tmp_path, monkeypatch):
    config = load_config([str(Path(__file__).parents[2] / "configs" / "tiny.yaml")])
    config.runs_dir = str(tmp_path)
    leave_killed_dry_run(run := dry.run_folder(config))
    monkeypatch.setattr("launch.lock.LEADER_SECONDS", 0.5)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(PlanError, match="found no sign of it"), dry.scratch_folder(config, [], ""):
        pass
    monkeypatch.setenv("RANK", "0")
    with hold_lock(run) as owner, dry.scratch_folder(config, [], owner) as scratch:
        assert (scratch / dry.READY).read_text() == (run / ".lock").read_text() == owner
    assert not scratch.exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [LIGHTNING, TORCHRUN])
def test_two_ranks_run_dry_whoever_starts_them(tiny, tmp_path, launcher):
    run, root = tmp_path / "runs" / "tiny", Path(__file__).parents[2]
    before = tree(run)
    leave_killed_dry_run(run)
    words = [*tiny, "--stage", "teacher", "--dry-run", *SMALL]
    words += ["trainer.devices=2", "trainer.strategy=ddp"]
    command = ["timeout", "-k", "10", "250", *launcher, "-m", "launch", "fit", *words]
    done = subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)
    assert done.stdout.count("dry run: everything works; nothing of it is left") == 1
    assert tree(run) == before
