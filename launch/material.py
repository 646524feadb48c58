"""What a report is made of, as it lies in the run folder."""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from safetensors.numpy import load_file

from configs.errors import UserError

FRAMES = "frames."
"""In kept.safetensors, what names of videos begin with."""


@dataclass(frozen=True)
class Material:
    """Everything a report is made of.

    Attributes:
        results: results.json.
        metrics: Rows of metrics.jsonl of each stage, in the order of the plan.
        clips: videos/clips.json, which describes the videos; empty if there are none.
        videos: The mp4 files that it names, in its order.
        kept: Share of layers, 255 = all, that hold each token after each block, per series, of one
            clip.  uint8 [T, F, rows, columns]
        generated: That clip as each series generated it.  uint8 [F, H, W, 3]
        pictures: `frames` of that clip [F, H, W, 3], and of another clip `salience_frames` with
            `predicted` and `target` salience [F, rows, columns].
    """

    results: dict[str, Any]
    metrics: dict[str, list[dict[str, Any]]]
    clips: dict[str, Any]
    videos: list[bytes]
    kept: dict[str, NDArray[Any]]
    generated: dict[str, NDArray[Any]]
    pictures: dict[str, NDArray[Any]]


def read_material(run: Path) -> Material:
    """Read what a report needs.

    Raises:
        UserError: If there are no results.
    """
    folder = run / "evaluate"
    if not (folder / "results.json").is_file():
        raise UserError(
            f"a report needs {str(folder / 'results.json')!r}, found no such file; "
            "evaluate the run first"
        )
    results = json.loads((folder / "results.json").read_text())
    clips: dict[str, Any] = {}
    if (folder / "videos" / "clips.json").is_file():
        clips = json.loads((folder / "videos" / "clips.json").read_text())
    names = [*results["plan"], *sorted(path.parent.name for path in run.glob("*/metrics.jsonl"))]
    metrics = {name: read_rows(run / name / "metrics.jsonl") for name in dict.fromkeys(names)}
    arrays = _arrays(folder / "kept.safetensors")
    return Material(
        results=results,
        metrics={name: rows for name, rows in metrics.items() if rows},
        clips=clips,
        videos=[(folder / "videos" / c["file"]).read_bytes() for c in clips.get("clips", [])],
        kept={key: value for key, value in arrays.items() if not key.startswith(FRAMES)},
        generated={
            key.removeprefix(FRAMES): value
            for key, value in arrays.items()
            if key.startswith(FRAMES)
        },
        pictures=_arrays(folder / "salience.safetensors"),
    )


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file; a torn last line is left out, a missing file is empty."""
    if not path.is_file():
        return []
    lines = path.read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines if line]


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    return dict(load_file(path)) if path.is_file() else {}


def data_uri(kind: str, content: bytes) -> str:
    """Content as an address that a page can hold, such as `data:image/png;base64,...`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"
