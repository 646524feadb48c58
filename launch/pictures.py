"""Pixel pictures of the built-in world and of what a cache keeps of it, as PNG files.

Pictures of several lines have one line per revolution of the wheel, so that what returns stands
below what it repeats.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.image import imsave
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]

GAP = 2
"""Transparent pixels between two frames."""


def frame_lines(
    frames: Pixels, *, per_line: int, opacity: NDArray[np.floating] | None = None
) -> Pixels:
    """Frames side by side, halved in size, a new line after every `per_line`.

    Args:
        frames: [F, H, W, 3], H and W even
        per_line: Frames of a line.
        opacity: Of each token of each frame, in [0, 1]; all visible if not given.
            [F, rows, columns]

    Returns:
        RGBA picture, transparent between frames.
    """
    count, height, width, _ = frames.shape
    small = frames.reshape(count, height // 2, 2, width // 2, 2, 3).mean(axis=(2, 4))
    height, width = height // 2, width // 2
    lines = -(-count // per_line)
    picture = np.zeros((lines * (height + GAP), per_line * (width + GAP), 4), dtype=np.uint8)
    for number in range(count):
        top = number // per_line * (height + GAP)
        left = number % per_line * (width + GAP)
        place = picture[top : top + height, left : left + width]
        place[..., :3] = small[number]
        place[..., 3] = 255
        if opacity is not None:
            place[..., 3] = 255 * _per_pixel(opacity[number], height, width)
    return picture[:-GAP, :-GAP]


def heat_overlay(frames: Pixels, scores: NDArray[np.floating], *, strength: float = 0.78) -> Pixels:
    """Frames in grey with the score of each token as colour on top, dark = low, yellow = high.

    Args:
        frames: [F, H, W, 3]
        scores: Any scale; mapped from their 2nd to their 98th percentile.  [F, rows, columns]
        strength: Share of the colour.
    """
    low, high = np.percentile(scores, [2, 98])
    level = np.clip((scores - low) / max(float(high - low), 1e-9), 0, 1)
    height, width = frames.shape[1:3]
    cells = np.stack([_per_pixel(frame, height, width) for frame in level])
    heat = colormaps["inferno"](cells)[..., :3] * 255
    grey = frames.mean(axis=-1, keepdims=True)
    return (strength * heat + (1 - strength) * grey).astype(np.uint8)


def memory_opacity(kept: NDArray[np.floating]) -> NDArray[np.floating]:
    """How visible a token is whose share of layers that keep it is `kept`: never quite gone."""
    return 0.1 + 0.9 * kept


def png(picture: Pixels) -> bytes:
    """A picture [H, W, 3 or 4] as a PNG file."""
    buffer = io.BytesIO()
    imsave(buffer, picture, format="png")
    return buffer.getvalue()


def stack_panels(panels: Sequence[Pixels]) -> Pixels:
    """Videos of equal size, [F, H, W, 3] each, one below the other."""
    return np.concatenate(panels, axis=1)


def _per_pixel(values: NDArray[np.floating], height: int, width: int) -> NDArray[np.floating]:
    """Values of tokens [rows, columns] repeated to pixels [height, width]."""
    rows, columns = values.shape
    return values.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
