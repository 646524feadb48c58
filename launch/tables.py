"""Tables of the report as HTML."""

import statistics
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from launch.claims import Claim
from launch.figures import Row, series_of, style_of

LEFT = ("stage", "policy", "student", "cache", "claim", "tokens ranked by")
"""Headings of columns that hold names."""


def percent(share: float) -> str:
    """`0.932` as `93 %`."""
    return f"{100 * share:.0f}&nbsp;%"


def spread(value: Mapping[str, float | None]) -> str:
    """Mean and standard deviation in per cent; a dash if there is none."""
    if value["mean"] is None or value["std"] is None:
        return "&ndash;"
    return f"{100 * value['mean']:.1f} <small>&plusmn; {100 * value['std']:.1f}</small>"


def name_cell(series: str) -> str:
    """First cell of a row: the colour of the series, and its name."""
    label = escape(style_of(series).label)
    dot = f'<i style="background:var(--c-{series}, #888)"></i>'
    return f'<td style="text-align:left">{dot}{label}</td>'


def accuracy_cell(row: Row | None) -> str:
    """Identity accuracy with a bar behind it, empty if the row does not exist."""
    if row is None:
        return "<td></td>"
    value = row["identity_accuracy"]
    series = series_of(row)
    return (
        f'<td class="bar" style="--share:{100 * value["mean"]:.1f}%;--bar:var(--c-{series}, #888)">'
        f"{spread(value)}</td>"
    )


def table(head: Sequence[str], rows: Sequence[str]) -> str:
    """A table that scrolls sideways on narrow screens; cells are HTML."""
    top = "".join(f"<th{' class=left' if cell in LEFT else ''}>{cell}</th>" for cell in head)
    body = "".join(rows)
    return (
        f'<div class="wide"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def policy_table(rows: Sequence[Row]) -> str:
    """All policies of one stage and length: accuracy per budget, the rest at the largest budget."""
    budgets = sorted({row["budget_tokens"] for row in rows if row["policy"] != "full"})
    largest: dict[str, Row] = {}
    accuracy: dict[tuple[str, int], Row] = {}
    for row in sorted(rows, key=lambda row: row["budget_tokens"]):
        series = series_of(row)
        largest[series] = row
        accuracy[series, row["budget_tokens"]] = row
    for budget in budgets:
        if "full" in largest:
            accuracy["full", budget] = largest["full"]
    ranked = sorted(largest, key=lambda s: -largest[s]["identity_accuracy"]["mean"])
    lines = []
    for series in ranked:
        row = largest[series]
        cells = [accuracy_cell(accuracy.get((series, budget))) for budget in budgets]
        cells += [f"<td>{cell}</td>" for cell in _details(row)]
        mark = ' class="best"' if series == "salience" else ""
        lines.append(f"<tr{mark}>{name_cell(series)}{''.join(cells)}</tr>")
    head = ["policy", *[_budget_head(rows, budget) for budget in budgets]]
    head += [
        "age<br>weight",
        "wheel out<br>of phase",
        "background<br>drift",
        "cache<br>KiB / video",
    ]
    return table([*head, "frames<br>per second"], lines)


def _details(row: Row) -> list[str]:
    age = "" if row["age_weight"] is None else f"{row['age_weight']:g}"
    return [
        age,
        percent(row["position_error"]),
        f"{row['background_drift']:.3f}",
        f"{row['kv_bytes'] / 1024:.0f}",
        f"{row['frames_per_second']:.0f}",
    ]


def _budget_head(rows: Sequence[Row], budget: int) -> str:
    share = next(row["budget_share"] for row in rows if row["budget_tokens"] == budget)
    return f"{budget} tokens<br><small>{percent(share)} of a clip</small>"


FORM_LABELS = {
    "": "plain",
    "int8": "8 bits per channel",
    "int4": "4 bits per channel",
    "low": "evicted tokens in 4 bits, a quarter of the bytes",
    "offload": "a quarter fetched back from the host",
    "pyramid": "more for the first layers",
    "entropy": "layers by entropy and change of attention",
    "prefix": "layers by one share of attention",
    "ispa": "half of the layers local, absorbed (ISPA)",
}
"""What the forms of `launch.cache_forms` are called on the page."""


def form_table(plain: Sequence[Row], formed: Sequence[Row]) -> str:
    """Caches of the same policies in other forms: accuracy per budget, bytes at the largest.

    Args:
        plain: Rows of the policies themselves, of one stage and length.
        formed: Rows with a `form`, of the same.
    """
    budgets = sorted({row["budget_tokens"] for row in formed})
    found = {(r["policy"], r["form"], r["budget_tokens"]): r for r in formed}
    for row in plain:  # the first weights of a policy come first
        found.setdefault((row["policy"], "", row["budget_tokens"]), row)
    lines = []
    for policy in dict.fromkeys(row["policy"] for row in formed):
        forms = dict.fromkeys(["", *(row["form"] for row in formed)])
        for form in forms:
            here = [found.get((policy, form, budget)) for budget in budgets]
            largest = next(row for row in reversed(here) if row is not None)
            cells = "".join(accuracy_cell(row) for row in here)
            error = largest.get("error_to_full")
            cells += f"<td>{'&ndash;' if error is None else f'{error:.3f}'}</td>"
            cells += f"<td>{largest['kv_bytes'] / 1024:.0f}</td>"
            cells += f"<td>{largest.get('host_bytes', 0) / 1024:.0f}</td>"
            cells += f"<td>{largest['frames_per_second']:.0f}</td>"
            first = name_cell(policy) if not form else "<td></td>"
            about = f'<td style="text-align:left">{escape(FORM_LABELS[form])}</td>'
            lines.append(f"<tr>{first}{about}{cells}</tr>")
    head = ["policy", "cache", *[_budget_head(formed, budget) for budget in budgets]]
    head += ["error to<br>full", "KiB / video", "on the<br>host", "frames<br>per second"]
    return table(head, lines)


def stage_table(rows: Sequence[Row], *, stages: Sequence[str], budget: int) -> str:
    """Accuracy of each stage and policy at one budget, one column per length of the rollout."""
    lengths = sorted({row["frames"] for row in rows})
    found = {
        (row["stage"], series_of(row), row["frames"]): row
        for row in rows
        if row["policy"] == "full" or row["budget_tokens"] == budget
    }
    kinds = list(dict.fromkeys(series for _, series, _ in found))
    shared = [s for s in kinds if len({stage for stage, x, _ in found if x == s}) > 1]
    lines = []
    for stage in stages:
        for number, series in enumerate(shared or kinds):
            here = [found.get((stage, series, frames)) for frames in lengths]
            if not any(here):
                continue
            first = f"<td>{escape(stage) if number == 0 else ''}</td>"
            again = next((row for row in reversed(here) if row), None)
            assert again is not None
            repeated = f"<td>{spread(again['previous_revolution_accuracy'])}</td>"
            cells = "".join(accuracy_cell(row) for row in here)
            lines.append(f"<tr>{first}{name_cell(series)}{cells}{repeated}</tr>")
    head = ["stage", "policy", *[f"{frames} frames" for frames in lengths]]
    return table([*head, "repeats its own<br>last revolution"], lines)


def quality_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Few steps against many: accuracy and sharpness, with a whole cache and a forgetful one."""
    lines = [
        f"<tr><td>{escape(row['stage'])}</td>{name_cell(series_of(row))}"
        f"<td>{row['steps']}</td>{accuracy_cell(row)}"
        f"<td>{row['pixel_error']:.4f}</td><td>{_contrast(row['checker_contrast'])}</td>"
        f"<td>{spread(row['crisp_share'])}</td></tr>"
        for row in rows
    ]
    head = ["student", "cache", "steps<br>per block", "right gondola", "pixel error<br>to nearest"]
    head += ["checker contrast<br><small>1 = sharp</small>", "crisp gondola,<br>any, in place"]
    return table(head, lines)


def _contrast(value: float | None) -> str:
    return "&ndash;" if value is None else f"{value:.2f}"


def free_table(rows: Sequence[Row]) -> str:
    """Self-consistency without a prefix: a row per stage, a column per policy."""
    kinds = list(dict.fromkeys(series_of(row) for row in rows))
    found = {(row["stage"], series_of(row)): row["self_consistency"] for row in rows}
    lines = []
    for stage in dict.fromkeys(row["stage"] for row in rows):
        values = (found.get((stage, series)) for series in kinds)
        cells = "".join(f"<td>{spread(value) if value else ''}</td>" for value in values)
        lines.append(f"<tr><td>{escape(stage)}</td>{cells}</tr>")
    return table(["stage", *[escape(style_of(series).label) for series in kinds]], lines)


def head_table(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """A head's agreement with its targets: a row per part, a column per layer.

    Args:
        scores: `spearman` and `recall_at_budget`, each part to a value per layer.
    """
    depth = max(len(values) for parts in scores.values() for values in parts.values())
    titles = {"spearman": "rank correlation", "recall_at_budget": "recall at the budget"}
    lines = []
    for metric, parts in scores.items():
        for part, values in parts.items():
            cells = "".join(_heat(value, f"{value:.2f}") for value in values)
            label = f"{titles.get(metric, metric)}, <b>{escape(part)}</b>"
            lines.append(f"<tr><td>{label}</td>{cells}</tr>")
    return table(["", *[f"layer {number}" for number in range(depth)]], lines)


def baseline_table(ranked_by: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str:
    """A head beside what needs no training, means over layers.

    Args:
        ranked_by: Name of what ranks the tokens, to part, to `spearman` and `recall` per layer.
    """
    metrics = {"spearman": "rank<br>correlation", "recall": "recall"}
    parts = list(next(iter(ranked_by.values())))
    lines = []
    for name, scores in ranked_by.items():
        means = [statistics.fmean(scores[part][metric]) for metric in metrics for part in parts]
        cells = "".join(_heat(mean, f"{mean:.2f}") for mean in means)
        lines.append(f'<tr><td style="text-align:left">{escape(name)}</td>{cells}</tr>')
    head = [f"{title}, <b>{escape(part)}</b>" for title in metrics.values() for part in parts]
    return table(["tokens ranked by", *head], lines)


def _heat(value: float, text: str) -> str:
    return f'<td class="heat" style="--level:{min(max(value, 0), 1):.2f}">{text}</td>'


def claim_table(claims: Sequence[Claim]) -> str:
    """What was asked, what was found, and whether that is enough."""
    lines = [
        f'<tr><td style="text-align:left">{escape(claim.text)}</td><td>{claim.found:.3f}</td>'
        f"<td>{escape(claim.relation)}</td><td>{'yes' if claim.holds else '<b>no</b>'}</td></tr>"
        for claim in claims
    ]
    return table(["claim", "found", "must be", "holds"], lines)


def list_of(items: Sequence[str], *, css: str) -> str:
    """An unordered list of HTML items."""
    return f'<ul class="{css}">' + "".join(f"<li>{item}</li>" for item in items) + "</ul>"
