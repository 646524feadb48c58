"""A loss or gradient that is not finite stops training before anything is updated or saved."""

import json
import os
import subprocess
import sys

import pytest
import torch

from configs.errors import UserError
from tests.train.conftest import ROOT
from tests.train.toy import arrange, toy_config, toy_stage, train
from train.checkpoint import newest_whole
from train.failures import newest_failure, read_failure


def failing_stage(config, event):
    stage = toy_stage(config)
    arrange(stage, event, ranks=1)
    return stage


def test_an_infinite_loss_stops_before_the_update_and_names_what_replays_it(tmp_path):
    config = toy_config(steps=6, checkpoint_every=1)
    stage = failing_stage(config, "inf:3")
    before = {}
    stage.at_update = lambda step: before.update(
        {key: value.clone() for key, value in stage.networks["critic"].state_dict().items()}
    )
    with pytest.raises(UserError) as stop:
        train(tmp_path, config, stage)
    record = tmp_path / "failure-00000004.json"
    assert str(stop.value) == (
        "losses and gradients must be finite, loss/critic was inf in step 4; nothing was updated "
        f"with it, {record} names the samples; take the step apart with: "
        f"python -m launch replay {tmp_path}"
    )
    after = stage.networks["critic"].state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert newest_whole(tmp_path / "checkpoints").name == "step-00000003"
    written = json.loads(record.read_text())
    assert (written["step"], written["network"]) == (4, "critic")
    assert written["checkpoint"] == "step-00000003"
    assert written["ranks"] == [{"loss": "inf", "seeds": [12, 13, 14, 15], "rank": 0}]
    assert len(written["identity_hash"]) == 64


def test_a_gradient_that_is_not_finite_is_told_from_a_loss(tmp_path):
    config = toy_config(steps=3)
    stage = toy_stage(config)
    weight = stage.networks["student"][2].weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    with pytest.raises(UserError, match=r"grad_norm/student was (inf|nan) in step 1"):
        train(tmp_path, config, stage)
    assert newest_whole(tmp_path / "checkpoints") is None
    assert read_failure(newest_failure(tmp_path)).quantity == "grad_norm/student"


def test_a_retry_that_fails_later_leaves_a_second_record_and_the_later_one_counts(tmp_path):
    config = toy_config(steps=6, checkpoint_every=1)
    for event in ("inf:1", "inf:4"):
        with pytest.raises(UserError):
            train(tmp_path, config, failing_stage(config, event))
    found = sorted(path.name for path in tmp_path.glob("failure*"))
    assert found == ["failure-00000002.json", "failure-00000005.json"]
    assert newest_failure(tmp_path).name == found[1]


@pytest.mark.parametrize("content", ["", "[]", '{"step": 3}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    path = tmp_path / "failure-00000003.json"
    path.write_text(content)
    with pytest.raises(UserError, match="must be the record of a failed step, it is damaged"):
        read_failure(path)


def test_one_rank_of_two_with_an_infinite_loss_stops_both(tmp_path, run_toy):
    words = [
        "--strategy",
        "deepspeed",
        "--devices",
        2,
        "--steps",
        4,
        "--event",
        "inf:2",
        "--batch",
        8,
    ]
    assert run_toy(tmp_path, *words, ranks=2) == [1, 1]
    written = json.loads((tmp_path / "failure-00000003.json").read_text())
    assert (written["quantity"], written["value"]) == ("loss/critic", "inf")
    first, second = written["ranks"]
    assert float(first["loss"]) < 100
    assert second["loss"] == "inf"
    assert (first["seeds"], second["seeds"]) == ([16, 17, 18, 19], [20, 21, 22, 23])
    assert newest_whole(tmp_path / "checkpoints").name == "step-00000002"


def test_the_record_is_written_also_where_ranks_have_loaders_and_a_parent(tmp_path, monkeypatch):
    """Nobody kills the ranks and loaders of a failing run before its record is there."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    words = ["--strategy", "ddp", "--devices", "2", "--event", "nan:2", "--workers", "1"]
    command = [sys.executable, "-m", "tests.train.toy", str(tmp_path), *words]
    guarded = ["timeout", "-k", "5", "200", *command]
    own = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(guarded, env=own, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "names the samples; take the step apart" in done.stderr
    assert "DataLoader worker" not in done.stderr
    written = json.loads((tmp_path / "failure-00000003.json").read_text())
    assert len(written["ranks"]) == 2
