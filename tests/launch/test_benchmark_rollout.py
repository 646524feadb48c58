"""The benchmark of rollouts: its record, its clock, its bound, and that less storage is less."""

import json
import time

import pytest
import torch
import torch.nn.functional as F

from launch.__main__ import main
from launch.benchmark import peak_allocated
from launch.measured_rollout import (
    PARTS,
    SAMPLER,
    STORAGES,
    MeasuredRollout,
    Scene,
    Watch,
    shares,
    unavoidable,
)
from models.kv_policies import POLICIES

BLOCK, PLACES = 2, 6
TINY = ["--layers", "2", "--heads", "2", "--head-dim", "12", "--grid", "2", "3", "--block", "2"]
TINY += ["--budget-frames", "5", "--blocks", "7", "--threads", "1", "--repeats", "1"]


def scene(**changes) -> Scene:
    sizes = {"layers": 3, "heads": 2, "head_dim": 12, "grid": (2, 3), "block": BLOCK}
    sizes |= {"budget_frames": 5, "blocks": 8, "dtype": torch.float32, "device": "cpu"}
    return Scene(**sizes | changes)


def rollout(*, policy="salience", storage="model", **changes) -> MeasuredRollout:
    made = scene(**changes)
    network = made.network()
    cache = made.cache(network, policy=policy, storage=storage)
    return MeasuredRollout(network, cache, made.block_shape, made.text())


@pytest.fixture
def threads():
    """Puts back what the command sets for the process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_the_record_holds_every_policy_and_storage_with_all_numbers(capsys, tmp_path):
    out = tmp_path / "rollout.json"
    assert main(["bench", "rollout", *TINY, "--out", str(out)]) == 0
    assert "round 1/1" in capsys.readouterr().out
    listed = json.loads(out.read_text())
    rows = {(row["policy"], row["storage"]): row for row in listed}
    expected = {(name, "model") for name in POLICIES} | {("salience", name) for name in STORAGES}
    assert set(rows) == expected
    assert len(listed) == len(expected)
    full = rows["full", "model"]
    for row in rows.values():
        assert set(row["share"]) == set(PARTS)
        assert sum(row["share"].values()) == pytest.approx(1)
        assert min(row["share"].values()) >= 0
        assert row["tokens_per_second"] == pytest.approx(BLOCK * PLACES / row["seconds"])
        ratio = row["tokens_per_second"] / full["tokens_per_second"]
        assert row["ratio_to_full"] == pytest.approx(ratio)
        assert row["ratio_to_bound"] == pytest.approx(row["bound_seconds"] / row["seconds"])
        assert row["peak_bytes"] > row["kv_bytes"] + row["host_bytes"] > 0
        assert row["settings"]["video_frames"] == 14
        assert row["settings"]["ffn_dim"] == 140
        assert row["gpu"] == "unmeasured"
        assert row["hardware"]["cores"]
        assert row["versions"]["torch"] == torch.__version__
    budget, evicted, token_bytes = 5 * PLACES, 5 * PLACES // 4, 2 * 2 * 24 * 4  # of two layers
    assert full["budget_tokens"] is None
    assert full["past_tokens"] == 6 * BLOCK * PLACES  # before the seventh block, the one timed
    assert full["kv_bytes"] == 7 * BLOCK * PLACES * token_bytes
    assert rows["salience", "model"]["budget_tokens"] == budget
    assert rows["salience", "model"]["past_tokens"] == budget
    assert rows["salience", "model"]["kv_bytes"] == budget * token_bytes
    assert rows["salience", "offload"]["past_tokens"] == budget + evicted
    assert rows["salience", "offload"]["host_bytes"] == (42 * 2 - budget) * token_bytes
    assert rows["salience", "low"]["past_tokens"] == budget + evicted


@pytest.mark.usefixtures("threads")
def test_policies_narrows_and_full_always_runs(capsys, tmp_path):
    out = tmp_path / "rollout.json"
    words = [*TINY, "--policies", "fifo,random,fifo", "--dtype", "bfloat16", "--out", str(out)]
    assert main(["bench", "rollout", *words]) == 0
    capsys.readouterr()
    listed = json.loads(out.read_text())
    found = [(row["policy"], row["storage"]) for row in listed]
    out.unlink()
    again = listed[0]["command"].split()[3:]
    assert main(again) == 0, "the command in the record is the one given"
    assert json.loads(out.read_text())[0]["settings"] == listed[0]["settings"]
    assert found == [("full", "model"), ("fifo", "model"), ("random", "model")]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--policies", "fifo,saliense"], "found 'saliense'; did you mean 'salience'"),
        (["--policies", ""], "--policies must name cache policies"),
        (["--budget-frames", "1"], "budget must hold sink and recent frames"),
        (["--blocks", "6"], "--blocks must be at least 7, 4 to fill"),
        (["--head-dim", "5"], "--head-dim must be even, found 5"),
        (["--grid", "0", "3"], "--grid must be rows and columns of at least 1, found '0 3'"),
        (["--grid", "6"], "found '6'; give two numbers"),
        (["--grid", "2", "3", "-4"], "found '2 3 -4'"),
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--layers", "0"], "--layers must be at least 1, found 0"),
        (["--polices", "fifo"], "did you mean '--policies'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(words, named, capsys, tmp_path):
    out = str(tmp_path / "x.json")
    assert main(["bench", "rollout", *TINY, "--policies", "fifo", *words, "--out", out]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert named in captured.err
    assert list(tmp_path.iterdir()) == []


def test_less_storage_is_less_memory_at_the_peak():
    """4 bits take 0.16 of float32, in memory for 18 frames of which 12 stay.

    Besides, one layer of eight is decoded at a time, and the model precision holds a rotated copy
    of all keys.
    """
    sizes = {"layers": 8, "head_dim": 32, "grid": (6, 8), "block": 6, "budget_frames": 12}
    peaks = {}
    for storage in ("model", "int4"):
        made = rollout(storage=storage, **sizes)
        with torch.no_grad():
            peaks[storage] = peak_allocated(lambda made=made: made.start(3), device="cpu")
    assert peaks["model"] > 8 * 3 * 18 * 48 * 64 * 4  # keys, values and rotated keys
    assert peaks["int4"] < 0.6 * peaks["model"]


def test_the_parts_of_a_block_are_told_apart(monkeypatch):
    """On a clock that moves only where we say: 2 per denoising, and so on."""
    made, clock = rollout(), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    with torch.no_grad():
        made.start(4)
    policy, cache = made.cache.policy, made.cache

    def slow(owner, name, seconds):
        whole = getattr(owner, name)

        def slower(*args, **kwargs):
            clock[0] += seconds
            return whole(*args, **kwargs)

        monkeypatch.setattr(type(owner), name, lambda self, *a, **k: slower(*a, **k))

    slow(made, "denoise", 100.0)
    slow(made, "refresh", 10.0)
    slow(made, "decode", 7.0)
    slow(cache, "append", 2.0)
    slow(policy, "enter", 0.5)
    slow(policy, "renew", 0.25)
    slow(policy, "evict", 0.125)
    with torch.no_grad():
        parts = made.block_parts()
    expected = {"denoise": 100.0, "refresh": 10.0, "score": 3 * 0.75, "evict": 3 * 2.125}
    assert parts == expected | {"decode": 7.0}
    assert "append" not in vars(cache)
    assert "enter" not in vars(policy)


def test_methods_are_put_back_when_a_call_fails():
    watched, watch = rollout(), Watch("cpu")
    with pytest.raises(ValueError, match="negative"), watch.on(watched, ("decode",)):
        raise ValueError("negative")
    assert "decode" not in vars(watched)


def test_shares_are_of_medians():
    rounds = [
        {"denoise": d, "refresh": 2.0, "score": 1.0, "evict": 0.0, "decode": 1.0}
        for d in (4.0, 90.0, 3.0)
    ]
    assert shares(rounds) == {
        "denoise": 0.5,
        "refresh": 0.25,
        "score": 0.125,
        "evict": 0.0,
        "decode": 0.125,
    }


def test_the_bound_is_the_products_and_attentions_that_a_block_makes(monkeypatch):
    """Counted against a real block of the network: its own calls, less what is left out."""
    made = rollout(policy="sink_window")
    with torch.no_grad():
        made.start(4)
    linears, attentions = [], []
    linear, attention = F.linear, F.scaled_dot_product_attention

    def counted_linear(x, weight, bias=None):
        linears.append((*x.shape[-2:], *weight.shape))
        return linear(x, weight, bias)

    def counted_attention(queries, keys, values, **kwargs):
        attentions.append((*queries.shape, keys.shape[2]))
        return attention(queries, keys, values, **kwargs)

    monkeypatch.setattr(F, "linear", counted_linear)
    monkeypatch.setattr(F, "scaled_dot_product_attention", counted_attention)
    past = made.past_tokens()
    with torch.no_grad():
        made.advance()
    block, width, rows = BLOCK * PLACES, 24, scene().sizes()["text_rows"]
    real = [call for call in linears if call[0] == block and width in call[2:]]
    # The last layer of the refresh projects queries that nothing reads; patches leave at the end.
    real = [call for call in real if call[3] in (width, 140) and call[2] in (width, 140)]
    real_attentions = list(attentions)
    linears.clear()
    attentions.clear()
    with torch.no_grad():
        unavoidable(made, past_tokens=past)()
    assert sorted([*linears, (block, width, width, width)]) == sorted(real)
    assert sorted(attentions) == sorted(real_attentions)
    passes = 3 * (SAMPLER.num_steps + 1) - 1
    assert attentions.count((1, 2, block, 12, past + block)) == passes
    assert attentions.count((1, 2, block, 12, rows)) == passes
