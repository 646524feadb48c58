"""Every strategy against a plain torch loop: the guard against upgrades of what lies below.

The loop keeps one AdamW per network, computes each rank's gradients by themselves and averages
them in order of rank. Gloo adds in that order, too, so that two ranks must give the same bits.
Two things are not in the strategy's hands and would hide this in the last bit: where a value has
more than two readers, autograd adds their gradients in an order of its own, which ZeRO-3's hooks
change (so networks of one layer, which have no such value); and ZeRO-3 replaces `linear` by a
function that sums the gradient of a bias in another order (so the loop uses it there, too).
"""

from contextlib import nullcontext
from functools import cache
from unittest import mock

import pytest
import torch
from deepspeed.runtime.zero.linear import zero3_linear_wrap
from safetensors.torch import load_file

from tests.train.exact import exact_stage, plain
from tests.train.small_stages import KINDS

STEPS = 10
EXACT = {"steps": STEPS, "clip": 0.0, "micro_batch": 0, "layers": 1}
CLIPPED = EXACT | {"clip": 0.2, "layers": 2}
SHARED_OUT = EXACT | {"micro_batch": 1, "layers": 2}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """As in the processes compared: another number of threads adds in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def zero(stage: int, settings: dict, **changes) -> dict:
    return {"strategy": "deepspeed", "zero_stage": stage} | settings | changes


def name_of(case: dict) -> str:
    short = (case.get("strategy"), case["zero_stage"], case["clip"], case["micro_batch"])
    return "-".join(map(str, (case["kind"], *short, case.get("offload_optimizer", ""))))


def run_cases(run_program, folder, cases: list[dict]) -> dict[str, dict]:
    """The trajectory of each case, all by the same two processes; those of ZeRO-3 come last."""
    words = []
    for case in sorted(cases, key=lambda case: case["zero_stage"]):
        words += ["--then", folder / f"{name_of(case)}.safetensors"]
        for key, value in case.items():
            words += [f"--{key}"] if value is True else [f"--{key}", value]
    seconds = 30 + 60 * len(cases)  # ZeRO-3 on a busy CPU
    assert run_program("tests.train.exact", *words[1:], ranks=2, seconds=seconds) == [0, 0]
    return {name_of(case): load_file(folder / f"{name_of(case)}.safetensors") for case in cases}


@cache
def reference(kind: str, settings: tuple, *, zero3: bool) -> dict[str, torch.Tensor]:
    patch = mock.patch("torch.nn.functional.linear", zero3_linear_wrap) if zero3 else nullcontext()
    with patch:
        return plain(kind, world=2, **dict(settings))


def expected(case: dict) -> dict[str, torch.Tensor]:
    settings = tuple((key, case[key]) for key in EXACT)
    return reference(case["kind"], settings, zero3=case["zero_stage"] == 3)


def largest_error(found, wanted, prefix: str) -> float:
    # A step that only gathers statistics has no norms.
    keys = [key for key in found if key.startswith(prefix) and found[key].numel()]
    assert keys
    return max(float((found[key] - wanted[key]).abs().max()) for key in keys)


BITWISE = [zero(2, EXACT, kind=kind) for kind in KINDS]
BITWISE += [zero(3, EXACT, kind=kind) for kind in ("teacher", "distill", "salience")]
BITWISE_REST = [zero(stage, EXACT, kind=kind) for kind in KINDS for stage in (0, 1)]
BITWISE_REST += [zero(3, EXACT, kind=kind) for kind in ("causal", "streaming", "lora")]
BITWISE_REST += [zero(2, EXACT, kind="lora")]
NEAR = [zero(2, CLIPPED, kind="distill"), zero(3, CLIPPED, kind="teacher")]
NEAR += [zero(2, CLIPPED, kind="streaming", offload_optimizer=True)]
NEAR += [zero(0, CLIPPED, kind="distill", strategy="ddp")]
NEAR_REST = [zero(stage, CLIPPED, kind=kind) for kind in KINDS for stage in range(4)]
NEAR_REST += [zero(0, CLIPPED, kind=kind, strategy="ddp") for kind in (*KINDS, "lora")]
NEAR_REST += [zero(3, CLIPPED, kind="teacher", offload_optimizer=True)]
ACCUMULATED = [zero(2, SHARED_OUT, kind="distill"), zero(3, SHARED_OUT, kind="causal")]
ACCUMULATED += [zero(0, SHARED_OUT, kind="distill", strategy="ddp")]
ACCUMULATED_REST = [zero(stage, SHARED_OUT, kind=kind) for kind in KINDS for stage in (1, 3)]


@pytest.fixture(scope="module")
def found(run_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    return run_cases(run_program, folder, [*BITWISE, *NEAR, *ACCUMULATED])


@pytest.fixture(scope="module")
def rest(run_program, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exact")
    return run_cases(run_program, folder, [*BITWISE_REST, *NEAR_REST, *ACCUMULATED_REST])


def check_bitwise(found, case):
    wanted = expected(case)
    parameters = exact_stage(case["kind"], layers=1).parameters()
    whole = sum(p.numel() for p in parameters if not p.requires_grad)
    held = int(found.pop("frozen_elements"))
    if case["zero_stage"] == 3:
        assert held <= 0.51 * whole, "frozen networks are sharded, too"
    else:
        assert held == whole
    for key in found:
        if not key.endswith("/norms"):
            assert torch.equal(found[key], wanted[key]), key
    for step in range(STEPS):
        torch.testing.assert_close(found[f"{step}/norms"], wanted[f"{step}/norms"])


def check_near(found, case):
    wanted = expected(case)
    del found["frozen_elements"]
    for key in found:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-6, atol=1e-6)


def check_accumulated(found, case):
    """Adam's first steps enlarge the last bit of a gradient that is almost zero; no later ones."""
    wanted = expected(case)
    errors = [largest_error(found, wanted, f"{step}/") for step in range(STEPS)]
    assert max(errors) <= 2e-4
    assert max(errors[STEPS // 2 :]) <= 2 * max(errors[: STEPS // 2]) + 1e-6


@pytest.mark.parametrize("case", BITWISE, ids=name_of)
def test_two_ranks_take_the_steps_of_plain_adamw_bit_for_bit(found, case):
    check_bitwise(found[name_of(case)], case)


@pytest.mark.parametrize("case", NEAR, ids=name_of)
def test_clipping_changes_no_more_than_the_last_bits_of_a_norm_can(found, case):
    check_near(found[name_of(case)], case)


@pytest.mark.parametrize("case", ACCUMULATED, ids=name_of)
def test_micro_batches_add_up_in_both_networks(found, case):
    check_accumulated(found[name_of(case)], case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", BITWISE_REST, ids=name_of)
def test_every_stage_is_exact_in_the_other_zero_stages(rest, case):
    check_bitwise(rest[name_of(case)], case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", NEAR_REST, ids=name_of)
def test_every_stage_clips_in_every_strategy(rest, case):
    check_near(rest[name_of(case)], case)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", ACCUMULATED_REST, ids=name_of)
def test_every_stage_accumulates_in_every_strategy(rest, case):
    check_accumulated(rest[name_of(case)], case)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_two_ranks_are_those_of_the_joined_batch(kind):
    settings = EXACT | {"steps": 3, "layers": 2}
    two, one = (plain(kind, world=world, **settings) for world in (2, 1))
    keys = [key for key in one if key.startswith("gradient/")]
    assert keys
    for key in keys:
        scale = float(one[key].abs().max())
        torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5 * scale)
