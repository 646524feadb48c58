import io
import json
import os
import re
import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file

from configs.schema import TrackingConfig
from data.video import read_video
from tests.train.toy import ToyStage, ToyStream, final_weights, toy_config, toy_stage, train
from train.callbacks import Progress, StopSignals
from train.checkpoint import CheckpointError, newest_whole, step_of
from train.fit import Interrupted


def stage_that(config, action, *, at, kind=ToyStage):
    """A stage that runs `action` within step `at`."""
    stage = toy_stage(config, kind)
    stage.at_update = lambda step: action() if step == at else None
    return stage


def send(number):
    return lambda: os.kill(os.getpid(), number)


def test_training_leaves_one_row_per_window_and_a_checkpoint_of_the_last_step(tmp_path):
    stage = train(tmp_path, toy_config(steps=50, log_every=20))
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [20, 40, 50]
    assert all(row["loss/critic"] > 0 and row["speed/samples_per_second"] > 0 for row in rows)
    assert stage.completed == 50
    assert step_of(newest_whole(tmp_path / "checkpoints")) == 50


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stop_signal_saves_within_one_step_and_exits_with_zero(tmp_path, number):
    config = toy_config(steps=7, checkpoint_every=100)
    handlers = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    whole = final_weights(train(tmp_path / "whole", config))
    with pytest.raises(Interrupted) as stop:
        train(tmp_path / "run", config, stage_that(config, send(number), at=3))
    assert (stop.value.code, stop.value.step) == (0, 4)
    assert step_of(newest_whole(tmp_path / "run" / "checkpoints")) == 4
    found = [signal.getsignal(name) for name in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert found == handlers
    resumed = final_weights(train(tmp_path / "run", config))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_control_c_saves_first_and_is_still_an_interrupt(tmp_path):
    config = toy_config(steps=7, checkpoint_every=100)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, config, stage_that(config, send(signal.SIGINT), at=2))
    assert step_of(newest_whole(tmp_path / "checkpoints")) == 3


def test_a_second_control_c_acts_at_once():
    with StopSignals() as signals:
        signals.install()
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_signal_in_the_last_step_stops_what_would_follow(tmp_path):
    config = toy_config(steps=3)
    with pytest.raises(Interrupted) as stop:
        train(tmp_path, config, stage_that(config, send(signal.SIGTERM), at=2))
    assert stop.value.step == 3
    stage = toy_stage(config)
    stage.at_update = lambda step: pytest.fail(f"step {step} was repeated")
    assert train(tmp_path, config, stage).completed == 3


def test_a_thread_that_cannot_write_ends_the_training_whatever_the_reason(tmp_path, monkeypatch):
    def fail(*arguments):
        raise MemoryError("no room")

    monkeypatch.setattr("train.checkpoint._write_rank", fail)
    with pytest.raises(MemoryError, match="no room"):
        train(tmp_path, toy_config(steps=4))


def test_old_checkpoints_that_cannot_be_removed_are_told_and_do_no_harm(
    tmp_path, monkeypatch, caplog
):
    def fail(shelf):
        raise OSError("Directory not empty")

    monkeypatch.setattr("train.checkpoint._prune", fail)
    assert train(tmp_path, toy_config(steps=4)).completed == 4
    assert "is whole, but old checkpoints could not be removed (Directory" in caplog.text


def test_signal_within_a_stream_saves_the_start_of_the_stream(tmp_path):
    config = toy_config(steps=7, checkpoint_every=100)
    whole = final_weights(train(tmp_path / "whole", config, toy_stage(config, ToyStream)))
    with pytest.raises(Interrupted):
        train(
            tmp_path / "run", config, stage_that(config, send(signal.SIGTERM), at=4, kind=ToyStream)
        )
    assert step_of(newest_whole(tmp_path / "run" / "checkpoints")) == 3
    resumed = final_weights(train(tmp_path / "run", config, toy_stage(config, ToyStream)))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_fit_after_the_last_step_restores_and_trains_no_further(tmp_path):
    config = toy_config(steps=4)
    trained = final_weights(train(tmp_path, config))
    rows = (tmp_path / "metrics.jsonl").read_bytes()
    stage = toy_stage(config)
    stage.at_update = lambda step: pytest.fail(f"step {step} was repeated")
    found = final_weights(train(tmp_path, config, stage))
    assert stage.completed == 4
    assert all(torch.equal(trained[key], found[key]) for key in trained)
    assert (tmp_path / "metrics.jsonl").read_bytes() == rows


def test_resume_under_another_learning_rate_is_refused(tmp_path):
    train(tmp_path, toy_config(steps=2))
    other = toy_config(steps=2)
    other.stages["toy"].optimizers["critic"].lr = 0.5
    with pytest.raises(CheckpointError, match=r"stage\.optimizers\.critic\.lr: 0\.03 in the check"):
        train(tmp_path, other)


def test_resume_with_another_input_is_refused(tmp_path):
    train(tmp_path, toy_config(steps=2), input_hashes={"teacher": "aaa"})
    with pytest.raises(CheckpointError, match=r"inputs\.teacher: 'aaa' in the checkpoint, 'bbb'"):
        train(tmp_path, toy_config(steps=2), input_hashes={"teacher": "bbb"})


def test_how_often_to_save_may_change_on_a_resume(tmp_path):
    config = toy_config(steps=4, checkpoint_every=1)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, config, stage_that(config, lambda: 1 / 0, at=2))
    assert train(tmp_path, toy_config(steps=4, checkpoint_every=3)).completed == 4


def test_sample_videos_are_written_and_change_no_bit_of_the_training(tmp_path):
    plain = final_weights(train(tmp_path / "plain", toy_config(steps=4)))
    config = toy_config(steps=4, sample_every=2)
    config.tracking = TrackingConfig(wandb="offline")
    shown = train(tmp_path / "shown", config, decode=lambda latents: latents, fps=4)
    names = sorted(path.name for path in (tmp_path / "shown" / "samples").iterdir())
    assert names == ["step-00000002-0.mp4", "step-00000004-0.mp4"]
    frames = read_video(tmp_path / "shown" / "samples" / names[0])
    assert frames.shape[0] == 4
    # The toy previews latents of zero: middle grey.
    assert abs(float(frames.mean()) - 128) < 3
    found = final_weights(shown)
    assert all(torch.equal(plain[key], found[key]) for key in plain)
    assert list((tmp_path / "shown" / "wandb").glob("offline-run-*/files/media/videos/*.mp4"))


def test_lines_of_progress_name_stage_step_loss_and_time_left(tmp_path, capsys):
    train(tmp_path, toy_config(steps=4))
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"toy: step 4/4, loss/critic [\d.]+, 00:00 left", lines[-1])


def test_a_terminal_gets_a_bar_that_starts_at_the_resumed_step(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr("sys.stderr", Terminal())
    stage = toy_stage(toy_config(steps=9))
    stage.completed = 5
    bar = Progress("toy")
    bar.on_train_start(None, stage)
    stage.completed = 6
    stage.metrics.add({"loss/critic": 0.125})
    bar.on_train_batch_end(None, stage, None, None, 0)
    assert (bar._bar.n, bar._bar.total, bar._bar.desc) == (6, 9, "toy")
    assert bar._bar.postfix == "loss/critic 0.125"
    bar.teardown(None, stage, "fit")


def test_a_run_says_nothing_but_its_progress(tmp_path, capfd):
    with warnings.catch_warnings(record=True) as caught:
        train(tmp_path, toy_config(steps=2))
    assert [str(entry.message) for entry in caught] == []
    out, err = capfd.readouterr()
    assert out == ""
    assert err.count("\n") == err.count("toy: step")


def test_an_error_within_a_step_closes_the_records_and_keeps_its_type(tmp_path):
    config = toy_config(steps=4)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path, config, stage_that(config, lambda: 1 / 0, at=3))
    assert step_of(newest_whole(tmp_path / "checkpoints")) == 2
    assert load_file(tmp_path / "checkpoints/step-00000002/rank-00000.safetensors")
