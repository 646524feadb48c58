import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import wandb

from configs.load import to_dict
from configs.schema import TrackingConfig
from tests.train.toy import toy_config, toy_stage, train
from tests.train.wandb_file import offline_runs, read_runs
from tests.train.wandb_server import WandbServer
from train import tracking
from train.fit import Interrupted
from train.tracking import (
    JsonlLogger,
    MetricWindow,
    RunInfo,
    build_wandb,
    close_wandb,
    log_export,
    truncate_rows,
)
from train.versions import code_version

ROOT = Path(__file__).parents[2]


def written_rows(path):
    return [json.loads(line) for line in path.open()]


def test_window_holds_the_mean_of_each_key_over_the_steps_that_reported_it():
    window = MetricWindow()
    window.add({"loss": 1.0, "spearman": 0.5})
    window.add({"loss": 2.0})
    assert window.latest == {"loss": 2.0}
    assert window.close() == {"loss": 1.5, "spearman": 0.5}
    assert window.close() == {}


def test_window_continues_bit_for_bit_through_json():
    values = [0.1, 1e-17, 1 / 3, 2e20, -2e20]
    whole, first, second = MetricWindow(), MetricWindow(), MetricWindow()
    for value in values:
        whole.add({"loss": value})
    for value in values[:3]:
        first.add({"loss": value})
    second.load_states([json.loads(json.dumps(first.state()))])
    for value in values[3:]:
        second.add({"loss": value})
    assert whole.close() == second.close()


def test_rows_beyond_the_resumed_step_and_a_torn_line_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 10, "loss": 1}\n{"step": 20, "loss": 2}\n{"step": 30}\n{"step": 1')
    logger = JsonlLogger(path)
    logger.open(resumed_step=20)
    logger.log_metrics({"loss": 3.0, "bad": float("nan")}, step=30)
    logger.save()
    logger.close()
    assert written_rows(path) == [
        {"step": 10, "loss": 1},
        {"step": 20, "loss": 2},
        {"step": 30, "loss": 3.0, "bad": None},
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", ["{", '{"step": 5', "null\n", '{"loss": 1}\n'])
def test_lines_that_are_no_rows_are_dropped(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + torn)
    truncate_rows(path, last_step=100)
    assert written_rows(path) == [{"step": 1}]


def test_a_logger_that_is_not_open_ignores_rows(tmp_path):
    logger = JsonlLogger(tmp_path / "metrics.jsonl")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.close()
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def without_key(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()  # it has read the environment once for all
    yield
    wandb.teardown()


def info(folder):
    return RunInfo("a/toy", "a", folder, {"a": 1})


def test_off_builds_nothing(tmp_path):
    assert build_wandb(TrackingConfig(wandb="disabled"), info(tmp_path)) is None
    log_export(TrackingConfig(wandb="disabled"), info(tmp_path), export=tmp_path, metadata={})
    assert list(tmp_path.iterdir()) == []


def test_offline_files_hold_what_the_record_holds_and_a_resume_continues_the_run(
    without_key, tmp_path
):
    config = toy_config(steps=6, log_every=1, sample_every=3, tracking=TrackingConfig())
    half = toy_stage(config)
    half.at_update = lambda step: step == 3 and os.kill(os.getpid(), signal.SIGTERM)
    options = {"decode": lambda latents: latents, "fps": 4, "data_hash": "abc"}
    with pytest.raises(Interrupted):
        train(tmp_path, config, half, **options)
    stage = train(tmp_path, config, **options)
    first, second = offline_runs(tmp_path)
    assert first.id == second.id == (tmp_path / tracking.RUN_ID_FILE).read_text()
    assert (second.name, second.group) == ("toy/toy", "toy")
    # W&B writes numbers as JSON, where a whole number has no point; floats come back as they were.
    mirrored = {**first.values(), **second.values()}
    for row in written_rows(tmp_path / "metrics.jsonl"):
        found = mirrored[row.pop("step")]
        assert {key: found[key] for key in row} == row
    assert sorted(mirrored) == [1, 2, 3, 4, 5, 6]
    assert {"loss/critic", "lr/student", "speed/tokens_per_second"} <= mirrored[5].keys()
    videos = [path for run in (first, second) for path in run.files if path.endswith(".mp4")]
    assert len(videos) == 2
    shown = {key: value for key, value in second.config.items() if key != "_wandb"}
    assert shown == json.loads(
        json.dumps(
            {
                "config": to_dict(config),
                "identity": stage.identity,
                "code": code_version(),
                "data": "abc",
            }
        )
    )


def test_an_export_goes_to_the_run_of_its_stage_with_its_files(without_key, tmp_path):
    export = tmp_path / "export"
    export.mkdir()
    (export / "head.safetensors").write_bytes(b"weights")
    (export / "manifest.json").write_text("{}")
    log_export(TrackingConfig(), info(tmp_path), export=export, metadata={"role": "student"})
    log_export(TrackingConfig(artifacts=False), info(tmp_path), export=export, metadata={})
    (run,) = offline_runs(tmp_path)
    (artifact,) = run.artifacts
    assert (artifact.type, artifact.name) == ("model", "a-toy")
    assert json.loads(artifact.metadata) == {"role": "student"}
    files = {entry.path: entry.local_path for entry in artifact.manifest.contents}
    assert files == {path.name: str(path) for path in export.iterdir()}
    assert run.id == (tmp_path / tracking.RUN_ID_FILE).read_text()


def test_an_alarm_reaches_the_mirror_once(without_key, tmp_path):
    tracked = TrackingConfig(alarm_factor=4.0, alarm_rows=1)
    config = toy_config(steps=4, log_every=1, tracking=tracked)
    stage = toy_stage(config)
    own, losses = stage.update, [1.0, 1.0, 9.0, 9.0]
    stage.update = lambda batch, step: (
        own(batch, step)
        | {
            "loss/critic": losses[step],
            "loss/student": 1.0,
        }
    )
    train(tmp_path, config, stage)
    (run,) = offline_runs(tmp_path)
    ((title, text),) = run.alerts
    assert title == "losses diverge"
    assert text.startswith("the losses diverge at step 3, 'critic' moves up: critic 1 -> 9")


@pytest.fixture
def server(without_key, monkeypatch):
    with WandbServer() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield server


def test_online_the_server_gets_every_row(server, tmp_path):
    tracked = TrackingConfig(wandb="online")
    train(tmp_path, toy_config(steps=3, log_every=1, tracking=tracked))
    lines = [
        json.loads(line)
        for body in server.streamed
        for line in body.get("files", {}).get("wandb-history.jsonl", {}).get("content", [])
    ]
    assert [line["trainer/global_step"] for line in lines] == [1, 2, 3]
    assert "UpsertBucket" in server.seen


def test_a_server_that_stops_answering_delays_the_end_by_no_more_than_configured(
    server, tmp_path, caplog
):
    config = toy_config(
        steps=5, log_every=1, tracking=TrackingConfig(wandb="online", finish_seconds=2)
    )
    stage = toy_stage(config)

    def hang(step):
        server.is_hanging = step >= 2

    stage.at_update = hang
    start = time.monotonic()
    train(tmp_path, config, stage)
    # Two seconds of patience; starting W&B and training take about three.
    assert time.monotonic() - start < 12
    assert "did not take all of run" in caplog.text
    (path,) = tmp_path.glob("wandb/run-*")
    assert f"wandb sync {path}" in caplog.text
    (run,) = read_runs(tmp_path, "run")
    assert sorted(run.values()) == [1, 2, 3, 4, 5]
    assert [row["step"] for row in written_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


LOST = """
import pathlib, sys
from configs.schema import TrackingConfig
from tests.train.toy import toy_config, toy_stage, train
from tests.train.wandb_server import WandbServer
import os
with WandbServer() as server:
    os.environ["WANDB_BASE_URL"] = server.url
    tracking = TrackingConfig(wandb="online", finish_seconds=2)
    config = toy_config(steps=5, log_every=1, tracking=tracking)
    stage = toy_stage(config)
    stage.at_update = lambda step: server.stop() if step == 2 else None
    train(pathlib.Path(sys.argv[1]), config, stage)
"""


def test_a_run_that_loses_its_server_ends_with_status_zero_and_a_warning(without_key, tmp_path):
    own = os.environ | {"WANDB_API_KEY": "0" * 40, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", LOST, str(tmp_path)]
    done = subprocess.run(
        command, env=own, cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "did not take all of run" in done.stderr
    assert [row["step"] for row in written_rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4, 5]


def test_a_server_that_never_answers_is_a_warning_and_the_run_goes_offline(
    server, tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tracking, "INIT_SECONDS", 2.0)
    server.is_hanging = True
    start = time.monotonic()
    logger = build_wandb(TrackingConfig(), info(tmp_path))
    assert time.monotonic() - start < 12  # two seconds of patience, and the start of W&B, twice
    assert logger.experiment.offline
    close_wandb(logger)
    assert "W&B refused the run" in caplog.text


def test_server_that_does_not_answer_is_a_warning_and_the_run_goes_offline(
    without_key, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        logger = build_wandb(TrackingConfig(), info(tmp_path))
    assert logger is not None
    assert logger.experiment.offline
    logger.experiment.finish()
    assert "cannot be reached" in caplog.text


@pytest.mark.parametrize(
    ("settings", "is_tried"),
    [
        ({}, True),
        ({"HTTPS_PROXY": "http://proxy.example:3128"}, False),
        ({"HTTP_PROXY": "http://proxy.example:3128"}, True),
        ({"https_proxy": "http://proxy.example:3128", "NO_PROXY": "wandb.example"}, True),
        ({"https_proxy": "http://proxy.example:3128", "NO_PROXY": "elsewhere.example"}, False),
    ],
)
def test_a_server_behind_a_proxy_is_not_tried_without_it(
    without_key, monkeypatch, settings, is_tried
):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example")
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    tried = []

    def refuse(address, timeout):
        tried.append(address)
        raise OSError("no route")

    monkeypatch.setattr("socket.create_connection", refuse)
    assert tracking._can_go_online("auto") is not is_tried
    assert tried == ([("wandb.example", 443)] if is_tried else [])


def test_online_without_a_key_is_a_warning(without_key, caplog):
    with caplog.at_level(logging.WARNING):
        assert not tracking._can_go_online("online")
    assert "needs WANDB_API_KEY" in caplog.text


def test_key_in_a_netrc_file_counts(without_key, tmp_path, monkeypatch):
    Path(tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking._has_key("api.wandb.ai")
    assert not tracking._has_key("elsewhere.example")


def test_wandb_is_not_imported_with_the_module(run_python):
    assert run_python("import sys, train.tracking; sys.exit('wandb.sdk' in sys.modules)") == 0


def test_the_commit_of_a_checkout_and_whether_it_was_changed(tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "x")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "x@example.org")

    def git(*words):
        command = ["git", "-C", str(tmp_path), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "a.py").write_text("1")
    assert code_version(tmp_path).keys() == {"version"}
    code_version.cache_clear()
    git("init", "-q")
    git("add", "a.py")
    git("commit", "-qm", "first")
    assert code_version(tmp_path) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (tmp_path / "a.py").write_text("2")
    assert not code_version(tmp_path)["dirty"]  # what runs is what was there at the start
    code_version.cache_clear()
    assert code_version(tmp_path)["dirty"]


def test_without_git_the_version_is_that_of_the_package(tmp_path, monkeypatch):
    (tmp_path / ".git").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert code_version(tmp_path).keys() == {"version"}


def test_a_broken_checkout_falls_back_to_the_package(tmp_path, caplog):
    (tmp_path / ".git").write_text("gitdir: nowhere")
    assert code_version(tmp_path).keys() == {"version"}
    assert "git cannot tell" in caplog.text
