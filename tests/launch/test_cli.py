"""The command line: verbs, help, exit statuses, and one sentence for bad input."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from launch import __main__ as cli
from launch import plan
from launch.__main__ import VERBS, main
from launch.export import write_export
from tests.launch.exported import write_student

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")


@pytest.fixture
def ckpt(tmp_path) -> Path:
    """The folder of a finished teacher stage."""
    manifest = {"role": "teacher", "stage": "teacher", "parents": {}}
    folder = tmp_path / "runs" / "x" / "teacher"
    write_export(
        folder / "export", weights={"transformer": {"w": torch.ones(2)}}, manifest=manifest
    )
    return folder


def fails(capsys, *words: str) -> str:
    """The one line that a command with bad input leaves on stderr."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_overview_names_every_verb_with_an_example(capsys):
    for words in ([], ["--help"], ["help"]):
        assert main(words) == 0
        text = capsys.readouterr().out
        for name in VERBS:
            assert re.search(rf"^  {name} ", text, re.MULTILINE)
            assert f"python -m launch {name} " in text


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_has_help_with_an_example(name, capsys):
    with pytest.raises(SystemExit) as end:
        main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m launch {VERBS[name].example.split()[0]}" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name in VERBS if name not in ("sample", "evaluate")])
def test_every_example_parses(name, capsys):
    words = VERBS[name].example.split()
    parser = cli.Parser()
    VERBS[name].declare(parser)
    parser.parse_intermixed_args(words[1:])


def test_a_misspelt_verb_suggests_the_nearest(capsys):
    assert "'ecode' is not a verb of python -m launch; did you mean 'encode'?" in fails(
        capsys, "ecode", TINY
    )
    assert "choose one of ['run', " in fails(capsys, "zzzz")


def test_a_misspelt_option_suggests_the_nearest(capsys):
    assert "did you mean '--stage'?" in fails(capsys, "fit", TINY, "--stag", "teacher")


def test_a_missing_option_is_named(capsys):
    assert "--stage" in fails(capsys, "fit", TINY)


def test_a_misspelt_key_suggests_the_nearest(capsys, tmp_path):
    error = fails(capsys, "run", TINY, "modle.num_layers=2", f"runs_dir={tmp_path}")
    assert "'modle' is not a key of the configuration; did you mean 'model'?" in error
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_named(capsys):
    assert "'none.yaml' must exist" in fails(capsys, "run", "none.yaml")


def test_a_misspelt_stage_suggests_the_nearest(capsys, tmp_path):
    error = fails(capsys, "fit", TINY, "--stage", "techer", f"runs_dir={tmp_path}")
    assert "found 'techer'; did you mean 'teacher'?" in error


def test_options_may_stand_between_files_and_overrides(capsys, tmp_path):
    words = ["fit", TINY, "--stage", "causal", f"runs_dir={tmp_path}", "seed=2"]
    assert "'causal' needs ['encode', 'teacher'] complete" in fails(capsys, *words)
    assert not (tmp_path / "tiny" / "causal").exists()


def test_a_budget_below_sink_and_recent_is_refused_before_anything_runs(capsys, tmp_path):
    override = "stages.streaming.params.budget_tokens=20"
    error = fails(capsys, "run", TINY, override, f"runs_dir={tmp_path}")
    assert "must hold sink and recent frames, 24 tokens" in error
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_a_checkpoint_of_another_role_is_refused(capsys, tmp_path, ckpt):
    student = f"stages.salience_causal.inputs.student={ckpt}"
    small = [f"runs_dir={tmp_path}", "source.world.clips=2", student]
    assert main(["world", TINY, *small]) == main(["ingest", TINY, *small]) == 0
    assert main(["encode", TINY, *small]) == 0
    only = "stages.salience_causal.inputs.teacher=" + str(ckpt)
    capsys.readouterr()
    assert main(["fit", TINY, "--stage", "salience_causal", *small, only]) == 2
    assert "must be a student, found a teacher of stage 'teacher'" in capsys.readouterr().err


def test_an_export_is_written_and_described_in_one_line(capsys, tmp_path):
    source, out = write_student(tmp_path / "runs" / "x" / "tuned"), str(tmp_path / "weights")
    assert main(["export", str(source), out, "--format", "diffusers"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: student of stage 'tuned' after 12 steps, ")
    assert said.endswith(" MB as diffusers, not verified\n")
    again = ["export", str(source), out, "--format", "diffusers"]
    assert "must not exist yet" in fails(capsys, *again)
    assert "must exist" in fails(capsys, "export", "nowhere", out + "2", "--format", "diffusers")
    assert "--format" in fails(capsys, "export", str(source), out + "2")


def test_report_of_a_run_that_does_not_exist_suggests_the_nearest(capsys, ckpt):
    folder = ckpt.parent.with_name("xx")
    assert f"did you mean '{ckpt.parent}'" in fails(capsys, "report", str(folder))


def test_show_prints_values_sizes_and_steps(capsys, tmp_path):
    assert main(["show", TINY, f"runs_dir={tmp_path}", "stages.teacher.steps=77"]) == 0
    text = capsys.readouterr().out
    assert "steps: 77" in text
    assert "parameters" in text
    assert "key-value cache" in text
    assert list(tmp_path.iterdir()) == []


def test_a_bug_is_not_hidden(monkeypatch, tmp_path):
    def broken(*_: object, **options: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(plan, "run", broken)
    with pytest.raises(KeyError, match="a bug"):
        main(["run", TINY, f"runs_dir={tmp_path}"])


def test_ctrl_c_exits_with_130_and_says_how_to_continue(monkeypatch, capsys, tmp_path):
    def interrupted(*_: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(plan, "run", interrupted)
    assert main(["run", TINY, f"runs_dir={tmp_path}"]) == 130
    assert "continue with the same command" in capsys.readouterr().err


def test_a_missing_file_that_the_user_named_is_no_bug_and_any_other_is(monkeypatch, capsys):
    def opens(name: str) -> None:
        monkeypatch.setattr(plan, "run", lambda _, **options: Path(name).read_text())

    opens("seed=1")  # any word of the command
    assert "'seed=1' must exist" in fails(capsys, "run", TINY, "seed=1")
    opens("another")
    with pytest.raises(FileNotFoundError):
        main(["run", TINY, "seed=1"])


def test_another_rank_says_which_it_is(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    assert main(["run", "none.yaml"]) == 2
    assert capsys.readouterr().err.startswith("rank 3: error: ")


def launch(*words: str, **options):
    command = [sys.executable, "-m", "launch", *words]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_the_module_is_the_command(tmp_path):
    process = launch("run", TINY, "sed=1")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == "error: sed=1: 'sed' is not a key of the configuration; did you mean 'seed'?\n"


def test_a_run_folder_in_use_is_refused_and_a_killed_run_continues(tmp_path):
    words = ["world", TINY, f"runs_dir={tmp_path}", "source.world.clips=60"]
    first = launch(*words)
    written = tmp_path / "tiny" / "data" / "world"
    deadline = time.monotonic() + 60
    while len(list(written.glob("*.mp4"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)  # alive, and no faster than the second
    second = launch(*words)
    _, err = second.communicate(timeout=120)
    assert second.returncode == 2
    assert re.search(rf"must be free, found process {first.pid} on .* at work", err)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=10)
    kept = len(list(written.glob("*.mp4")))
    oldest = min(path.stat().st_mtime_ns for path in written.glob("*.mp4"))
    third = launch(*words)
    out, _ = third.communicate(timeout=120)
    assert third.returncode == 0
    assert "step world: continuing" in out
    assert kept < len(list(written.glob("*.mp4"))) == 60
    assert min(path.stat().st_mtime_ns for path in written.glob("*.mp4")) == oldest
