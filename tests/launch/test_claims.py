"""What a run must show is judged by its numbers, and can fail."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from launch.claims import Claim, claims_of
from models.kv_policies import POLICIES

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def row(policy: str, accuracy: float, *, stage: str = "many", tokens: int = 128, **more) -> dict:
    return {
        "stage": stage,
        "policy": policy,
        "frames": 96,
        "budget_tokens": tokens,
        "identity_accuracy": {"mean": accuracy, "std": 0.01},
    } | more


def good_results() -> dict[str, Any]:
    weights = {"weights": [1.0, 0.0, 0.0]}
    policies = [row("full", 0.97, tokens=768), row("full", 0.4, tokens=3840) | {"frames": 480}]
    for tokens, accuracy in ((96, 0.8), (128, 0.9)):
        policies += [
            row("salience", accuracy, tokens=tokens, **weights),
            row("position_prior", accuracy - 0.2, tokens=tokens),
            row("fifo", 0.1, tokens=tokens),
            row("random", 0.3, tokens=tokens),
            row("untrained_head", 0.1, tokens=tokens),
            row("inverted_head", 0.1, tokens=tokens),
        ]
    for stage in ("few", "streaming"):
        policies.append(row("salience", 0.85, stage=stage, **weights))
    quality = [
        row(policy, accuracy, stage=stage, steps=steps, crisp_share={"mean": crisp, "std": 0.01})
        for stage, steps, accuracy, crisp in (
            ("many", 1, 0.90, 0.05),
            ("many", 2, 0.95, 0.15),
            ("many", 32, 0.98, 0.70),
            ("few", 1, 0.93, 0.40),
            ("few", 2, 0.96, 0.50),
        )
        for policy in ("full", "sink_window")
    ]
    return {"stages": ["many", "few", "streaming"], "policies": policies, "quality": quality}


@pytest.mark.parametrize(("name", "claims"), [("demo", 13), ("demo-seed-1", 7)])
def test_the_results_that_come_with_the_code_pass_every_claim(name, claims):
    saved = json.loads((ROOT / f"benchmarks/results/{name}-2-core-cpu.json").read_text())
    assert len(claims_of(saved["results"])) == claims
    assert failing(saved["results"]) == []


def failing(results: dict[str, Any]) -> list[str]:
    return [claim.text for claim in claims_of(results) if not claim.holds]


def test_good_results_pass_every_claim():
    results = good_results()
    assert failing(results) == []
    # full, three at a third, three at a quarter, two later stages, two for each of two counts.
    assert len(claims_of(results)) == 13


@pytest.mark.parametrize(
    ("policy", "tokens", "accuracy", "broken"),
    [
        ("full", 768, 0.94, "keeping everything"),
        ("fifo", 128, 0.60, "lead over fifo, the best fixed rule, 128 tokens"),
        ("position_prior", 128, 0.85, "lead over position_prior, 128 tokens"),
        ("salience", 96, 0.60, "salience, 96 tokens"),
        ("untrained_head", 96, 0.30, "untrained_head, 96 tokens"),
        ("inverted_head", 96, 0.20, "inverted_head, 96 tokens"),
    ],
)
def test_one_bad_number_breaks_its_claim(policy: str, tokens: int, accuracy: float, broken: str):
    results = good_results()
    for entry in results["policies"]:
        if (entry["policy"], entry["budget_tokens"], entry["stage"]) == (policy, tokens, "many"):
            entry["identity_accuracy"]["mean"] = accuracy
    assert failing(results) == [broken]


def test_a_distillation_that_changed_nothing_fails():
    results = good_results()
    parents = [copy.deepcopy(r) for r in results["quality"] if r["stage"] == "many"]
    results["quality"] = parents + [parent | {"stage": "few"} for parent in parents]
    broken = failing(results)
    assert len(broken) == 2
    assert all("crisp frames" in text for text in broken)


def test_a_lead_within_two_deviations_is_none():
    results = good_results()
    for entry in results["quality"]:
        if (entry["stage"], entry["steps"]) == ("few", 1):
            entry["crisp_share"]["std"] = 0.18  # 0.40 against 0.05: a lead of 0.35
    assert [text[:15] for text in failing(results)] == ["crisp frames of"]


def test_nothing_is_asked_of_stages_in_between():
    results = good_results()
    results["stages"] = ["many", "few", "control", "streaming"]
    results["policies"].append(row("salience", 0.1, stage="control", weights=[1.0, 0.0, 0.0]))
    assert failing(results) == []


def test_a_last_stage_that_forgets_fails():
    results = good_results()
    results["policies"][-1]["identity_accuracy"]["mean"] = 0.7
    assert failing(results) == ["learned salience after streaming, 128 tokens"]


def test_results_of_one_stage_without_budgets_claim_what_they_can():
    results = good_results()
    results["stages"], results["quality"] = ["many"], []
    results["policies"] = results["policies"][:1]
    assert [claim.text for claim in claims_of(results)] == ["keeping everything"]


def test_a_claim_in_words():
    text = str(Claim("error", 0.5, 0.5, is_floor=False, is_strict=True))
    assert text == "error: 0.500, must be < 0.500: does NOT hold"


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1.6), ("bfloat16", 2.2)])
def test_saved_cost_of_salience_targets_is_within_its_goal(dtype, most):
    record = json.loads((RESULTS / f"targets-{dtype}-2-core-cpu.json").read_text())
    assert (record["length"], record["heads"], record["head_dim"]) == (8192, 12, 64)
    assert record["dtype"] == dtype
    assert record["threads"] == 2
    assert 1 < record["ratio"] <= most
    assert record["ratio"] == record["seconds_with_targets"] / record["seconds_attention"]
    assert record["peak_extra_bytes"] <= 64e6


def test_saved_rollouts_show_every_policy_and_a_cheap_head():
    listed = json.loads((RESULTS / "rollout-2-core-cpu.json").read_text())
    rows = {(row["policy"], row["storage"]): row for row in listed}
    assert {policy for policy, _ in rows} == set(POLICIES)
    share = rows["salience", "model"]["share"]
    assert share["score"] + share["evict"] <= 0.05
    peaks = [rows["salience", storage]["peak_bytes"] for storage in ("model", "int8", "int4")]
    assert peaks[0] > 1.5 * peaks[1]
    assert peaks[1] > peaks[2]
    assert {row["gpu"] for row in listed} == {"unmeasured"}
