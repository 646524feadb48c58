"""Scores of tokens as colours on top of video frames."""

import numpy as np
from matplotlib import colormaps
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]


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
    cells = np.stack([per_pixel(frame, height, width) for frame in level])
    heat = colormaps["inferno"](cells)[..., :3] * 255
    grey = frames.mean(axis=-1, keepdims=True)
    return (strength * heat + (1 - strength) * grey).astype(np.uint8)


def per_pixel(values: NDArray[np.floating], height: int, width: int) -> NDArray[np.floating]:
    """Values of tokens [rows, columns] repeated to pixels [height, width]."""
    rows, columns = values.shape
    return values.repeat(height // rows, axis=0).repeat(width // columns, axis=1)
