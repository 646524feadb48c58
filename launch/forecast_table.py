"""The forecast of a run as text and as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from configs.errors import UserError
from configs.schema import RunConfig
from launch.forecast_sizes import clip_count, data_bytes
from train.hardware import MEMORY_GB

if TYPE_CHECKING:
    from launch.forecast import StageForecast
    from launch.forecast_knobs import Cluster, Knob

GIB = 2**30
EXACT = ("parameters", "masters", "moments", "averages", "gradients", "frozen", "KV cache")
"""Parts that are no estimate."""
COLORS = {
    "parameters": "#1f4e79",
    "masters": "#2e75b6",
    "moments": "#5b9bd5",
    "averages": "#9dc3e6",
    "gradients": "#7030a0",
    "frozen": "#7f7f7f",
    "buffers": "#bfbfbf",
    "KV cache": "#c55a11",
    "rotated keys": "#f4b183",
    "activations": "#548235",
    "workspace": "#a9d18e",
    "waiting": "#b889db",
    "targets": "#ffd966",
}
FORMATS = (".png", ".pdf", ".svg")


def size(count: float) -> str:
    """Bytes in a unit that leaves a short number."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def table(config: RunConfig, cluster: "Cluster", stages: Sequence["StageForecast"]) -> str:
    """All of it for a terminal."""
    trainer = config.trainer
    strategy = f"ZeRO-{trainer.zero_stage}" if trainer.strategy == "deepspeed" else trainer.strategy
    lines = [
        f"{config.name} on {cluster.nodes} x {cluster.gpus_per_node} {cluster.gpu} "
        f"({MEMORY_GB[cluster.gpu]} GB each, {size(cluster.usable_bytes)} for tensors), "
        f"{strategy}, {trainer.precision}, activation checkpointing "
        f"{'on' if trainer.activation_checkpointing else 'off'}",
        "bytes of one rank at the fullest moment of a step; ~ marks an estimate",
        "",
    ]
    for stage in stages:
        lines += [*_stage(stage, cluster), ""]
    lines += _summary(config, stages)
    return "\n".join(lines)


def _stage(stage: "StageForecast", cluster: "Cluster") -> list[str]:
    verdict = "fits" if stage.fits else "DOES NOT FIT"
    lines = [
        f"{stage.name} ({stage.kind}): {size(stage.device_bytes)} of "
        f"{size(stage.usable_bytes)}, {verdict}; fullest at: {stage.moment}"
    ]
    lines += [
        f"  {role}: {path} is not there; counted as the run's own model"
        for role, path in stage.missing.items()
    ]
    counts = ", ".join(f"{name} {count:,}" for name, count in stage.networks.items())
    lines.append(f"  networks           {counts} parameters, adapters among them")
    for part, count in stage.device.items():
        if count:
            mark = " " if part in EXACT else "~"
            lines.append(f"  {part:<18}{mark}{size(count):>10}")
    own = stage.device["activations"] + stage.device["workspace"] if stage.device else 0
    if stage.other_activations not in (0, own):
        lines.append(
            f"    activation checkpointing the other way: ~{size(stage.other_activations)} of "
            f"activations and workspace in place of ~{size(own)}"
        )
    lines += [
        f"  at the start      ~{size(stage.start_bytes):>10}, when networks are put there whole, "
        "one by one, and shared out",
        f"  host               {_host(stage, cluster)}",
        f"  host of rank 0     {_parts(stage.host_end)} when the stage is exported",
        f"  disk, all ranks    {_parts(stage.disk)}",
        f"  sent to others     ~{size(stage.sent_bytes)} per step",
        f"  time (prediction)  ~{stage.step_seconds:.1f} s per step = "
        f"{stage.executed / 1e12:.0f} TFLOP at {cluster.efficiency:.0%} of the peak; "
        f"~{stage.hours:.1f} h for the stage, communication not counted",
    ]
    return lines + [_knob(knob) for knob in stage.knobs]


def _host(stage: "StageForecast", cluster: "Cluster") -> str:
    parts = stage.host_start | stage.host
    node = size(cluster.gpus_per_node * sum(parts.values()))
    cached = f"{size(stage.mapped_bytes)} of inputs in its page cache, shared by its ranks"
    return f"{_parts(parts)}; {node} per node" + (f", and {cached}" if stage.mapped_bytes else "")


def _knob(knob: "Knob") -> str:
    verdict = "fits" if knob.fits else "not enough"
    return f"  turn {knob.setting}: {size(knob.device_bytes)}, {verdict}"


def _parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {size(count)}" for name, count in parts.items() if count) or "nothing"


def _summary(config: RunConfig, stages: Sequence["StageForecast"]) -> list[str]:
    per_clip = data_bytes(config)
    count = clip_count(config)
    is_guided = any(stage.is_guided for stage in config.stages.values())
    once = {"text.negative": per_clip["text"]} if is_guided else {}
    total = count * sum(per_clip.values()) + sum(once.values())
    short = [stage.name for stage in stages if not stage.fits]
    verdict = f"too large: {', '.join(short)}" if short else "every stage fits"
    return [
        f"shards: {_parts(per_clip)} per clip at most; {size(total)} for {count} clips"
        + (f", {_parts(once)} among them" if once else ""),
        f"in all: ~{sum(stage.hours for stage in stages):.1f} h; {verdict}",
    ]


def draw(
    config: RunConfig, cluster: "Cluster", stages: Sequence["StageForecast"], suffix: str
) -> bytes:
    """Stacked bars of each stage's memory against what the GPU has.

    Raises:
        UserError: If the suffix is of no kind of picture.
    """
    if suffix not in FORMATS:
        raise UserError(f"--figure must end in one of {list(FORMATS)}, found {suffix!r}; rename it")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.6 + 0.5 * len(stages)), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(stages))
    start = [0.0] * len(stages)
    for part in [part for part in COLORS if any(stage.device.get(part) for stage in stages)]:
        widths = [stage.device.get(part, 0) / GIB for stage in stages]
        axes.barh(places, widths, left=start, color=COLORS[part], label=part, height=0.6)
        start = [left + width for left, width in zip(start, widths, strict=True)]
    limit = cluster.usable_bytes / GIB
    axes.axvline(limit, color="#c00000", linewidth=1.5)
    axes.annotate(
        f"{cluster.gpu}: {limit:.0f} GiB",
        (limit, 1.02),
        xycoords=("data", "axes fraction"),
        color="#c00000",
        ha="center",
    )
    for place, end in zip(places, start, strict=True):
        axes.annotate(f" {end:.0f}", (end, place), va="center")
    axes.set_yticks(places, [stage.name for stage in stages])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.08 * max(limit, *start))
    axes.set_xlabel("GiB on each GPU at the fullest moment of a step")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize="small")
    ranks = f"{cluster.nodes} x {cluster.gpus_per_node}"
    axes.set_title(f"{config.name} on {ranks} {cluster.gpu}", loc="left", pad=18)
    content = io.BytesIO()
    figure.savefig(content, format=suffix[1:], dpi=110)
    return content.getvalue()
