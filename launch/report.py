"""The report of a run: one HTML file that needs nothing beside it.

It is a pure function of what lies in the run folder: `evaluate/results.json`, the pictures' raw
material beside it, and each stage's `metrics.jsonl`.
"""

import json
import re
from html import escape
from pathlib import Path
from typing import Any

from data.files import write_atomically
from launch import tables
from launch.claims import claims_of
from launch.figures import (
    SERIES,
    Row,
    accuracy_over_budget,
    accuracy_per_revolution,
    loss_curves,
    series_of,
    target_over_frames,
    to_png,
    to_svg,
)
from launch.material import Material, read_material
from launch.method import method_section
from launch.notes import PREDICTORS, beside_baselines, headline, notes
from launch.player import player_data, player_section

TEMPLATE = Path(__file__).with_suffix(".html")


def write_report(run: Path) -> Path:
    """Write `report/index.html` of a run folder, and return its path.

    The chart of accuracy over budget is written beside it as a PNG file, for use elsewhere.

    Raises:
        UserError: If the run has not been evaluated.
    """
    material = read_material(run)
    out = run / "report" / "index.html"
    out.parent.mkdir(parents=True, exist_ok=True)
    results = material.results
    chart = accuracy_over_budget(main_rows(results), chance=results["world"]["chance"])
    write_atomically(out.with_name("accuracy_over_budget.png"), to_png(chart))
    write_atomically(out, build_page(material).encode())
    return out


def build_page(material: Material) -> str:
    """The whole page."""
    sections = (
        _header(material),
        player_section(material),
        method_section(material),
        _comparison(material),
        _stages(material),
        _claims(material),
        _training(material),
        notes(material.results),
        _footer(material),
    )
    light = "".join(f"--c-{key}: {style.light}; " for key, style in SERIES.items())
    dark = "".join(f"--c-{key}: {style.dark}; " for key, style in SERIES.items())
    values = {
        "title": f"{escape(material.results['name'])}: a learned memory for video generation",
        "light": light,
        "dark": dark,
        "body": "\n".join(sections),
        "clips": json.dumps(player_data(material)).replace("</", "<\\/"),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], TEMPLATE.read_text())


def main_rows(results: dict[str, Any], frames: int | None = None) -> list[Row]:
    """Rows of the first stage evaluated, at one length; the shortest if none is given."""
    rows = [row for row in results["policies"] if row["stage"] == results["stages"][0]]
    length = frames or min((row["frames"] for row in rows), default=0)
    return [row for row in rows if row["frames"] == length]


def _header(material: Material) -> str:
    number, sentence = headline(main_rows(material.results))
    world = material.results["world"]
    hidden = world["period"] - world["frames_shown"]
    return f"""<header>
<p class="kicker">PaFu-KV &middot; run &ldquo;{escape(material.results["name"])}&rdquo;</p>
<div class="headline"><p class="number">{number}</p><h1>{sentence}</h1></div>
<p class="lead">A video model that generates block by block remembers only what is in its
<b>KV cache</b>, and the cache has to stay small. This run trains a small network that looks at
each new token and predicts <b>how strongly the future will need it</b>; the cache keeps the tokens
with the highest prediction. The test is a wheel of {world["identities"]} gondolas. Each shows for
{world["frames_shown"]} frames and hides for {hidden}. When it comes back it must look the same, and
only the cache can know how it looked.</p>
</header>"""


def _comparison(material: Material) -> str:
    results = material.results
    rows = main_rows(results)
    chance = results["world"]["chance"]
    budget = max((row["budget_tokens"] for row in rows if row["policy"] != "full"), default=0)
    budgets = to_svg(accuracy_over_budget(rows, chance=chance), name="budget")
    longest = max(row["frames"] for row in results["policies"])
    long_rows = _at_budget(_longest_rows(results, longest), budget)
    turns = to_svg(accuracy_per_revolution(long_rows, chance=chance), name="turns")
    seeds = len(rows[0]["rollout_seeds"])
    return f"""<section>
<h2>At the same size, what a cache keeps decides</h2>
<p>Share of generated frames that show the right gondola; guessing gives {tables.percent(chance)}.
Bars and &plusmn; are one standard deviation over {seeds} sets of held-out clips.</p>
<div class="pair"><figure class="card"><h3>Accuracy over budget</h3>{budgets}
<figcaption>{rows[0]["frames"]} frames, {results["world"]["prefix_frames"]} of them given.
The dashed line keeps everything.</figcaption></figure>
<figure class="card"><h3>Accuracy per revolution</h3>{turns}
<figcaption>{longest} frames, {budget} tokens, stage &ldquo;{escape(long_rows[0]["stage"])}&rdquo;.
</figcaption></figure></div>
<div class="card" style="margin-top:20px"><h3>All policies</h3>{tables.policy_table(rows)}
<p class="note" style="margin-top:12px">Accuracy in per cent. The other columns are at the largest
budget. The age weight of every scored policy was chosen from the same grid on clips of its own;
the untrained and the inverted head take that of the trained one.</p>
</div>{_forms(results)}</section>"""


def _forms(results: dict[str, Any]) -> str:
    """Other ways to spend the bytes, where the evaluation tried any."""
    if not results.get("forms"):
        return ""
    return f"""<div class="card" style="margin-top:20px"><h3>The same budget, otherwise stored</h3>
{tables.form_table(main_rows(results), results["forms"])}
<p class="note" style="margin-top:12px">All but 8 and 4 bits take as many bytes on the device as the
plain cache. The network computes in 32 bits here, so that 4 bits hold more than six times as many
tokens; of 16 bits it would be more than three times. Error to full: mean square of the difference
between the latents and those of a cache that keeps everything, same noise.</p></div>"""


def _longest_rows(results: dict[str, Any], frames: int) -> list[Row]:
    """Rows of the last stage that was rolled out this far."""
    rows = [row for row in results["policies"] if row["frames"] == frames]
    stages = [stage for stage in results["stages"] if any(r["stage"] == stage for r in rows)]
    return [row for row in rows if row["stage"] == stages[-1]]


def _at_budget(rows: list[Row], budget: int) -> list[Row]:
    """One row per series: those at `budget`, or nearest to it, and the unbounded."""
    chosen: dict[str, Row] = {}
    for row in rows:
        series = series_of(row)
        other = chosen.get(series)
        if other is None or abs(row["budget_tokens"] - budget) < abs(
            other["budget_tokens"] - budget
        ):
            chosen[series] = row
    return list(chosen.values())


def _stages(material: Material) -> str:
    results = material.results
    rows = main_rows(results)
    budget = max((row["budget_tokens"] for row in rows if row["policy"] != "full"), default=0)
    cards = ""
    if len(results["stages"]) > 1 or len({row["frames"] for row in results["policies"]}) > 1:
        body = tables.stage_table(results["policies"], stages=results["stages"], budget=budget)
        cards += f"""<div class="card"><h3>From stage to stage, and beyond the trained length</h3>
{body}<p class="note" style="margin-top:12px">Budget {budget} tokens. The last column asks, on the
longest rollout, only that the video repeats itself, right or wrong.</p></div>"""
    if results.get("prefix_free"):
        cards += f"""<div class="card" style="margin-top:20px"><h3>Without true frames</h3>
{tables.free_table(results["prefix_free"])}<p class="note" style="margin-top:12px">From the caption
alone nobody prescribes the gondolas; the video should still repeat its own, place included, after
one revolution. Rollouts of {results["prefix_free"][0]["frames"]} frames.</p></div>"""
    if results.get("quality"):
        cards += f"""<div class="card" style="margin-top:20px"><h3>Fewer steps</h3>
{tables.quality_table(results["quality"])}</div>"""
    return f"<section><h2>What each training stage adds</h2>{cards}</section>" if cards else ""


def _claims(material: Material) -> str:
    claims = claims_of(material.results)
    held = sum(claim.holds for claim in claims)
    return f"""<section><h2>What was asked of this run</h2>
<p>{held} of {len(claims)} claims hold. The bounds are fixed in launch/claims.py; accuracies are
fractions.</p>
<div class="card">{tables.claim_table(claims)}</div></section>"""


def _training(material: Material) -> str:
    head = material.results.get("head") or {}
    cards = ""
    for stage in head.get("spearman", {}):
        scores = {name: head[name][stage] for name in ("spearman", "recall_at_budget")}
        svg = to_svg(target_over_frames(head["target_by_frame"][stage]), name=f"target-{stage}")
        cards += f"""<figure class="card"><h3>The head of &ldquo;{escape(stage)}&rdquo;</h3>
{tables.head_table(scores)}{_baselines(head, stage)}{svg}
<figcaption>Mean of what it learns, in standard deviations: what depends on when a frame came.
</figcaption></figure>"""
    curves = ""
    for stage, rows in material.metrics.items():
        chart = loss_curves(rows)
        if chart is not None:
            svg = to_svg(chart, name=f"loss-{stage}")
            curves += f'<figure class="card"><h3>{escape(stage)}</h3>{svg}</figure>'
    share = tables.percent(head["budget_share"]) if "budget_share" in head else ""
    about = (
        f"""<p>How well the head ranks tokens as the teacher does, on held-out clips; recall is the
share of the truly most salient {share} that it also puts there. A better rank correlation need
not mean a better rollout, so rollouts decide.</p><div class="pair">{cards}</div>"""
        if cards
        else ""
    )
    if not about and not curves:
        return ""
    return f"""<section><h2>The head, and the losses</h2>{about}
<div class="losses" style="margin-top:20px">{curves}</div></section>"""


def _baselines(head: dict[str, Any], stage: str) -> str:
    """A head beside what needs no training; empty where an older evaluation did not compare."""
    if "baselines" not in head:
        return ""
    baselines = head["baselines"][stage]
    own = {
        part: {"spearman": values, "recall": head["recall_at_budget"][stage][part]}
        for part, values in head["spearman"][stage].items()
    }
    named = {"the head": own} | {PREDICTORS[name]: baselines[name] for name in baselines}
    return f"""<h4>Beside what needs no training</h4>{tables.baseline_table(named)}
<p class="note" style="margin-top:12px">Means over layers. {beside_baselines(own, baselines)}</p>"""


def _footer(material: Material) -> str:
    seeds = sorted({row["train_seed"] for row in material.results["policies"]})
    listed = ", ".join(str(seed) for seed in seeds)
    return (
        f"<footer>Training seed {listed}. All numbers on this page come from "
        "evaluate/results.json of this run; method: arXiv:2601.21896.</footer>"
    )
