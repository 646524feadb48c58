"""The benchmark of training: its record, its arithmetic, and what it refuses."""

import gc
import json
import math
import weakref
from types import SimpleNamespace

import pytest
import torch

from launch import benchmark_train, measured_train
from launch.__main__ import main
from launch.measured_train import SHAPES, measured_config, summary, together
from launch.plan import check_stages
from train.spans import SPANS
from train.speed import FLOPS, SAMPLES

WORDS = ["bench", "train", "--shape", "tiny", "--threads", "1"]


@pytest.fixture
def threads():
    """Puts back what the command sets for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("stage", ["salience", "streaming"])
def test_the_record_of_a_stage_adds_up_and_nothing_else_is_left(tmp_path, capsys, stage):
    out = tmp_path / "train.json"
    command = [*WORDS, "--stage", stage, "--steps", "4", "--warmup", "2", "--out", str(out)]
    command += ["--layers", "1"] if stage == "streaming" else []
    assert main(command) == 0
    (row,) = json.loads(out.read_text())
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]
    assert row["command"].startswith("python -m launch bench train --stage")
    assert (row["stage"], row["ranks"], row["strategy"]) == (stage, 1, "single")
    assert row["share"].keys() == {*SPANS, "other"}
    assert math.isclose(sum(row["share"].values()), 1)
    busy = {"data", "score", "backward", "optimizer", "checkpoint"}
    busy |= {"rollout"} if stage == "streaming" else set()
    assert all(row["share"][name] > 0 for name in busy)
    assert row["checkpoint_stall"]["seconds"] > 0
    assert row["mfu"] is None
    ratio = row["tflops_per_second"] / row["product_tflops_per_second"]
    assert math.isclose(row["ratio_to_product"], ratio)
    assert 0 < ratio < 1
    batch = {"salience": 4, "streaming": 2}[stage]
    tokens = batch * 12 * 8 / row["mean_seconds_per_step"]  # 12 frames of 2 x 4 tokens
    assert math.isclose(row["tokens_per_second"], tokens)
    assert row["peak_memory_gb"] > 0.1
    layers = (row["layers"], row["layers_of_plan"])
    assert layers == {"salience": (2, 2), "streaming": (1, 2)}[stage]
    shown = {"salience": "\n2 layers: ", "streaming": "\n1 of 2 layers: "}[stage]
    assert f"{shown}{row['seconds_per_step']:.3g} s per step" in capsys.readouterr().out


@pytest.mark.usefixtures("threads")
@pytest.mark.timeout(300)
def test_two_ranks_are_compared_with_one(tmp_path):
    out = tmp_path / "train.json"
    command = [*WORDS, "--stage", "teacher", "--steps", "2", "--warmup", "1", "--ranks", "1,2"]
    assert main([*command, "--out", str(out)]) == 0
    one, two = json.loads(out.read_text())
    assert [row["ranks"] for row in (one, two)] == [1, 2]
    assert [row["strategy"] for row in (one, two)] == ["single", "deepspeed"]
    assert (one["speedup"], one["efficiency"]) == (1, 1)
    assert math.isclose(two["speedup"], two["tokens_per_second"] / one["tokens_per_second"])
    assert math.isclose(two["efficiency"], two["speedup"] / 2)
    assert [path.name for path in tmp_path.iterdir()] == ["train.json"]


def step(*, seconds, checkpoint=0.0, **parts):
    values = {f"speed/{name}_seconds": parts.get(name, 0.0) for name in (*SPANS, "other")}
    waited = checkpoint + parts.get("data", 0.0)
    return values | {
        "speed/checkpoint_seconds": checkpoint,
        "speed/step_seconds": seconds - waited,
        "speed/wait_seconds": waited,
        FLOPS: 1e12 * seconds,
        SAMPLES: 4.0,
    }


def test_a_summary_keeps_the_checkpoint_out_of_the_steps():
    stage = SimpleNamespace(config=SimpleNamespace(frames=3), frame_seq_len=5)
    found = summary(
        [
            step(seconds=1.0, score=1.0),
            step(seconds=1.0, score=0.75, data=0.25),
            step(seconds=4.0 + 2.0, checkpoint=2.0, score=4.0),
        ],
        stage,
    )
    assert found["seconds_per_step"] == 1.0
    assert found["mean_seconds_per_step"] == 2.0
    assert found["tokens_per_second"] == 4 * 3 * 5 / 2.0
    assert found["checkpoint_stall"] == {"seconds": 2.0, "steps": 2.0}
    assert found["share"]["checkpoint"] == 2.0 / 8.0
    assert found["share"]["data"] == 0.25 / 8.0
    assert math.isclose(found["tflops_per_second"], (1 + 1 + 6) / 3 / 2.0)


def test_ranks_are_averaged_but_for_memory():
    one = {"mfu": None, "peak_memory_gb": 1.0, "share": {"data": 0.2}, "seconds_per_step": 1.0}
    other = {"mfu": None, "peak_memory_gb": 3.0, "share": {"data": 0.4}, "seconds_per_step": 2.0}
    found = together([one, other])
    assert found.pop("share") == pytest.approx({"data": 0.3})
    assert found == {"mfu": None, "peak_memory_gb": 3.0, "seconds_per_step": 1.5}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_is_a_plan_whose_stages_can_be_measured(shape):
    config = measured_config(
        SHAPES[shape], ranks=2, stage_name="streaming", num_steps=9, checkpoint_step=5
    )
    check_stages(config)
    stage = config.stages["streaming"]
    assert (stage.steps, stage.checkpoint_every, stage.sample_every) == (9, 5, 0)
    assert config.tracking.wandb == "disabled"
    if shape == "1.3b":
        assert config.model.num_layers == 30
        tokens = stage.frames * config.frame_seq_len
        width = config.model.num_heads * config.model.head_dim
        assert (tokens, width, config.model.ffn_dim) == (32760, 1536, 8960)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--stage", "techer"], "found 'techer'; did you mean 'teacher'"),
        (["--steps", "1"], "--steps must be at least 2, found 1"),
        (["--warmup", "0"], "--warmup must be at least 1"),
        (["--ranks", "two"], "--ranks must be numbers of processes such as 1,2, found 'two'"),
        (["--ranks", "0"], "found '0'"),
        (["--shape", "huge"], "--shape must be one of"),
        (["--strategy", "magic"], "trainer.strategy must be one of"),
        (["--layers", "0"], "model.num_layers must be above 0"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, capsys, words, message):
    out = tmp_path / "train.json"
    assert main([*WORDS, "--stage", "teacher", "--out", str(out), *words]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_and_a_shape_exclude_each_other(tmp_path, capsys):
    words = ["bench", "train", "seed=1", "--stage", "teacher", "--shape", "tiny"]
    assert main([*words, "--out", str(tmp_path / "x.json")]) == 2
    assert "--shape must not be given with a plan of one's own" in capsys.readouterr().err


def test_torchrun_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*WORDS, "--stage", "teacher", "--out", str(tmp_path / "x.json")]) == 2
    assert "give --ranks N without torchrun" in capsys.readouterr().err


@pytest.mark.parametrize(("ranks", "told"), [("1", "1 rank"), ("2", "2 ranks")])
def test_ranks_that_fail_are_an_error_and_leave_nothing(tmp_path, capsys, monkeypatch, ranks, told):
    failed = SimpleNamespace(returncode=3)
    mine = tmp_path / "x.json.work" / "mine"  # what others have there is left alone
    mine.parent.mkdir()
    mine.write_text("")
    monkeypatch.setattr(benchmark_train.subprocess, "run", lambda *_, **__: failed)
    words = [*WORDS, "--stage", "teacher", "--ranks", ranks, "--out", str(tmp_path / "x.json")]
    assert main(words) == 2
    assert f"a training of {told} must end with status 0, found 3" in capsys.readouterr().err
    assert list(tmp_path.rglob("*")) == [mine.parent, mine]


class Counted:
    """A stage, whose stop-watch refers to it."""


class Trained(Exception):
    """The measured training would begin now."""


def test_nothing_of_the_counted_training_is_left_when_the_measured_one_begins(monkeypatch):
    config = measured_config(
        SHAPES["tiny"], ranks=1, stage_name="teacher", num_steps=2, checkpoint_step=1
    )
    counted = []

    def train(config, stage_name, counters):
        if counted:
            assert counters == {"flops/all/1": 5}
            raise Trained(counted[0]())
        stage = Counted()
        stage.counters, stage.itself = {"flops/all/1": 5}, stage
        counted.append(weakref.ref(stage))
        return stage

    monkeypatch.setattr(measured_train, "_train", train)
    gc.disable()
    try:
        with pytest.raises(Trained) as reached:
            measured_train.train_measured(config, "teacher", warmup=1)
    finally:
        gc.enable()
    assert reached.value.args == (None,)
