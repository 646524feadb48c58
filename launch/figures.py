"""Charts of a run, drawn from `results.json` and `metrics.jsonl` rows only."""

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

Row = Mapping[str, Any]
"""One entry of `policies` in results.json."""

LOSS = "loss/"
"""Begins the name of every loss in metrics.jsonl."""
INK, FAINT = "#3d4451", "#c9ccd3"


@dataclass(frozen=True)
class Series:
    """How one line of the comparison is called and drawn, in charts and on the page."""

    label: str
    light: str
    """Colour on white."""
    dark: str
    """Colour on black."""
    marker: str = "o"
    line: str = "-"


SERIES = {
    "truth": Series("the truth", "#6b7280", "#9aa3b2"),
    "full": Series("keep everything", "#2f3640", "#d5dae3", "s", "--"),
    "salience": Series("learned salience", "#0072b2", "#56b4e9", "o"),
    "salience_all": Series("learned salience, all parts", "#3a9bdc", "#8fd0f5", "D"),
    "position_prior": Series("mean salience of the place", "#6a51a3", "#b3a2e6", "P", "-."),
    "salience_redundancy": Series("learned salience less copies", "#1f5f8b", "#7cc4f0", "p", ":"),
    "oracle": Series("the teacher's own salience", "#4d2c91", "#a58ae8", "*", "--"),
    "attention_mass": Series("attention received so far", "#008563", "#2fc49c", "^"),
    "participative": Series("deep sink + recent queries", "#0b7a75", "#3fbdb6", ">", "-."),
    "future_query": Series("expected queries", "#5f8a00", "#a3cf3f", "h"),
    "key_merge": Series("merge near copies", "#a4452c", "#e88a6f", "H"),
    "compressed_mid": Series("pool the middle", "#7a5c2e", "#c9a56b", "8", "-."),
    "prompt_similarity": Series("what the prompt speaks of", "#9c3587", "#dd84cb", "3", ":"),
    "norm": Series("large values, small keys", "#6b7a00", "#b9c94a", "4", "-."),
    "random": Series("random, drawn anew", "#b85c92", "#e39ac4", "v"),
    "random_once": Series("random, drawn once", "#8c3d6c", "#d67fb2", "<", ":"),
    "sink_window": Series("first + newest frames", "#d55e00", "#ff944d", "X"),
    "fifo": Series("newest frames", "#b58900", "#e6b93d", "d", "-."),
    "untrained_head": Series("untrained head", "#868e99", "#8d97a5", "1", ":"),
    "inverted_head": Series("inverted head", "#a3aab5", "#767f8c", "2", ":"),
}
"""Known comparisons; the colours stay apart for colour-blind readers, markers tell the rest."""


def series_of(row: Row) -> str:
    """Key of a row in `SERIES`; a policy that is not there keeps its own name."""
    weights = row.get("weights")
    if row["policy"] == "salience" and weights and len(set(weights)) == 1:
        return "salience_all"
    return str(row["policy"])


def best(rows: Sequence[Row], wanted: Callable[[Row], bool]) -> Row | None:
    """The row of highest identity accuracy among those wanted."""
    chosen = [row for row in rows if wanted(row)]
    return max(chosen, key=lambda row: row["identity_accuracy"]["mean"], default=None)


def style_of(series: str) -> Series:
    """How to draw a series; grey for one that has no style of its own."""
    return SERIES.get(series, Series(series.replace("_", " "), "#777777", "#aaaaaa", ".", "-"))


def accuracy_over_budget(rows: Sequence[Row], *, chance: float) -> Figure:
    """Identity accuracy against budget, one line per policy, bars of one standard deviation.

    Args:
        rows: Of one stage and one length.
        chance: Accuracy of guessing.
    """
    bounded = [row for row in rows if row["policy"] != "full"]
    figure, axes = _axes(4.7, _height(rows))
    budgets = sorted({row["budget_tokens"] for row in bounded})
    ends: list[tuple[float, str]] = []
    for series in _order(bounded):
        points = sorted(
            (
                row["budget_tokens"],
                row["identity_accuracy"]["mean"],
                row["identity_accuracy"]["std"],
            )
            for row in bounded
            if series_of(row) == series
        )
        _line(axes, series, *zip(*points, strict=True))
        ends.append((points[-1][1], series))
    for row in rows:
        if row["policy"] == "full":
            _line_across(axes, "full", row["identity_accuracy"]["mean"])
            ends.append((row["identity_accuracy"]["mean"], "full"))
    _chance(axes, chance)
    low, high = (budgets[0], budgets[-1]) if budgets else (0, 1)
    room = max(high - low, 0.2 * high)
    axes.set_xlim(low - 0.08 * room, high + 1.1 * room)
    axes.set_xticks(budgets, [_budget_label(bounded, budget) for budget in budgets])
    _label_ends(axes, ends, high + 0.06 * room)
    axes.set_xlabel("tokens kept per layer (share of a training clip)", loc="left")
    return figure


def accuracy_per_revolution(rows: Sequence[Row], *, chance: float) -> Figure:
    """Identity accuracy in each revolution after the last true frame, one line per policy.

    Args:
        rows: Of one stage and one length, one per policy.
        chance: Accuracy of guessing.
    """
    figure, axes = _axes(4.7, _height(rows))
    ends: list[tuple[float, str]] = []
    longest = 1
    for series in _order(rows):
        for row in rows:
            if series_of(row) == series:
                values = row["accuracy_per_revolution"]
                numbers = list(range(1, len(values) + 1))
                _line(axes, series, numbers, values, None)
                ends.append((values[-1], series))
                longest = max(longest, len(values))
    _chance(axes, chance)
    axes.set_xlim(0.8, 1 + (longest - 1 + 0.3) * 1.75)
    step = math.ceil(longest / 8)
    axes.set_xticks(range(1, longest + 1, step))
    _label_ends(axes, ends, longest + 0.04 * max(longest, 4))
    axes.set_xlabel("revolution of the wheel after the last true frame", loc="left")
    return figure


def kept_over_time(
    kept: Mapping[str, NDArray[Any]], *, period: int, frames_per_block: int, max_age: int
) -> Figure:
    """Heat maps of what each cache holds: how old it is against the time of the video.

    Args:
        kept: Series to the share of each frame's tokens that are held after each block.  [T, F]
        period: Frames of one revolution, marked on the axis of age.
        frames_per_block: Frames that each of the T blocks adds.
        max_age: Oldest age in frames that is shown.
    """
    columns = 2
    lines = math.ceil(len(kept) / columns)
    figure = Figure(figsize=(5.6, 1.8 * lines + 0.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, (series, share) in zip(grid, kept.items(), strict=False):
        by_age = shares_by_age(share, frames_per_block, max_age)
        extent = (0, share.shape[0] * frames_per_block, 0, max_age)
        axes.imshow(by_age, cmap="cividis", vmin=0, vmax=1, origin="lower", aspect="auto",
                    extent=extent, interpolation="nearest")  # fmt: skip
        axes.axhline(period, color="#ffffff", linewidth=1.1, linestyle=(0, (4, 3)))
        axes.set_title(style_of(series).label, loc="left", fontsize=9.5, color=INK)
        axes.tick_params(length=0, labelsize=8.5, labelcolor=INK)
        axes.set_yticks(range(0, max_age + 1, period))
        for spine in axes.spines.values():
            spine.set_visible(False)
    for axes in grid[len(kept) :]:
        axes.set_visible(False)
    figure.supxlabel("frame of the video", fontsize=9.5, color=INK)
    figure.supylabel("age of what is kept (frames)", fontsize=9.5, color=INK)
    return figure


def shares_by_age(share: NDArray[Any], frames_per_block: int, max_age: int) -> NDArray[Any]:
    """From [T, frame] to [age, T]; NaN before the video began."""
    num_blocks, num_frames = share.shape
    result = np.full((max_age, num_blocks), np.nan)
    for block in range(num_blocks):
        newest = min((block + 1) * frames_per_block, num_frames) - 1
        count = min(max_age, newest + 1)
        result[:count, block] = share[block, newest - np.arange(count)]
    return result


def loss_curves(rows: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Every loss of one stage over its steps; None if it logged none."""
    names = sorted({key for row in rows for key in row if key.startswith(LOSS)})
    if not names:
        return None
    figure, axes = _axes(3.0, 1.9)
    palette = ["salience", "sink_window", "attention_mass", "random"]
    for number, name in enumerate(names):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        style = style_of(palette[number % len(palette)])
        axes.plot(
            *zip(*points, strict=True), color=style.light, linewidth=1.4, label=name[len(LOSS) :]
        )
    axes.set_xlabel("step", loc="left")
    axes.set_ylim(bottom=0)
    if len(names) > 1:
        axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=2, handlelength=1.2)
    else:
        axes.set_title(f"loss of the {names[0][len(LOSS) :]}", loc="left", fontsize=8.5, color=INK)
    return figure


def target_over_frames(parts: Mapping[str, Sequence[float | None]]) -> Figure:
    """Mean standardised target of each part over the frame index; gaps where there is none."""
    figure, axes = _axes(3.0, 1.9)
    for (part, means), name in zip(
        parts.items(), ("salience", "sink_window", "attention_mass"), strict=True
    ):
        values = np.array(means, dtype=np.float64)  # None becomes NaN
        axes.plot(values, color=style_of(name).light, linewidth=1.4, label=part)
    axes.axhline(0, color=FAINT, linewidth=0.8)
    axes.set_xlabel("frame of the clip", loc="left")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK, ncols=3, handlelength=1.2,
                loc="lower left", bbox_to_anchor=(0, 1))  # fmt: skip
    return figure


def to_svg(figure: Figure, *, name: str) -> str:
    """The chart as an SVG element whose colours are CSS variables, to be put into a page.

    Series become `var(--c-NAME)`, text and axes `var(--ink)` and `var(--faint)`.

    Args:
        figure: From this file.
        name: Unique on the page, makes the ids inside unique.
    """
    buffer = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
    for series, style in SERIES.items():
        text = text.replace(style.light, f"var(--c-{series})")
    text = text.replace(INK, "var(--ink)").replace(FAINT, "var(--faint)")
    # Ids such as "axes_1" do not carry the salt.
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    return re.sub(r"font: ([^;']*)'[^;]*", r"font: \1var(--sans)", text)


def to_png(figure: Figure) -> bytes:
    """The chart as a PNG file on white."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(FAINT)
    axes.grid(axis="y", color=FAINT, linewidth=0.6)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    axes.xaxis.label.set_color(INK)
    axes.xaxis.label.set_fontsize(9.5)
    return figure, axes


def _height(rows: Sequence[Row]) -> float:
    """Inches of a chart in which every line has a name at its end, a fifth of an inch each."""
    return max(3.6, 0.9 + 0.2 * len(_order(rows)))


def _line(
    axes: Axes, series: str, x: Sequence[float], y: Sequence[float], spread: Sequence[float] | None
) -> None:
    style = style_of(series)
    strong = series in ("salience", "full")
    width, size = (2.4, 6.0) if strong else (1.3, 4.5)
    axes.errorbar(x, y, yerr=spread, color=style.light, marker=style.marker, markersize=size,
                  linestyle=style.line, linewidth=width, capsize=3, zorder=3 + strong)  # fmt: skip


def _line_across(axes: Axes, series: str, y: float) -> None:
    style = style_of(series)
    axes.axhline(y, xmax=0.5, color=style.light, linestyle=style.line, linewidth=1.6)


def _chance(axes: Axes, chance: float) -> None:
    axes.axhline(chance, xmax=0.5, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
    axes.annotate("guessing", (0, chance), xycoords=("axes fraction", "data"), xytext=(2, -3),
                  textcoords="offset points", va="top", fontsize=8, color=INK)  # fmt: skip
    axes.set_ylim(-0.04, 1.04)
    axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str]], x: float) -> None:
    """Names beside the last points, pushed apart where they would overlap."""
    gap, floor = min(0.078, 1.04 / max(1, len(ends) - 1)), -0.02
    ordered = sorted(ends)
    heights: list[float] = []
    for value, _ in ordered:
        heights.append(max(value, heights[-1] + gap if heights else floor))
    ceiling = 1.02
    for index in range(len(heights) - 1, -1, -1):
        heights[index] = min(heights[index], ceiling)
        ceiling = heights[index] - gap
    for (_, series), height in zip(ordered, heights, strict=True):
        style = style_of(series)
        axes.text(x, height, style.label, color=style.light, fontsize=8.5, va="center",
                  fontweight="bold" if series == "salience" else "normal")  # fmt: skip


def _budget_label(rows: Sequence[Row], budget: int) -> str:
    share = next(row["budget_share"] for row in rows if row["budget_tokens"] == budget)
    return f"{budget}\n{100 * share:.0f} %"


def _order(rows: Sequence[Row]) -> list[str]:
    """Series in `rows`, known ones in the order of `SERIES`, then the others by name."""
    found = {series_of(row) for row in rows}
    known = [series for series in SERIES if series in found]
    return known + sorted(found - set(known))
