import collections
import io

import av
import numpy as np
import pytest

from data.video import BadVideo, VideoWriter, check_video, read_video


def numbered(frames, height=32, width=64):
    """Frames whose brightness tells their number: 6 levels apart."""
    levels = 20 + 6 * np.arange(frames, dtype=np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (frames, height, width, 3)).copy()


def numbers(pixels):
    return np.rint((pixels.mean(axis=(1, 2, 3)) - 20) / 6).astype(int).tolist()


@pytest.fixture(scope="module")
def movie(tmp_path_factory):
    path = tmp_path_factory.mktemp("movie") / "m.mp4"
    with VideoWriter(path, 8, (32, 64)) as writer:
        writer.write(numbered(20)[:7])
        writer.write(numbered(20)[7:])
    return path


def test_every_frame_comes_back_in_order_from_path_and_bytes(movie):
    assert numbers(read_video(movie)) == list(range(20))
    assert numbers(read_video(movie.read_bytes())) == list(range(20))
    assert numbers(read_video(movie, frames=[19, 0, 7, 7, 3])) == [19, 0, 7, 7, 3]


def test_check_counts_frames_and_reads_size_and_rate(movie):
    info = check_video(movie)
    assert (info.frames, info.fps, info.height, info.width) == (20, 8.0, 32, 64)


def test_the_same_frames_give_the_same_bytes(movie, tmp_path):
    with VideoWriter(tmp_path / "again.mp4", 8, (32, 64)) as writer:
        writer.write(numbered(20))
    assert (tmp_path / "again.mp4").read_bytes() == movie.read_bytes()


def test_scaled_videos_are_covered_and_centred(tmp_path):
    frame = np.zeros((2, 64, 64, 3), np.uint8)
    frame[:, :, 32:] = 255  # the right half is white, also in the centre
    with VideoWriter(tmp_path / "m.mp4", 8, (64, 64), crf=4, pixel_format="yuv444p") as writer:
        writer.write(frame)
    pixels = read_video(tmp_path / "m.mp4", size=(16, 32))
    assert pixels.shape == (2, 16, 32, 3)
    assert pixels[:, :, :12].max() < 10
    assert pixels[:, :, 20:].min() > 245


def test_the_writer_draws_pixels_larger_if_asked(tmp_path):
    with VideoWriter(tmp_path / "m.mp4", 8, (3, 5), scale=4) as writer:
        writer.write(numbered(2, 3, 5))
    assert read_video(tmp_path / "m.mp4").shape == (2, 12, 20, 3)


def test_an_error_while_writing_leaves_nothing(tmp_path):
    def frames_then_interrupt():
        yield numbered(3)
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        VideoWriter(tmp_path / "m.mp4", 8, (32, 64)) as writer,
    ):
        collections.deque(map(writer.write, frames_then_interrupt()))
    assert list(tmp_path.iterdir()) == []


def test_the_writer_refuses_what_it_cannot_write(tmp_path):
    with pytest.raises(BadVideo, match="even"):
        VideoWriter(tmp_path / "m.mp4", 8, (31, 64))
    with pytest.raises(BadVideo, match="create the folder"):
        VideoWriter(tmp_path / "missing" / "m.mp4", 8, (32, 64))
    with (
        pytest.raises(ValueError, match="uint8"),
        VideoWriter(tmp_path / "m.mp4", 8, (32, 64)) as writer,
    ):
        writer.write(np.zeros((1, 32, 64, 3), np.float32))
    with (
        pytest.raises(BadVideo, match="at least one frame"),
        VideoWriter(tmp_path / "m.mp4", 8, (32, 64)),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def flip(content, *, bits, seed):
    """`bits` random bits of the middle of the file are turned."""
    damaged = np.frombuffer(content, np.uint8).copy()
    places = np.random.default_rng(seed).integers(len(content) // 4, len(content) // 2, size=bits)
    damaged[places] ^= 16
    return damaged.tobytes()


def test_damaged_files_are_named(tmp_path):
    rows, columns, number = np.ogrid[:32, :64, :24]
    moving = (3 * rows + 2 * columns + 3 * number).transpose(2, 0, 1) % 256  # [F, H, W]
    busy = np.repeat(moving[..., None].astype(np.uint8), 3, axis=3)
    with VideoWriter(tmp_path / "good.mp4", 8, (32, 64)) as writer:
        writer.write(busy)
    good = (tmp_path / "good.mp4").read_bytes()
    damaged = {
        "half.mp4": good[: len(good) // 2],
        "tail.mp4": good[:-100],
        "empty.mp4": b"",
        "text.mp4": b"no video at all" * 50,
        "flips.mp4": flip(good, bits=50, seed=0),
    }
    for name, content in damaged.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadVideo, match=name):
            check_video(tmp_path / name)
    with pytest.raises(BadVideo, match=r"missing\.mp4"):
        check_video(tmp_path / "missing.mp4")
    assert check_video(tmp_path / "good.mp4").frames == 24


def test_an_audio_file_is_no_video(tmp_path):
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        silence.sample_rate = 8000
        container.mux(stream.encode(silence))
        container.mux(stream.encode(None))
    with pytest.raises(BadVideo, match="video stream"):
        check_video(tmp_path / "a.mp4")


def test_reading_what_is_not_there_names_the_video(movie):
    with pytest.raises(BadVideo, match="20 frames"):
        read_video(movie, frames=[5, 20])
    with pytest.raises(BadVideo, match="clip 7"):
        read_video(b"garbage", name="clip 7")
    with pytest.raises(BadVideo, match="empty"):
        read_video(io.BytesIO().getvalue(), name="empty")


def test_a_file_with_its_index_in_front_that_lost_its_last_frames_is_named(movie, tmp_path):
    """The index is whole and every frame that is left decodes: only counting finds the cut."""
    path = tmp_path / "cut.mp4"
    options = {"movflags": "faststart"}
    with av.open(str(movie)) as source, av.open(str(path), "w", options=options) as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                last = packet.size
                packet.stream = stream
                target.mux(packet)
    assert check_video(path).frames == 20
    path.write_bytes(path.read_bytes()[:-last])
    with pytest.raises(BadVideo, match=r"cut\.mp4 must hold 20 whole frames"):
        check_video(path)
