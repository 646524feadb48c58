import json
import logging
from pathlib import Path

import pytest

from configs.schema import TrackingConfig
from train import tracking
from train.tracking import JsonlLogger, MetricWindow, build_wandb, truncate_rows


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


def test_off_builds_nothing(tmp_path):
    assert build_wandb(TrackingConfig(wandb="off"), folder=tmp_path, name="x", config={}) is None
    assert list(tmp_path.iterdir()) == []


def test_without_a_key_the_run_is_written_offline_and_keeps_its_id(without_key, tmp_path):
    ids = []
    for _ in range(2):
        logger = build_wandb(
            TrackingConfig(), folder=tmp_path / "toy", name="a/toy", config={"a": 1}
        )
        assert logger is not None
        logger.log_metrics({"loss": 0.5}, step=10)
        ids.append(logger.experiment.id)
        logger.experiment.finish()
    assert ids[0] == ids[1] == (tmp_path / "toy" / tracking.RUN_ID_FILE).read_text()
    files = list((tmp_path / "toy" / "wandb").glob(f"offline-run-*-{ids[0]}/run-{ids[0]}.wandb"))
    assert len(files) >= 1


def test_server_that_does_not_answer_is_a_warning_and_the_run_goes_offline(
    without_key, tmp_path, monkeypatch, caplog
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:1")
    with caplog.at_level(logging.WARNING):
        logger = build_wandb(TrackingConfig(), folder=tmp_path, name="a", config={})
    assert logger is not None
    assert logger.experiment.offline
    logger.experiment.finish()
    assert "cannot be reached" in caplog.text


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
