"""The built-in world: rendering of its clips, and writing them as real video files.

A frame is 2 rows x 4 columns of cells of 16 x 16 pixels. One row is the track: two adjacent cells
are the opening in which the gondolas of `data.truth` show, the other two are a static wall. The
other row is the sky, in which birds fly: decoys that look like gondolas and never return. Which row
is which, the column of the opening, all textures, the identities and the phase of the wheel are
drawn per clip. Everything is drawn from the four lowest cosines of a cell, so that the codec keeps
it exactly.
"""

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from configs.schema import WorldConfig
from data.files import STARTED, claim_folder, json_sha256, write_atomically
from data.truth import (
    CELL,
    COLOR_NAMES,
    COLUMNS,
    DARK,
    ROWS,
    Truth,
    measure,
    measure_self_consistency,
    templates,
    truth_at,
    wall_columns,
)
from data.video import VideoWriter

__all__ = [
    "Clip",
    "Truth",
    "caption_of",
    "measure",
    "measure_self_consistency",
    "render_clip",
    "templates",
    "truth_at",
    "world_hash",
    "write_world",
]

BIRD_FRAMES = 3
"""Frames a bird lives; it moves one column per frame."""
DRAWING_VERSION = 1
"""Part of the hash of a written world: raise it whenever a pixel of any clip changes."""
MARKER, CAPTIONS = "world.json", "captions.jsonl"


@dataclass(frozen=True)
class Clip:
    """One rendered clip."""

    frames: NDArray[np.uint8]
    """[F, 32, 64, 3], 0..255 for the values -1..1."""
    caption: str
    truth: Truth


def caption_of(truth: Truth) -> str:
    """The caption: the palette and the layout, never the identities or the phase."""
    opening = ("left", "middle", "right")[truth.opening_column]
    track = ("top", "bottom")[truth.track_row]
    return f"{' '.join(COLOR_NAMES)} gondolas track {track} opening {opening}"


def render_clip(config: WorldConfig, index: int) -> Clip:
    """Draw clip number `index` of the world; a pure function of the two.

    Args:
        config: `clips` is not used: any index from 0 up can be drawn.
        index: The clip's number.
    """
    key = hashlib.sha256(f"world {config.seed} {index}".encode()).digest()[:16]
    draw = np.random.Generator(np.random.Philox(key=np.frombuffer(key, dtype=np.uint64)))
    truth = Truth(
        colors=tuple(draw.integers(len(COLOR_NAMES), size=config.identities).tolist()),
        shapes=tuple(draw.integers(2, size=config.identities).tolist()),
        phase=int(draw.integers(config.period)),
        track_row=int(draw.integers(ROWS)),
        opening_column=int(draw.integers(COLUMNS - 1)),
    )
    cells = np.empty((config.frames, ROWS, COLUMNS, 3, CELL, CELL), dtype=np.float32)
    _draw_track(cells[:, truth.track_row], truth, draw)
    _draw_sky(cells[:, 1 - truth.track_row], config.decoys, draw)
    values = cells.transpose(0, 1, 4, 2, 5, 3).reshape(  # [F, row, y, column, x, 3]
        config.frames, ROWS * CELL, COLUMNS * CELL, 3
    )
    noise = draw.standard_normal(values.shape, dtype=np.float32)
    values = (values + config.noise * noise).clip(-1, 1)
    pixels = np.rint((values + 1) * 127.5).astype(np.uint8)
    return Clip(frames=pixels, caption=caption_of(truth), truth=truth)


def _draw_track(row: NDArray[np.float32], truth: Truth, draw: np.random.Generator) -> None:
    """Fill the track, [F, 4, 3, 16, 16], with the wall, the empty opening and the gondolas."""
    for column in wall_columns(truth):
        row[:, column] = _texture(draw, base=0.3, ripple=0.3)
    row[:, truth.opening_column : truth.opening_column + 2] = DARK
    shown = truth_at(truth, range(len(row)))
    row[np.arange(len(row)), shown.lit[:, 1].numpy()] = templates().numpy()[shown.identity.numpy()]


def _draw_sky(row: NDArray[np.float32], decoys: float, draw: np.random.Generator) -> None:
    """Fill the sky, [F, 4, 3, 16, 16], with its static colours and one bird at a time."""
    for column in range(COLUMNS):
        row[:, column] = _texture(draw, base=0.6, ripple=0.1)
    looks = templates().numpy()
    frame = 0
    while frame < len(row):
        if draw.random() >= decoys:
            frame += 1
            continue
        look = looks[draw.integers(len(looks))]
        first_column = int(draw.integers(COLUMNS - BIRD_FRAMES + 1))
        for age in range(min(BIRD_FRAMES, len(row) - frame)):
            row[frame + age, first_column + age] = look
        frame += BIRD_FRAMES


def _texture(draw: np.random.Generator, *, base: float, ripple: float) -> NDArray[np.float32]:
    """A static cell [3, 16, 16]: a colour within +-`base`, and three cosines within +-`ripple`."""
    wave = np.cos(math.pi * (np.arange(CELL) + 0.5) / CELL)
    flat = np.ones(CELL)
    waves = np.stack([np.outer(a, b) for a, b in ((flat, wave), (wave, flat), (wave, wave))])
    color = draw.uniform(-base, base, size=(3, 1, 1))
    weights = draw.uniform(-ripple, ripple, size=(3, 3)) / 3
    return (color + np.einsum("ck,kyx->cyx", weights, waves)).astype(np.float32)


def world_hash(config: WorldConfig) -> str:
    """Changes whenever any byte of the written world's content would."""
    return json_sha256({"world": asdict(config), "drawing": DRAWING_VERSION})


def write_world(config: WorldConfig, folder: Path, progress: bool = True) -> None:
    """Render all clips to H.264 files with captions and ground truth.

    Writes clip-000000.mp4 and so on, captions.jsonl with {"file", "caption", "truth"} per line, and
    last world.json, whose presence says that the folder is whole. Clips that an interrupted call
    left are kept, a whole folder of the same config is left alone, a world of another config that
    this function wrote is replaced.

    Args:
        config: The world.
        folder: Made if need be; holds nothing but a world.
        progress: Whether to show a progress bar.

    Raises:
        UserError: If the folder holds files that are not a world.
    """
    identity = world_hash(config)
    if claim_folder(folder, identity, marker=MARKER, owned=("clip-*.mp4", CAPTIONS)):
        return
    lines = []
    for index in tqdm(range(config.clips), desc="world", unit="clip", disable=not progress):
        clip = render_clip(config, index)
        path = folder / f"clip-{index:06d}.mp4"
        if not path.exists():
            _write_clip(path, clip, config.fps)
        row = {"file": path.name, "caption": clip.caption, "truth": asdict(clip.truth)}
        lines.append(json.dumps(row) + "\n")
    write_atomically(folder / CAPTIONS, "".join(lines).encode())
    marker = json.dumps({"source_hash": identity, "config": asdict(config)})
    write_atomically(folder / MARKER, marker.encode())
    (folder / STARTED).unlink()


def _write_clip(path: Path, clip: Clip, fps: int) -> None:
    """Encode one clip; 4:4:4 keeps the edges of the cells as sharp in colour as in brightness."""
    size = clip.frames.shape[1:3]
    with VideoWriter(path, fps, size, crf=10, preset="ultrafast", pixel_format="yuv444p") as writer:
        writer.write(clip.frames)
