"""What a run on the built-in world must show: numbers of its evaluation against bounds.

The bounds on accuracy are those of a prototype, loosened. What few steps must win was chosen after
trial runs: with everything cached the undistilled student leaves nothing to win.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.figures import Row, best, series_of
from models.kv_policies import POLICIES

HEURISTICS = (
    *(name for name, policy in POLICIES.items() if policy.is_bounded and not policy.needs_head),
    "random_once",
)
"""Policies that learn nothing from a teacher, by their names in the results."""
FEW_STEPS = (1, 2)
TOLERANCE = 0.10
"""Identity accuracy that later stages, or fewer steps, may cost."""


@dataclass(frozen=True)
class Claim:
    """A number that must reach a bound.

    Attributes:
        text: What the number is.
        found: The number.
        bound: What it must reach.
        is_floor: Whether it must be at least the bound; else at most.
        is_strict: Whether the bound itself is not enough.
    """

    text: str
    found: float
    bound: float
    is_floor: bool = True
    is_strict: bool = False

    @property
    def holds(self) -> bool:
        """Whether the number reaches its bound."""
        if self.found == self.bound:
            return not self.is_strict
        return (self.found > self.bound) == self.is_floor

    @property
    def relation(self) -> str:
        """What the number must be, as `>= 0.950`."""
        return f"{'>' if self.is_floor else '<'}{'' if self.is_strict else '='} {self.bound:.3f}"

    def __str__(self) -> str:
        verdict = "holds" if self.holds else "does NOT hold"
        return f"{self.text}: {self.found:.3f}, must be {self.relation}: {verdict}"


def claims_of(results: Mapping[str, Any]) -> list[Claim]:
    """Every claim that these results can decide.

    The first stage is taken for the many-step student, the second for its distillation and the
    last for the end of the plan, as `evaluate.stages` of the demo lists them; what stands between
    is there to be compared with, and nothing is asked of it.

    Args:
        results: As in `results.json`.
    """
    stages, rows = results["stages"], results["policies"]
    shortest = min(row["frames"] for row in rows)
    short = [row for row in rows if row["frames"] == shortest]
    first = [row for row in short if row["stage"] == stages[0]]
    claims = _memory(first)
    for stage in dict.fromkeys([*stages[1:2], *stages[2:][-1:]]):
        claims += _later_stage(stage, first, [row for row in short if row["stage"] == stage])
    if len(stages) > 1:
        claims += _few_steps(results["quality"], stages[0], stages[1])
    return claims


def _accuracy(row: Row) -> float:
    return float(row["identity_accuracy"]["mean"])


def _at(rows: Sequence[Row], series: str, budget: int) -> float | None:
    found = [row for row in rows if series_of(row) == series and row["budget_tokens"] == budget]
    return _accuracy(found[0]) if found else None


def _budgets(rows: Sequence[Row]) -> list[int]:
    return sorted({row["budget_tokens"] for row in rows if row["policy"] != "full"})


def _memory(rows: Sequence[Row]) -> list[Claim]:
    """Of the many-step student: what is kept decides, and the head knows what to keep."""
    claims = []
    full = best(rows, lambda row: row["policy"] == "full")
    if full is not None:
        claims.append(Claim("keeping everything", _accuracy(full), 0.95))
    budgets = _budgets(rows)
    if not budgets:
        return claims
    small, large = budgets[0], budgets[-1]
    learned = _at(rows, "salience", large)
    if learned is not None:
        claims.append(Claim(f"learned salience, {large} tokens", learned, 0.85))
        rule = best(rows, lambda row: row["policy"] in HEURISTICS and row["budget_tokens"] == large)
        if rule is not None:
            text = f"lead over {rule['policy']}, the best fixed rule, {large} tokens"
            claims.append(Claim(text, learned - _accuracy(rule), 0.35))
        prior = _at(rows, "position_prior", large)
        if prior is not None:
            claims.append(Claim(f"lead over position_prior, {large} tokens", learned - prior, 0.10))
    for series, bound, is_floor in (
        ("salience", 0.70, True),
        ("untrained_head", 0.25, False),
        ("inverted_head", 0.15, False),
    ):
        found = _at(rows, series, small)
        if found is not None:
            claims.append(Claim(f"{series}, {small} tokens", found, bound, is_floor))
    return claims


def _later_stage(stage: str, first: Sequence[Row], rows: Sequence[Row]) -> list[Claim]:
    budgets = _budgets(rows)
    if not budgets:
        return []
    before, after = (_at(of, "salience", budgets[-1]) for of in (first, rows))
    if before is None or after is None:
        return []
    text = f"learned salience after {stage}, {budgets[-1]} tokens"
    return [Claim(text, after, before - TOLERANCE)]


def _few_steps(quality: Sequence[Row], parent: str, child: str) -> list[Claim]:
    """The distilled student is as right as its parent at many steps, and crisper at equally few.

    Crisper means: by more than two standard deviations of the difference. It is judged where the
    cache has forgotten and the student must invent: few steps give the mean of all gondolas there,
    and identity says nothing.
    """
    rows = {(row["stage"], row["policy"], row["steps"]): row for row in quality}
    many = max((row["steps"] for row in quality if row["stage"] == parent), default=0)
    claims = []
    for steps in FEW_STEPS:
        at = f"{child} at {steps} step{'s' if steps > 1 else ''}"
        reference, right = rows.get((parent, "full", many)), rows.get((child, "full", steps))
        if reference is not None and right is not None and many > steps:
            text = f"{at}, everything kept; its parent at {many} gets {_accuracy(reference):.3f}"
            claims.append(Claim(text, _accuracy(right), _accuracy(reference) - TOLERANCE))
        before, after = (rows.get((stage, "sink_window", steps)) for stage in (parent, child))
        if before is not None and after is not None:
            parents, own = before["crisp_share"], after["crisp_share"]
            text = f"crisp frames of {at}, mostly forgotten; its parent has {parents['mean']:.3f}"
            bound = parents["mean"] + 2 * math.hypot(parents["std"], own["std"])
            claims.append(Claim(text, own["mean"], bound, is_strict=True))
    return claims
