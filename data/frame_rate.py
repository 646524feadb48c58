"""Which frames of a video show it at another rate."""

import math
from pathlib import Path

import decord

from data.video import BadVideo, unreadable

SAME_RATE = 0.01
"""Largest difference of two frame rates that count as one, relative to the one wanted."""


def frames_at(rate: float, *, own: float, count: int, name: str) -> list[int]:
    """Numbers of the frames that show a video at a rate: for each moment the nearest frame.

    Args:
        rate: Frames per second wanted.
        own: Mean frames per second of the video, whose frames are taken to be evenly spaced. All
            of them if it is `rate`, but for `SAME_RATE`.
        count: Frames of the video.
        name: Of the video, for an error.

    Raises:
        BadVideo: If the video has fewer frames per second, or does not say how many.
    """
    if abs(own - rate) <= SAME_RATE * rate:
        return list(range(count))
    if own < rate:
        raise BadVideo(
            f"{name} must have at least source.fps x source.every = {rate:g} frames per second, "
            f"found {own:g}: frames would have to be shown twice; leave it out or lower source.fps"
        )
    step = own / rate
    return [math.floor(number * step + 0.5) for number in range(int((count - 1) / step) + 1)]


def first_frames(path: Path, count: int, *, rate: float, every: int) -> list[int]:
    """Numbers of the frames of the first clip of a video, which is not decoded for that.

    Args:
        path: Of the video.
        count: Frames of the clip.
        rate: See `frames_at`.
        every: Every how many frames, at this rate, one is taken.

    Raises:
        BadVideo: If the video cannot be opened, has another rate or fewer frames.
    """
    try:
        reader = decord.VideoReader(str(path), ctx=decord.cpu(0), num_threads=1)
        own, frames = float(reader.get_avg_fps()), len(reader)
    except (RuntimeError, decord.DECORDError) as error:
        raise unreadable(str(path), error) from error
    numbers = frames_at(rate, own=own, count=frames, name=str(path))[::every]
    if len(numbers) < count:
        raise BadVideo(
            f"{path} must have {count} frames at {rate / every:g} per second, found "
            f"{len(numbers)}; ask for fewer or take a longer video"
        )
    return numbers[:count]
