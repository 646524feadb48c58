"""The meter of memory, fair timing, and the record of each benchmark."""

import json
import os
import time

import pytest
import torch
import torch.nn.functional as F

from launch.__main__ import main
from launch.benchmark import peak_allocated, time_interleaved
from models.salience_targets import attend_with_targets

MB = 1_000_000


def fails(capsys, *words: str) -> str:
    """The one line that a command with bad input leaves on stderr."""
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def block() -> torch.Tensor:
    return torch.zeros(10 * MB, dtype=torch.uint8)


def test_of_three_blocks_of_which_two_live_at_a_time_two_are_counted():
    def two_at_a_time():
        first = block()
        second = first + 1
        del first
        third = second + 1
        del second, third
        block()

    assert peak_allocated(two_at_a_time, device="cpu") == 20 * MB


def test_views_writes_in_place_and_what_was_there_before_are_not_counted():
    before = block()

    def nothing_new():
        before.view(-1, 10).add_(1)
        torch.add(before, 1, out=before)
        before[5:].reshape(-1)

    assert peak_allocated(nothing_new, device="cpu") == 0
    assert peak_allocated(lambda: before.view(-1, 10) + 1, device="cpu") == 10 * MB


def test_the_growth_of_a_tensor_is_counted():
    def grows():
        small = torch.empty(MB, dtype=torch.uint8)
        small.resize_(4 * MB)
        out = torch.empty(0, dtype=torch.uint8)
        torch.add(small, 1, out=out)

    assert peak_allocated(grows, device="cpu") == 8 * MB


def test_a_call_of_many_operators_keeps_no_record_of_them():
    def many():
        x = torch.zeros(1000)
        for _ in range(3000):
            x = x + 1

    assert peak_allocated(many, device="cpu") == 8000


def test_functions_take_turns_and_the_median_ignores_one_slow_call(monkeypatch):
    clock, calls = [0.0], []
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(name, seconds):
        calls.append(name)
        clock[0] += seconds[calls.count(name) - 1]

    found = time_interleaved(
        {
            "a": lambda: work("a", [50.0, 1.0, 2.0, 9.0]),
            "b": lambda: work("b", [50.0, 4.0, 4.0, 4.0]),
        },
        repeats=3,
        device="cpu",
    )
    assert calls == ["a", "b"] * 4
    assert found == {"a": 2.0, "b": 4.0}


def test_targets_leaves_a_record_that_says_what_was_measured(capsys, tmp_path):
    out = tmp_path / "targets.json"
    sizes = {"length": 100, "heads": 2, "head-dim": 8, "block": 30, "threads": 1, "repeats": 2}
    words = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    threads = torch.get_num_threads()
    assert main(["bench", "targets", *words, "--dtype", "bfloat16", "--out", str(out)]) == 0
    torch.set_num_threads(threads)
    shown = capsys.readouterr().out
    assert "round 2/2" in shown
    found = json.loads(out.read_text())
    ratio = found["seconds_with_targets"] / found["seconds_attention"]
    assert found["ratio"] == pytest.approx(ratio)
    assert found["ratio_to_floor"] == pytest.approx((ratio - 1) / 0.5)
    given = torch.randn(3, 1, 2, 100, 8, dtype=torch.bfloat16).unbind(0)
    plain = peak_allocated(lambda: F.scaled_dot_product_attention(*given), device="cpu")
    extended = peak_allocated(lambda: attend_with_targets(*given, 30), device="cpu")
    assert found["peak_extra_bytes"] == extended - plain
    expected = {"length": 100, "heads": 2, "head_dim": 8, "block": 30, "dtype": "bfloat16"}
    expected |= {"threads": 1, "repeats": 2, "device": "cpu", "backend": "auto"}
    assert {name: found[name] for name in expected} == expected
    assert found["baseline"].endswith("scaled_dot_product_attention")
    assert found["hardware"]["cores"] == os.cpu_count()
    assert found["versions"]["torch"] == torch.__version__
    command = found["command"].split()
    assert command[:5] == ["python", "-m", "launch", "bench", "targets"]
    out.unlink()
    assert main(command[3:]) == 0, "the command in the record is the command that made it"
    torch.set_num_threads(threads)
    again = json.loads(out.read_text())
    assert {name: again[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--dtype", "float8"], "--dtype must be one of"),
        (["--backend", "cuda"], "--backend must be one of"),
        (["--length", "0"], "--length must be at least 1, found 0"),
        (["--head-dim", "-4"], "--head-dim must be at least 1, found -4"),
        (["--threads", "0"], "--threads must be at least 1"),
        (["--device", "tpu"], "--device must be cpu or cuda"),
        (["--lenght", "5"], "did you mean '--length'"),
    ],
)
def test_bad_arguments_are_named_before_anything_runs(words, named, capsys, tmp_path):
    error = fails(capsys, "bench", "targets", *words, "--out", str(tmp_path / "x.json"))
    assert named in error
    assert list(tmp_path.iterdir()) == []


def test_a_record_that_cannot_be_written_is_an_error_before_anything_runs(capsys, tmp_path):
    for out in (tmp_path / "none" / "x.json", tmp_path):
        error = fails(capsys, "bench", "targets", "--out", str(out))
        assert "--out must be a file that can be written" in error
        assert str(out) in error


def test_an_unknown_benchmark_is_named_with_those_there_are(capsys):
    error = fails(capsys, "bench", "tragets", "--out", "x.json")
    assert "'tragets'" in error
    assert "targets" in error.replace("tragets", "")
