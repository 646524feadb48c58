"""Reading video files with decord, checking them strictly with PyAV, and writing H.264."""

import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import decord
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate

from configs.errors import UserError

Frames = NDArray[np.uint8]
"""[F, H, W, 3], RGB."""


CHUNK = 16
"""Frames that are held at their own size at the same time."""


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
            info = _decode_all(path, container)
    except (av.FFmpegError, EOFError) as error:
        raise BadVideo(
            f"{path} must be a whole video, decoding it found: {error}; "
            f"copy or download the file again, or leave it out"
        ) from error
    read_video(path, frames=[0, info.frames - 1])  # the reader of the training data agrees
    return info


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
    """Decode frames of a video, all at once: `read_chunks` in one array, [F, H, W, 3]."""
    return np.concatenate(list(read_chunks(source, frames=frames, size=size, name=name)))


def read_chunks(
    source: bytes | Path,
    *,
    frames: Sequence[int] | None = None,
    size: Sequence[int] | None = None,
    name: str = "",
) -> Iterator[Frames]:
    """Decode frames of a video, some at a time; memory does not grow with their number.

    The decoder lives only within this call: one that is shared by threads crashes, and one that
    was opened before a fork hangs.

    Args:
        source: The file's content, or its path.
        frames: Numbers of the frames wanted, in the order wanted; all if None.
        size: Height and width of the result: the video is scaled to cover it, then its centre is
            cut out. The video's own size if None.
        name: What to call the video in an error, if `source` is content.

    Yields:
        At most `CHUNK` frames, [f, H, W, 3].

    Raises:
        BadVideo: If the video cannot be decoded or has no such frame.
    """
    name = name or (str(source) if isinstance(source, Path) else "video")
    content = io.BytesIO(source) if isinstance(source, bytes) else str(source)
    try:
        reader = decord.VideoReader(content, ctx=decord.cpu(0), num_threads=1)
        wanted = list(range(len(reader)) if frames is None else frames)
        if not wanted or not 0 <= min(wanted) <= max(wanted) < len(reader):
            raise BadVideo(
                f"{name} must hold all of the frames {wanted[:1]} .. {wanted[-1:]}, found "
                f"{len(reader)} frames; ask for others, or ingest the video again"
            )
        for first in range(0, len(wanted), CHUNK):
            yield _fit(reader.get_batch(wanted[first : first + CHUNK]).asnumpy(), size)
    except (RuntimeError, IndexError, decord.DECORDError) as error:
        raise unreadable(name, error) from error


def unreadable(name: str, error: Exception) -> BadVideo:
    """What to say of a video that decord does not read."""
    return BadVideo(
        f"{name} must be a video that decord reads, found: {' '.join(str(error).split())}; "
        f"copy or download the file again, or scale it to another width"
    )


def to_values(pixels: Frames) -> Tensor:
    """Bytes as the values in [-1, 1] that codecs take.  [F, H, W, 3] to [F, 3, H, W]."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_pixels(values: Tensor) -> Frames:
    """Values as bytes, those outside [-1, 1] clipped.  [F, 3, H, W] to [F, H, W, 3]."""
    levels = ((values.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return levels.permute(0, 2, 3, 1).cpu().numpy()


def _fit(pixels: Frames, size: Sequence[int] | None) -> Frames:
    """Scale frames to cover `size`, height and width, and cut out the centre."""
    if size is None or pixels.shape[1:3] == tuple(size):
        return pixels
    height, width = size
    scale = max(height / pixels.shape[1], width / pixels.shape[2])
    covering = [
        max(height, round(pixels.shape[1] * scale)),
        max(width, round(pixels.shape[2] * scale)),
    ]
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float()  # [F, 3, H, W]
    images = interpolate(images, covering, mode="bicubic", align_corners=False, antialias=True)
    top, left = (covering[0] - height) // 2, (covering[1] - width) // 2
    images = images[:, :, top : top + height, left : left + width]
    return images.round().clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()


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
        self._count = 0
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
        # Its macroblock tree is not deterministic in small frames.
        self._stream.options = {"crf": str(crf), "preset": preset, "x264-params": "mbtree=0"}

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
            self._count += 1

    def __enter__(self) -> Self:
        """Nothing more is needed: the file is open."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish the file, or remove it after an error.

        Raises:
            BadVideo: If no frame was written.
        """
        try:
            if kind is None and self._count:
                self._container.mux(self._stream.encode(None))
            self._container.close()
            if kind is None and not self._count:
                raise BadVideo(f"{self.path} must have at least one frame, found none to write")
            if kind is None:
                self._temporary.replace(self.path)
        finally:
            self._temporary.unlink(missing_ok=True)
