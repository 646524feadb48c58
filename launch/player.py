"""The part of the report in which the videos of all policies play in step."""

from html import escape
from typing import Any

from launch.figures import style_of
from launch.material import Material, data_uri

PANEL_SIZE = (336, 168)
"""Pixels in which a video panel is drawn on the page."""


def player_section(material: Material) -> str:
    """Synchronised videos of the policies, with marks where the identity is right or wrong."""
    if not material.clips:
        return ""
    clips = material.clips
    lanes = []
    for index, panel in enumerate(clips["clips"][0]["panels"]):
        style = style_of(panel["series"])
        about = escape(panel.get("about", ""))
        label = f"{style.label[0].upper()}{style.label[1:]}"
        lanes.append(
            f'<div class="lane" data-panel="{index}"><div class="name">'
            f'<i style="background:var(--c-{panel["series"]}, #888)"></i>{escape(label)}'
            f"<span>{about}</span></div>"
            f'<canvas width="{PANEL_SIZE[0]}" height="{PANEL_SIZE[1]}"></canvas>'
            f"{_strip(clips)}"
            '<div class="score"></div></div>'
        )
    files = "".join(
        f'<video controls muted playsinline src="{data_uri("video/mp4", video)}"></video>'
        for video in material.videos
    )
    return f"""<section>
<h2>Watch what each cache forgets</h2>
<p>The same clip, continued from {clips["prefix_frames"]} true frames by the same network with
different caches. All bounded caches hold {clips["budget_tokens"]} tokens per layer. The outline
marks the gondola that should return: solid when it looks right, dashed when it does not.</p>
<div class="card player">{_time_axis(clips)}{"".join(lanes)}{_controls(clips)}
<div class="legend"><span><i style="height:16px;background:var(--right)"></i>right gondola</span>
<span><i style="height:7px;background:var(--wrong)"></i>wrong gondola</span>
<span><i style="height:3px;background:var(--given)"></i>true frame, given</span>
<span>number on the right: share of frames right so far</span></div>
<div class="plain">{files}</div></div>
</section>"""


def _strip(clips: dict[str, Any]) -> str:
    given = f"M0 8.6h{clips['prefix_frames']}V10H0z"
    return (
        f'<div class="strip"><svg viewBox="0 0 {clips["frames"]} 10" preserveAspectRatio="none" '
        f'aria-hidden="true"><path d="{given}" fill="var(--given)"/>'
        '<path class="right" fill="var(--right)"/><path class="wrong" fill="var(--wrong)"/></svg>'
        '<div class="head"></div></div>'
    )


def _time_axis(clips: dict[str, Any]) -> str:
    marks = [(0, f"{clips['prefix_frames']} given", "")]
    starts = range(clips["prefix_frames"], clips["frames"], clips["period"])
    for number, start in enumerate(starts, start=1):
        css = "minor" if number > 1 else ""
        marks.append((start, "revolution 1" if number == 1 else f"{number}", css))
    ends = [mark[0] for mark in marks[1:]] + [clips["frames"]]
    spans = "".join(
        f'<span class="{css}" style="left:{100 * start / clips["frames"]:.3f}%;'
        f'max-width:{100 * (end - start) / clips["frames"]:.3f}%">{text}</span>'
        for (start, text, css), end in zip(marks, ends, strict=True)
    )
    return f'<div class="lane axis"><div></div><div></div><div class="ticks">{spans}</div></div>'


def _controls(clips: dict[str, Any]) -> str:
    buttons = "".join(
        f'<button data-clip="{number}" aria-pressed="false">Clip {number + 1}</button>'
        for number in range(len(clips["clips"]))
    )
    return f"""<div class="controls"><button class="play">Play</button>
<input type="range" min="0" max="{clips["frames"] - 1}" value="0" aria-label="frame">
<output></output>
<select aria-label="speed"><option value="0.5">half speed</option>
<option value="1" selected>normal speed</option><option value="2">double speed</option></select>
{buttons if len(clips["clips"]) > 1 else ""}</div>"""


def player_data(material: Material) -> dict[str, Any]:
    """What the page's script needs to know of the videos."""
    if not material.clips:
        return {}
    clips = material.clips
    return {
        "fps": clips["fps"],
        "frames": clips["frames"],
        "prefix": clips["prefix_frames"],
        "rows": clips["grid"][0],
        "columns": clips["grid"][1],
        "start": min(clips["frames"] - 1, clips["prefix_frames"] + 2 * clips["period"]),
        "clips": [
            {"lit": clip["lit"], "panels": [{"correct": p["correct"]} for p in clip["panels"]]}
            for clip in clips["clips"]
        ],
    }
