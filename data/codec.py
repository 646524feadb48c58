"""From pixels to latents and back: what a codec is, and the built-in one, without weights."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from typing import Any, Protocol

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import CodecConfig
from data.pretrained import fingerprint
from data.wan_codec import find_vae, load_wan_codec


class Codec(Protocol):
    """What the rest of the project asks of a codec; results are on the device of what came in."""

    stride: int
    """Pixels per latent cell, in both directions."""
    time_stride: int
    """Pixel frames that each latent frame but a video's first stands for; the first, for one."""
    channels: int

    def encode(self, frames: Tensor) -> Tensor:
        """Whole videos to latents.

        Frames [..., 1 + n * time_stride, 3, H, W] in [-1, 1] become latents
        [..., 1 + n, channels, H / stride, W / stride].
        """
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents of whole videos back to frames."""
        ...

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`encode` of videos that arrive in pieces along time, in memory that does not grow."""
        ...

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """`decode` of latents that arrive in pieces along time, in memory that does not grow."""
        ...


class TransformCodec:
    """The lowest cosine frequencies of each square cell of pixels, in opponent colours.

    The transform is orthonormal up to one factor, 2 / stride, which gives a cell of one colour of
    strength 0.8 values of order 1. Every latent frame is one pixel frame. `decode` is the exact
    inverse of `encode` for frames that hold no other frequencies; what it drops from other frames
    is the part orthogonal to those.

    Source: orthonormal DCT-II; opponent colours (1,1,1), (1,-1,0), (1,1,-2), normalised.
    """

    time_stride = 1

    def __init__(self, stride: int, channels: int) -> None:
        """Build the basis.

        Args:
            stride: Side of a cell in pixels, at least 2.
            channels: Coefficients kept per cell, 1 .. 3 stride^2. The first 12 are the four
                frequencies (0,0), (0,1), (1,0), (1,1) of all three colours; then brightness in the
                order of frequency, then the two other colours.

        Raises:
            UserError: If `stride` or `channels` is out of range.
        """
        if stride < 2 or not 1 <= channels <= 3 * stride**2:
            raise UserError(
                f"codec.stride must be at least 2 and codec.channels lie in 1 .. 3 stride^2, found "
                f"stride {stride} and channels {channels}; the built-in world is made for 16 and 16"
            )
        self.stride = stride
        self.channels = channels
        self._basis = _basis(stride, channels)  # [C, 3 stride^2]

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of frames.

        Args:
            frames: Values in [-1, 1].  [..., 3, H, W], H and W multiples of the stride

        Returns:
            float32 [..., channels, H / stride, W / stride]

        Raises:
            ValueError: If the shape does not fit.
        """
        side = self.stride
        if frames.dim() < 3 or frames.shape[-3] != 3:
            raise ValueError(f"frames must be [..., 3, H, W], found {tuple(frames.shape)}")
        *lead, _, height, width = frames.shape
        if height % side or width % side:
            raise ValueError(
                f"height and width must be multiples of codec.stride = {side}, found "
                f"{height} x {width}; set source.size to multiples of {side}"
            )
        cells = frames.float().reshape(-1, 3, height // side, side, width // side, side)
        cells = cells.permute(0, 2, 4, 1, 3, 5).flatten(3)  # [n, H/s, W/s, 3 s s]
        latents = cells @ self._basis.T.to(frames.device) * (2 / side)  # [n, H/s, W/s, C]
        return latents.permute(0, 3, 1, 2).reshape(
            *lead, self.channels, height // side, width // side
        )

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of latents; values may leave [-1, 1], the caller clips.

        Args:
            latents: What `encode` gives.  [..., channels, h, w]

        Returns:
            float32 [..., 3, h * stride, w * stride]

        Raises:
            ValueError: If the shape does not fit.
        """
        side = self.stride
        if latents.dim() < 3 or latents.shape[-3] != self.channels:
            raise ValueError(
                f"latents must be [..., {self.channels}, h, w], found {tuple(latents.shape)}; "
                f"use the codec that the latents were made with"
            )
        *lead, _, height, width = latents.shape
        flat = latents.float().reshape(-1, self.channels, height, width).permute(0, 2, 3, 1)
        cells = flat @ self._basis.to(latents.device) * (side / 2)  # [n, h, w, 3 s s]
        cells = cells.unflatten(3, (3, side, side)).permute(0, 3, 1, 4, 2, 5)
        return cells.reshape(*lead, 3, height * side, width * side)

    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of each piece of a video; frames know nothing of one another."""
        return map(self.encode, chunks)

    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of each piece of a video."""
        return map(self.decode, chunks)


def _basis(stride: int, channels: int) -> Tensor:
    """The first `channels` orthonormal images of a cell, flattened, [C, 3 * stride * stride]."""
    index = torch.arange(stride, dtype=torch.float64)
    waves = torch.cos(math.pi * (index + 0.5) * index[:, None] / stride)  # [frequency, x]
    waves = waves / waves.norm(dim=1, keepdim=True)
    colors = torch.tensor([[1, 1, 1], [1, -1, 0], [1, 1, -2]], dtype=torch.float64)
    colors = colors / colors.norm(dim=1, keepdim=True)
    images = [
        torch.einsum("c,y,x->cyx", colors[color], waves[v], waves[u]).flatten()
        for color, v, u in _order(stride)[:channels]
    ]
    return torch.stack(images).float()


def _order(stride: int) -> list[tuple[int, int, int]]:
    """All (colour, vertical, horizontal) frequencies of a cell, the most important first."""
    low = [(color, v, u) for v in (0, 1) for u in (0, 1) for color in range(3)]
    high = sorted(
        (color > 0, v * v + u * u, v, color, u)
        for color in range(3)
        for v in range(stride)
        for u in range(stride)
        if max(v, u) > 1
    )
    return low + [(color, v, u) for _, _, v, color, u in high]


def build_codec(config: CodecConfig, device: torch.device | str = "cpu") -> Codec:
    """The codec that a config names.

    Args:
        config: Its section.
        device: Where a codec with weights computes; the other computes where its input is.

    Raises:
        UserError: If a size is out of range, or the weights are not there or others.
    """
    if config.name == "wan":
        return load_wan_codec(config, device)
    return TransformCodec(config.stride, config.channels)


def codec_identity(config: CodecConfig) -> dict[str, Any]:
    """All that latents depend on: the settings, and which files the weights are, wherever they lie.

    Raises:
        UserError: If there are no weights where the config says.
    """
    settings = {key: value for key, value in asdict(config).items() if key != "path"}
    return settings | ({"files": fingerprint(find_vae(config))} if config.name == "wan" else {})
