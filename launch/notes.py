"""What a run's numbers say in words: the headline, and what must be said against it."""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from launch.claims import HEURISTICS
from launch.figures import Row, best, series_of, style_of
from launch.tables import list_of, percent

PartScores = Mapping[str, Mapping[str, Sequence[float]]]
"""Part to `spearman` and `recall`, a value per layer each."""


def headline(rows: Sequence[Row]) -> tuple[str, str]:
    """The one number and its sentence, from rows of one stage and length."""
    budget = max((row["budget_tokens"] for row in rows if row["policy"] != "full"), default=0)
    here = [row for row in rows if row["policy"] == "full" or row["budget_tokens"] == budget]
    learned = best(here, lambda row: series_of(row) == "salience")
    if learned is None:
        return "&ndash;", "The learned cache was not evaluated in this run."
    number = f"{100 * learned['identity_accuracy']['mean']:.0f}<small>&thinsp;%</small>"
    full = best(here, lambda row: row["policy"] == "full")
    rule = best(here, lambda row: row["policy"] in HEURISTICS)
    sentence = "of the returning gondolas look right when a learned cache keeps "
    sentence += f"{_share_in_words(learned['budget_share'])} of a clip&rsquo;s tokens."
    if rule is not None:
        sentence += f" The best fixed rule of the same size gets {_mean(rule)}"
        sentence += f"; keeping everything, {_mean(full)}." if full is not None else "."
    return number, sentence


def _mean(row: Row) -> str:
    return percent(row["identity_accuracy"]["mean"])


def _share_in_words(share: float) -> str:
    words = {1 / 2: "half", 1 / 3: "a third", 1 / 4: "a quarter", 1 / 5: "a fifth"}
    for value, word in words.items():
        if abs(share - value) < 0.01:
            return word
    return percent(share)


def notes(results: dict[str, Any]) -> str:
    """The section that says what the numbers do not show."""
    rows = [row for row in results["policies"] if row["stage"] == results["stages"][0]]
    shortest = min(row["frames"] for row in rows)
    rows = [row for row in rows if row["frames"] == shortest]
    items = [
        *_winners(rows),
        *_rivals(rows),
        *_controls(rows),
        *_long(results),
        *_repair(results),
        *_background(rows),
        *_limits(results),
    ]
    return f"<section><h2>What to keep in mind</h2>{list_of(items, css='notes')}</section>"


def _winners(rows: Sequence[Row]) -> list[str]:
    """Who is best at each budget, and who cannot be told from the best."""
    parts = []
    for budget in sorted({row["budget_tokens"] for row in rows if row["policy"] != "full"}):
        here = [r for r in rows if r["policy"] != "full" and r["budget_tokens"] == budget]
        top = best(here, lambda row: True)
        assert top is not None, "the budget is that of a row"
        close = [
            style_of(series_of(row)).label
            for row in here
            if row is not top and _cannot_be_told_apart(row, top)
        ]
        others = "alone"
        if close:
            others = f"not told apart from {_listed([escape(name) for name in close])}"
        name = escape(style_of(series_of(top)).label)
        parts.append(f"at {budget} tokens {name}, {_mean(top)}, {others}")
    if not parts:
        return []
    return [
        f"<b>Who wins</b>: {'; '.join(parts)}. Alone means: by more than two standard deviations "
        "of the difference from every other."
    ]


def _cannot_be_told_apart(row: Row, top: Row) -> bool:
    one, other = row["identity_accuracy"], top["identity_accuracy"]
    return bool(other["mean"] - one["mean"] <= 2 * math.hypot(one["std"], other["std"]))


def _pairs(rows: Sequence[Row], series: str) -> list[tuple[Row, Row]]:
    """Rows of the learned cache with the row of `series` at the same budget."""
    other = {row["budget_tokens"]: row for row in rows if series_of(row) == series}
    return [
        (row, other[row["budget_tokens"]])
        for row in rows
        if series_of(row) == "salience" and row["budget_tokens"] in other
    ]


def _rivals(rows: Sequence[Row]) -> list[str]:
    parts = [
        f"{_mean(rival)} against {_mean(row)} at {row['budget_tokens']} tokens"
        for row, rival in _pairs(rows, "position_prior")
    ]
    if not parts:
        return []
    return [
        "<b>The strongest trivial rival</b> looks only at where a token is, with the mean salience "
        f"of that place and an age term from the same grid. It gets {', '.join(parts)}. "
        "It uses the teacher, so it is not counted among the fixed rules."
    ]


def _controls(rows: Sequence[Row]) -> list[str]:
    parts = []
    for series in ("untrained_head", "inverted_head"):
        values = [_mean(other) for _, other in _pairs(rows, series)]
        if values:
            parts.append(f"{style_of(series).label} {' / '.join(values)}")
    if not parts:
        return []
    return [f"<b>Sanity checks</b>, in the order of budgets: {'; '.join(parts)}."]


def _long(results: dict[str, Any]) -> list[str]:
    trained = results["world"]["training_frames"]
    longest = max(row["frames"] for row in results["policies"])
    rows = [row for row in results["policies"] if row["frames"] == longest]
    top = best(rows, lambda row: True)
    if longest <= trained or top is None:
        return []
    return [
        f"<b>Training clips have {trained} frames.</b> In longer rollouts a cache reads tokens "
        "from further back than any it was trained on, the one that keeps everything most of all. "
        f"Best at {longest} frames: {escape(style_of(series_of(top)).label)} after "
        f"&ldquo;{escape(top['stage'])}&rdquo;, {_mean(top)}."
    ]


def _repair(results: dict[str, Any]) -> list[str]:
    """Whether the stages after the second improve long rollouts, by two standard deviations."""
    stages = results["stages"]
    longest = max(row["frames"] for row in results["policies"])
    rows = {
        (row["stage"], series_of(row)): row
        for row in results["policies"]
        if row["frames"] == longest and row["policy"] == "salience"
    }
    parts = []
    for stage in stages[2:]:
        for series in dict.fromkeys(series for _, series in rows):
            before, after = rows.get((stages[1], series)), rows.get((stage, series))
            if before is not None and after is not None:
                parts.append(f"{escape(stage)}, {style_of(series).label}: {_change(before, after)}")
    if not parts:
        return []
    return [
        f"<b>Does more training repair long rollouts?</b> At {longest} frames, from "
        f"&ldquo;{escape(stages[1])}&rdquo; to {'; '.join(parts)}. A change counts if it is more "
        "than two standard deviations of the difference."
    ]


def _change(before: Row, after: Row) -> str:
    old, new = before["identity_accuracy"], after["identity_accuracy"]
    noise = math.hypot(old["std"], new["std"])
    difference = new["mean"] - old["mean"]
    verdict = "no clear change"
    if abs(difference) > 2 * noise:
        verdict = "better" if difference > 0 else "worse"
    return f"{_mean(before)} to {_mean(after)}, {verdict}"


def _background(rows: Sequence[Row]) -> list[str]:
    budget = max((row["budget_tokens"] for row in rows if row["policy"] != "full"), default=0)
    here = {series_of(row): row for row in rows if row["budget_tokens"] == budget}
    if "salience" not in here:
        return []
    mine = here["salience"]["background_drift"]
    calmer = [
        escape(style_of(series).label)
        for series, row in here.items()
        if row["background_drift"] < 0.9 * mine and not series.startswith("salience")
    ]
    if not calmer:
        return []
    return [
        "<b>The background</b> is kept better by other caches of the same size: "
        f"{', '.join(calmer)}. The learned cache spends its tokens on gondolas."
    ]


PREDICTORS = {
    "position": "the mean salience of the place",
    "key_norm": "the smallness of the key",
    "value_norm": "the size of the value",
}
"""How `launch.baselines` is called on the page."""


def beside_baselines(own: PartScores, baselines: Mapping[str, PartScores]) -> str:
    """In how many pairs of layer and part a head is better than each baseline, as a sentence.

    Args:
        own: Part to `spearman` and `recall` per layer.
        baselines: The same by the name of the baseline.
    """
    pairs = [(part, layer) for part in own for layer in range(len(own[part]["spearman"]))]
    parts = []
    for name, scores in baselines.items():
        wins = {
            metric: sum(own[part][metric][k] > scores[part][metric][k] for part, k in pairs)
            for metric in ("spearman", "recall")
        }
        parts.append(f"{PREDICTORS[name]} in {wins['spearman']} ({wins['recall']})")
    return (
        f"Of {len(pairs)} pairs of layer and part, the head ranks better than {_listed(parts)}; "
        "in brackets, where its recall is better."
    )


def _listed(parts: Sequence[str]) -> str:
    return " and ".join(part for part in (", ".join(parts[:-1]), parts[-1]) if part)


def _limits(results: dict[str, Any]) -> list[str]:
    world = results["world"]
    seeds = {row["train_seed"] for row in results["policies"]}
    unmeasured = [
        "<b>Unmeasured</b>: this evaluation ran on a CPU. Speed and peak memory on a GPU, and "
        "replaying a block as a CUDA graph, have tests and benchmarks but no numbers here."
    ]
    return [
        *(unmeasured if results.get("device", "cpu") == "cpu" else []),
        f"<b>{len(seeds)} training seed{'s' if len(seeds) > 1 else ''}.</b> The spread shown is "
        "over clips and rollout noise (sample standard deviation), not over trainings.",
        f"<b>The world is small</b>: {world['tokens_per_frame']} tokens per frame, a fixed period. "
        "A model can find a gondola by how long ago it was, without comparing what it looked like.",
        "<b>Published</b>: reading salience off a bidirectional teacher, split into later, same "
        "and earlier blocks, and a small head that predicts it. <b>Ours</b>: the age term, the "
        "standardisation, the noise level of the teacher, the shape of the head. No public "
        "implementation exists to compare with.",
    ]
