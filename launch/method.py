"""The part of the report that explains the method in three pictures."""

from html import escape
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.overlay import heat_overlay
from launch.figures import kept_over_time, style_of, to_svg
from launch.material import Material, data_uri
from launch.pictures import GAP, frame_lines, memory_opacity, png

NUMBERS = {1: "one picture", 2: "two pictures", 3: "three pictures"}


def method_section(material: Material) -> str:
    """The world, the salience, and what is kept: three pictures with a paragraph each."""
    if not material.pictures:
        return ""
    steps = [_world_picture(material)]
    if "target" in material.pictures:
        steps.append(_salience_picture(material))
    if material.kept:
        steps.append(_memory_picture(material))
    cards = "".join(
        f'<div class="step"><div class="about"><div class="count">{number}</div>'
        f"<div>{text}</div></div>"
        f"<figure>{picture}</figure></div>"
        for number, (text, picture) in enumerate(steps, start=1)
    )
    title = f"<h2>How it works, in {NUMBERS[len(steps)]}</h2>"
    return f'<section>{title}<div class="card">{cards}</div></section>'


def _image(pixels: NDArray[Any], alt: str) -> str:
    return f'<img alt="{escape(alt)}" src="{data_uri("image/png", png(pixels))}">'


def _world_picture(material: Material) -> tuple[str, str]:
    world = material.results["world"]
    period = world["period"]
    frames = material.pictures["frames"][: 2 * period]
    text = f"""<h3>The world makes memory necessary</h3>
<p>One revolution per line. The gondola in the opening returns after {period} frames, so each
column shows the same one twice. Birds in the sky look alike but never come back. Walls never
change.</p>"""
    first = 4 + int(material.pictures["phase"][0]) % world["frames_shown"]
    unit = 100 / (period * (frames.shape[2] // 2 + GAP) - GAP) * (frames.shape[2] // 2 + GAP)
    picture = f"""<div class="wide"><div><div class="boxed">
{_image(frame_lines(frames, per_line=period), "two revolutions of the wheel, one above the other")}
<i style="left:{first * unit:.2f}%;width:{world["frames_shown"] * unit:.2f}%"></i></div>
<div class="ruler"><span style="left:0;right:0">{period} frames = one revolution</span></div>
</div></div>
<figcaption>Outlined: one gondola, shown for {world["frames_shown"]} frames and again one revolution
later.</figcaption>"""
    return text, picture


def _salience_picture(material: Material) -> tuple[str, str]:
    pictures = material.pictures
    frames = pictures["salience_frames"]
    count = len(frames)
    text = """<h3>A teacher that sees the future names what matters</h3>
<p>In the attention of the bidirectional teacher one can read how strongly later frames look back at
each token. A small head learns to predict that from the present alone.</p>"""
    rows = [
        ("frames of a clip no network was trained on", frames),
        ("read off the teacher: how strongly the future looks back",
         heat_overlay(frames, pictures["target"])),
        ("predicted by the head when the frame is written",
         heat_overlay(frames, pictures["predicted"])),
    ]  # fmt: skip
    picture = "".join(
        f'<div class="row-label">{label}</div>{_image(frame_lines(rgb, per_line=count), label)}'
        for label, rgb in rows
    )
    layer = int(pictures["layer"][0])
    return text, (
        f'<div class="wide"><div>{picture}</div></div><figcaption>Layer {layer}. Bright = the '
        "future will need it, dark = it will not.</figcaption>"
    )


def _memory_picture(material: Material) -> tuple[str, str]:
    world = material.results["world"]
    period, per_block = world["period"], world["frames_per_block"]
    shown = [s for s in ("salience", "sink_window", "random") if s in material.kept]
    now = _moment(material, period, per_block)
    rows = ""
    for series in shown:
        held = material.kept[series][now // per_block - 1] / 255.0  # [F, rows, columns]
        span = slice(max(0, now - 2 * period), now)
        opacity = memory_opacity(held[span])
        lines = frame_lines(material.generated[series][span], per_line=period, opacity=opacity)
        label = escape(style_of(series).label)
        rows += f'<div class="row-label">{label}</div>{_image(lines, f"memory of: {label}")}'
    text = f"""<h3>The cache keeps what the head expects to be needed</h3>
<p>What is left of the last {2 * period} frames at frame {now}. Faded tokens are gone from most
layers. The dashed line below lies one revolution back: a cache that holds nothing there cannot know
which gondola comes next.</p>"""
    svg = _ages_chart(material, [*shown, "full"], period, per_block)
    caption = "Below: share of each frame that is kept, by age; dark = nothing, yellow = all of it."
    return text, (
        f'<div class="wide"><div>{rows}</div></div>'
        f'<div class="chart">{svg}</div><figcaption>{caption}</figcaption>'
    )


def _ages_chart(material: Material, wanted: list[str], period: int, per_block: int) -> str:
    share = {
        series: material.kept[series].astype(np.float64).mean(axis=(2, 3)) / 255
        for series in wanted
        if series in material.kept
    }
    if not share:
        return ""
    max_age = min(3 * period, *(len(blocks) * per_block for blocks in share.values()))
    chart = kept_over_time(share, period=period, frames_per_block=per_block, max_age=max_age)
    return to_svg(chart, name="kept")


def _moment(material: Material, period: int, per_block: int) -> int:
    """End of a block, four revolutions into the clip if it is that long."""
    frames = min(len(video) for video in material.generated.values())
    return min(frames, 4 * period) // per_block * per_block
