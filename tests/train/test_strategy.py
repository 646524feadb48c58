import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from tests.train.forks import run_cases
from tests.train.toy import final_weights, toy_config, toy_network, toy_stage
from train.checkpoint import newest_whole, read_marker, step_of
from train.engine import NonFiniteGradientError, SingleEngine, build_engines
from train.restore import restore

STEPS = 6
ZERO = {f"zero{stage}": ("--strategy", "deepspeed", "--zero_stage", stage) for stage in range(4)}
STRATEGIES = ZERO | {
    "ddp": ("--strategy", "ddp"),
    "offload": (*ZERO["zero2"], "--offload_optimizer"),
    "offload3": (*ZERO["zero3"], "--offload_optimizer"),
    "persistent": (*ZERO["zero3"], "--persistent_params", 100000),
}


@pytest.fixture(scope="module")
def two_ranks(run_toy, tmp_path_factory):
    """Under every strategy: a run as a whole, one that is stopped and goes on, a poisoned one."""
    folder = tmp_path_factory.mktemp("ranks")
    common = ("--devices", 2, "--steps", STEPS)
    words = []
    for name, case in STRATEGIES.items():
        words += ["--then", folder / f"{name}-whole", *common, *case]
        words += ["--then", folder / f"{name}-parts", *common, *case, "--event", "term:2"]
        words += ["--then", folder / f"{name}-parts", *common, *case]
        words += ["--then", folder / f"{name}-nan", *common, *case, "--event", "nan:3"]
    words += ["--then", folder / "bf16", *common, *ZERO["zero2"], "--precision", "bf16"]
    words += ["--then", folder / "bf16-zero3", *common, *ZERO["zero3"], "--precision", "bf16"]
    for name, case in (("bf16", ZERO["zero2"]), ("bf16-zero3", ZERO["zero3"])):
        once = ("--devices", 2, "--steps", 1, "--clip", 0, *case, "--precision", "bf16")
        words += ["--then", folder / f"{name}-first", *once]
    assert run_toy(*words[1:], ranks=2, seconds=280) == [0, 0]
    return folder


@pytest.mark.parametrize("name", STRATEGIES)
def test_sigterm_on_one_rank_stops_all_and_the_rest_follows_bit_for_bit(two_ranks, name):
    assert int((two_ranks / f"{name}-parts" / "interrupted").read_text()) == 3
    whole = load_file(two_ranks / f"{name}-whole" / "final.safetensors")
    parts = load_file(two_ranks / f"{name}-parts" / "final.safetensors")
    assert "average.0.weight" in whole
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_gradient_that_is_not_finite_stops_all_ranks_before_it_is_saved(two_ranks, name):
    for rank in (0, 1):
        message = (two_ranks / f"{name}-nan" / f"rank-{rank}-failed").read_text()
        assert message.startswith("losses and gradients must be finite, loss/critic was nan in st")
    saved = newest_whole(two_ranks / f"{name}-nan" / "checkpoints")
    assert step_of(saved) == 2
    for path in saved.glob("*.safetensors"):
        assert all(tensor.isfinite().all() for tensor in load_file(path).values())


@pytest.mark.parametrize("name", ["bf16", "bf16-zero3"])
def test_bfloat16_autocast_keeps_float32_weights_near_the_exact_ones(two_ranks, name):
    exact = load_file(two_ranks / "zero2-whole" / "final.safetensors")
    found = load_file(two_ranks / name / "final.safetensors")
    for key, value in exact.items():
        assert found[key].dtype == torch.float32
        # Six steps of at most the learning rate 0.03, of which rounding can turn a few around.
        torch.testing.assert_close(found[key], value, rtol=0, atol=0.1)
    assert any(not torch.equal(found[key], exact[key]) for key in exact)


@pytest.mark.parametrize("name", ["zero2-whole", "bf16", "bf16-zero3"])
def test_a_network_computes_with_its_new_weights_as_soon_as_they_are_there(two_ranks, name):
    rows = [json.loads(line) for line in (two_ranks / name / "metrics.jsonl").open()]
    assert all(row["moved"] > 0 for row in rows)


@pytest.mark.parametrize("name", [name for name in STRATEGIES if name != "persistent"])
def test_no_weight_is_held_when_a_closed_stage_is_gone(two_ranks, name):
    assert (two_ranks / f"{name}-whole" / "still_held").read_text() == "0"


@pytest.mark.parametrize("name", ["bf16", "bf16-zero3"])
def test_ranks_exchange_float32_also_where_layers_compute_in_bfloat16(two_ranks, name):
    saved = newest_whole(two_ranks / f"{name}-first" / "checkpoints")
    moments = load_file(saved / "rank-00000.safetensors")["engine.critic.exp_avg.0"]
    gradient = moments / (1 - 0.9)  # of the only step
    error = (gradient.bfloat16().float() - gradient).abs() / gradient.abs().clamp(min=1e-30)
    # A number of 24 bits is 2^-10 away from one of 8 on average; what was rounded before, nothing.
    assert error[gradient != 0].mean() > 2**-11


def test_metrics_of_two_ranks_are_their_mean(two_ranks):
    rows = [json.loads(line) for line in (two_ranks / "zero2-whole" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["loss/critic"] > 0


def test_four_two_and_one_rank_continue_from_the_same_checkpoint(tmp_path):
    """ZeRO-3 on four, ZeRO-2 on two, one alone: what is read is what was written, bit for bit."""
    common = ("--steps", STEPS, "--no_noise", "--keep", 9)
    runs = [
        (4, *ZERO["zero3"], "--event", "term:1"),
        (2, *ZERO["zero2"], "--event", "term:3"),
        (1,),
    ]
    waves = [
        {str(ranks): {"ranks": ranks, "folder": str(tmp_path / "parts"), "words": [*common, *more]}}
        for ranks, *more in runs
    ]
    waves[0]["whole"] = {"ranks": 1, "words": common}
    for wave in waves:
        for case in wave.values():
            case["words"] = [str(word) for word in case["words"]]
    found = run_cases(*waves, folder=tmp_path)
    assert all(rank["status"] == 0 for case in found.values() for rank in case)
    for step in (2, 4):
        check_restored(tmp_path / "parts", step)
    parts, whole = (load_file(tmp_path / name / "final.safetensors") for name in ("parts", "whole"))
    for key in whole:
        # Gradients of parts of a batch are added in another order than within it.
        torch.testing.assert_close(parts[key], whole[key], rtol=1e-4, atol=1e-4)


def check_restored(folder, step):
    """One process takes in what many have written: weights, averages and moments."""
    saved = folder / "checkpoints" / f"step-{step:08d}"
    stage = toy_stage(toy_config(steps=STEPS))
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    stage.identity = read_marker(saved)["identity"]
    assert restore(stage, saved) == step
    wanted = load_file(folder / f"stopped-{step}.safetensors")
    found = final_weights(stage)
    for key in wanted.keys() - {"mean"}:
        assert torch.equal(found[key], wanted[key]), key
    moments = [engine.optimizer.state.values() for engine in stage.engines.values()]
    assert all(float(m["exp_avg_sq"].abs().sum()) > 0 for states in moments for m in states)
    assert {int(m["step"]) for m in moments[1]} == {step}


def test_average_of_weights_is_an_error_where_none_is_kept():
    engine = SingleEngine(
        "critic", toy_network(1), toy_config(ema=0.0).stages["toy"].optimizers["critic"]
    )
    with pytest.raises(ValueError, match=r"optimizers\.critic\.ema must be above 0"):
        engine.weights(ema=True)


def test_asking_for_the_average_leaves_the_weights_alone():
    engine = SingleEngine(
        "student", toy_network(1), toy_config().stages["toy"].optimizers["student"]
    )
    engine.backward(engine(torch.ones(2, 6)).sum())
    engine.step(0.5)
    before = engine.weights()
    average = engine.weights(ema=True)
    assert all(torch.equal(before[key], value) for key, value in engine.weights().items())
    start = toy_network(1).state_dict()
    for key, value in average.items():
        torch.testing.assert_close(value, start[key].lerp(before[key], 0.1))


def test_gradient_that_is_not_finite_stops_before_the_update():
    engine = SingleEngine(
        "student", toy_network(1), toy_config().stages["toy"].optimizers["student"]
    )
    before = engine.weights()
    engine.backward(engine(torch.full((2, 6), float("inf"))).sum())
    with pytest.raises(NonFiniteGradientError, match="gradient of 'student' must be finite"):
        engine.step(0.5)
    assert all(torch.equal(before[key], value) for key, value in engine.weights().items())


def test_network_without_a_gradient_is_stepped_with_zero():
    settings = toy_config().stages["toy"].optimizers["student"]
    network = toy_network(1)
    engine = SingleEngine("student", network, settings)
    assert engine.step(0.5) == 0.0
    start = toy_network(1).state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, start[key] * (1 - 0.5 * settings.weight_decay))


def test_single_strategy_never_imports_deepspeed(run_toy, tmp_path):
    code = (
        "import sys; from tests.train.toy import *; from pathlib import Path;"
        f"train(Path({str(tmp_path)!r}), toy_config(steps=1));"
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
