"""Reading video files with decord, checking them strictly with PyAV, and writing H.264."""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import decord
import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError

Frames = NDArray[np.uint8]
"""[F, H, W, 3], RGB."""


class BadVideo(UserError):
    """A video file cannot be used; the message names the file."""


@dataclass(frozen=True)
class VideoInfo:
    """What a full, strict decoding of a video found."""

    frames: int
    fps: float
    """Mean frames per second; 0 if the file does not say."""
    height: int
    width: int


def check_video(path: Path) -> VideoInfo:
    """Decode every frame of a file and accept no error.

    A damaged file can decode without a complaint, so the decoder is told to stop at the first
    inconsistency, and the number of frames is compared with what the container promises.

    Raises:
        BadVideo: If the file is missing, no video, cut short or damaged.
    """
    if not path.is_file():
        raise BadVideo(f"{path} must be a video file, found nothing there; correct the path")
    try:
        with av.open(str(path), options={"err_detect": "explode"}) as container:
            return _decode_all(path, container)
    except (av.FFmpegError, EOFError) as error:
        raise BadVideo(
            f"{path} must be a whole video, decoding it found: {error}; "
            f"copy or download the file again, or leave it out"
        ) from error


def _decode_all(path: Path, container: Any) -> VideoInfo:
    """Count the frames of an open container."""
    if not container.streams.video:
        raise BadVideo(f"{path} must hold a video stream, found none; leave the file out")
    stream = container.streams.video[0]
    stream.codec_context.options = {"err_detect": "explode"}
    stream.thread_type = "NONE"
    frames = sum(not frame.is_corrupt for frame in container.decode(stream))
    if frames == 0 or (stream.frames and frames < stream.frames):
        raise BadVideo(
            f"{path} must hold {stream.frames or 'at least one'} whole frames, decoding found "
            f"{frames}; copy or download the file again, or leave it out"
        )
    return VideoInfo(
        frames=frames,
        fps=float(stream.average_rate or 0),
        height=stream.codec_context.height,
        width=stream.codec_context.width,
    )


def read_video(
    source: bytes | Path,
    *,
    frames: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    name: str = "",
) -> Frames:
    """Decode frames of a video.

    The decoder lives only within this call: one that is shared by threads crashes, and one that
    was opened before a fork hangs.

    Args:
        source: The file's content, or its path.
        frames: Numbers of the frames wanted, in the order wanted; all if None.
        size: Height and width of the result: the video is scaled to cover it, then its centre is
            cut out. The video's own size if None.
        name: What to call the video in an error, if `source` is content.

    Raises:
        BadVideo: If the video cannot be decoded or has no such frame.
    """
    name = name or (str(source) if isinstance(source, Path) else "video")
    try:
        height, width = size or (0, 0)
        reader, native = _open(source)
        if size and native != (height, width):
            scale = max(height / native[0], width / native[1])
            covering = max(height, round(native[0] * scale)), max(width, round(native[1] * scale))
            reader, native = _open(source, height=covering[0], width=covering[1])
        if frames is not None and frames and not 0 <= min(frames) <= max(frames) < len(reader):
            raise BadVideo(
                f"{name} must hold the frames {min(frames)} to {max(frames)}, found "
                f"{len(reader)} frames; ask for fewer, or ingest the video again"
            )
        pixels = reader.get_batch(range(len(reader)) if frames is None else list(frames)).asnumpy()
    except (RuntimeError, IndexError, decord.DECORDError) as error:
        raise BadVideo(
            f"{name} must be a video that decord reads, decoding it found: "
            f"{str(error).splitlines()[0] if str(error) else type(error).__name__}; "
            f"copy or download the file again"
        ) from error
    if size is None:
        return pixels
    top, left = (pixels.shape[1] - height) // 2, (pixels.shape[2] - width) // 2
    return np.ascontiguousarray(pixels[:, top : top + height, left : left + width])


def _open(
    source: bytes | Path, *, height: int = -1, width: int = -1
) -> tuple[Any, tuple[int, int]]:
    """A decord reader that scales to the given size (-1 = as is), and the size of its frames."""
    content = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    reader = decord.VideoReader(
        content, ctx=decord.cpu(0), width=width, height=height, num_threads=1
    )
    found = reader[0].shape
    reader.seek(0)
    return reader, (found[0], found[1])


class VideoWriter:
    """Writes H.264 frame by frame; the file has its final name only after a clean end.

    Use it in a `with` statement: leaving it normally finishes the file, leaving it with an error
    removes what was written. Memory does not grow with the length. The bytes are the same in every
    run with the same libraries.
    """

    def __init__(
        self,
        path: Path,
        fps: float,
        size: Sequence[int],
        *,
        scale: int = 1,
        crf: int = 14,
        preset: str = "veryfast",
        pixel_format: str = "yuv420p",
    ) -> None:
        """Open the file.

        Args:
            path: Final name, ending in .mp4; its folder must exist.
            fps: Frames per second.
            size: Height and width of the frames that `write` will be given.
            scale: Every pixel is drawn as scale x scale pixels; for videos meant to be looked at.
            crf: Quality of x264, 0 = lossless .. 51 = worst.
            preset: Speed of x264.
            pixel_format: yuv420p plays everywhere; yuv444p keeps all of the colour.

        Raises:
            BadVideo: If the folder does not exist or the size is odd.
        """
        self.path = path
        self.size = (int(size[0]), int(size[1]))
        self.scale = scale
        height, width = self.size[0] * scale, self.size[1] * scale
        if pixel_format == "yuv420p" and (height % 2 or width % 2):
            raise BadVideo(f"{path}: height and width must be even, found {height} x {width}")
        if not path.parent.is_dir():
            raise BadVideo(f"{path} cannot be written: create the folder {path.parent} first")
        self._temporary = path.with_name(f".{path.name}.part-{os.getpid()}")
        self._container: Any = av.open(str(self._temporary), "w", format="mp4")
        self._stream: Any = self._container.add_stream(
            "libx264", rate=Fraction(fps).limit_denominator(1001)
        )
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = pixel_format
        self._stream.codec_context.thread_count = 1  # the same bytes on every machine
        self._stream.options = {"crf": str(crf), "preset": preset}

    def write(self, frames: Frames) -> None:
        """Append frames.

        Args:
            frames: uint8 RGB of the size given at the start.  [F, H, W, 3]

        Raises:
            ValueError: If shape or dtype is another.
        """
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (*self.size, 3):
            raise ValueError(
                f"frames must be uint8 [F, {self.size[0]}, {self.size[1]}, 3], found "
                f"{frames.dtype} {list(frames.shape)}"
            )
        for frame in frames:
            if self.scale > 1:
                frame = frame.repeat(self.scale, axis=0).repeat(self.scale, axis=1)
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            self._container.mux(self._stream.encode(image))

    def __enter__(self) -> Self:
        """Nothing more is needed: the file is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file, or remove it after an error."""
        try:
            if kind is None:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
