"""An unfinished stage is not thrown away because a setting has changed, unless asked to."""

import json
import shutil

import pytest

from launch.__main__ import main
from train.callbacks import Checkpoints
from train.checkpoint import newest_whole

SMALL = ["stages.teacher.batch=2", "stages.causal.batch=2", "evaluate.stages=[]"]


class Stopped(Exception):
    """In place of a kill."""


@pytest.fixture
def stop_after(monkeypatch):
    """stop_after(N): the next trainings break off after N checkpoints; 0 = never."""
    written = []
    write = Checkpoints._write

    def arrange(count):
        def watched(self, trainer, stage):
            write(self, trainer, stage)
            written.append(1)
            if count and len(written) >= count:
                raise Stopped

        written.clear()
        monkeypatch.setattr(Checkpoints, "_write", watched)

    return arrange


def steps_of(stage):
    return [json.loads(line)["step"] for line in (stage / "metrics.jsonl").open()]


def test_another_setting_of_an_unfinished_stage_is_refused_by_name(
    tiny, tmp_path, capsys, stop_after
):
    stage = tmp_path / "runs" / "tiny" / "teacher"
    fit = ["fit", *tiny, "--stage", "teacher", *SMALL]
    stop_after(1)
    with pytest.raises(Stopped):
        main(fit)
    stop_after(0)
    capsys.readouterr()
    other = ["stages.teacher.optimizers.teacher.lr=0.5", "model.ffn_dim=64"]
    for words in ([*fit, *other], ["run", *tiny, *SMALL, *other]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert "stage 'teacher' must be continued with the settings it was begun with" in error
        assert "it has done 3 of 6 steps with others: " in error
        assert "stage.optimizers.teacher.lr: 0.003 in the checkpoint, 0.5 now" in error
        assert "model.ffn_dim: 128 in the checkpoint, 64 now" in error
        assert "set them back, choose another name=..., or give --restart" in error
        assert newest_whole(stage / "checkpoints").name == "step-00000003"
        assert not (tmp_path / "runs" / "tiny" / "superseded").exists()
    assert main([*fit, *other, "--restart"]) == 0
    (shelved,) = (tmp_path / "runs" / "tiny" / "superseded").iterdir()
    assert newest_whole(shelved / "checkpoints").name == "step-00000003"
    assert newest_whole(stage / "checkpoints").name == "step-00000006"


def test_settings_that_are_set_back_continue_and_free_ones_may_change(tiny, tmp_path, stop_after):
    stage = tmp_path / "runs" / "tiny" / "teacher"
    fit = ["fit", *tiny, "--stage", "teacher", *SMALL, "stages.teacher.log_every=1"]
    stop_after(1)
    with pytest.raises(Stopped):
        main(fit)
    stop_after(0)
    assert main([*fit, "seed=5"]) == 2
    assert main([*fit, "stages.teacher.keep=1"]) == 0
    assert steps_of(stage) == [1, 2, 3, 4, 5, 6]
    assert main([*fit, "seed=5"]) == 0, "a finished stage is set aside as ever"


def test_an_input_that_has_changed_is_named_and_one_that_would_be_made_anew_stops_nothing_else(
    tiny, tmp_path, capsys, stop_after
):
    run = tmp_path / "runs" / "tiny"
    assert main(["fit", *tiny, "--stage", "teacher", *SMALL]) == 0
    shutil.copytree(run / "teacher", tmp_path / "other")
    stop_after(1)
    with pytest.raises(Stopped):
        main(["fit", *tiny, "--stage", "causal", *SMALL])
    stop_after(0)
    manifest = tmp_path / "other" / "export" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"train_seed": 77}))
    capsys.readouterr()
    elsewhere = f"stages.causal.inputs.teacher={tmp_path / 'other'}"
    assert main(["fit", *tiny, "--stage", "causal", *SMALL, elsewhere]) == 2
    error = capsys.readouterr().err
    assert f"stage.inputs.teacher: 'teacher' in the checkpoint, '{tmp_path / 'other'}' now" in error
    assert "; inputs.teacher: '" in error
    # The teacher is finished, so its folder may be set aside, but the causal stage reads it.
    changed = "stages.teacher.optimizers.teacher.lr=0.5"
    assert main(["run", *tiny, *SMALL, changed]) == 2
    captured = capsys.readouterr()
    assert "in the checkpoint, 'to be made anew' now" in captured.err
    assert "teacher: running" not in captured.out
    assert (run / "teacher" / "DONE.json").exists()


def test_a_begun_stage_without_a_checkpoint_is_set_aside_as_ever(tiny, tmp_path, stop_after):
    fit = ["fit", *tiny, "--stage", "teacher", *SMALL]
    stop_after(1)
    with pytest.raises(Stopped):
        main(fit)
    stop_after(0)
    shutil.rmtree(tmp_path / "runs" / "tiny" / "teacher" / "checkpoints")
    assert main([*fit, "seed=5"]) == 0
