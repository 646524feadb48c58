"""Pixel pictures of the built-in world and of what a cache keeps of it, as PNG files.

Pictures of several lines have one line per revolution of the wheel, so that what returns stands
below what it repeats.
"""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray

from data.overlay import Pixels, per_pixel

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
            place[..., 3] = 255 * per_pixel(opacity[number], height, width)
    return picture[:-GAP, :-GAP]


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
