"""The VAE of Wan2.1 as a codec: a video passes through it piece by piece."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.schema import CodecConfig
from data.pretrained import (
    PRECISIONS,
    PretrainedError,
    find_network,
    load_network,
    require_packages,
    require_sizes,
)

Memory = defaultdict[int, Any]
"""What each causal convolution has kept of the frames before, by its number; at first nothing."""


class WanCodec:
    """diffusers' `AutoencoderKLWan`, which looks back in time and never ahead.

    The first pixel frame of a video becomes a latent frame of its own, then every `time_stride`
    pixel frames become one more. What the causal convolutions must know of earlier frames lives in
    the generator that works on a video, nowhere else: videos do not disturb one another, and
    memory does not grow with their length.

    Latents are the posterior's mean, normalised per channel: z = (mean - latents_mean) /
    latents_std, with the constants of the folder's config.json.
    """

    def __init__(self, vae: Any) -> None:
        """Keep the network.

        Args:
            vae: An `AutoencoderKLWan` in evaluation mode.
        """
        settings = vae.config
        self.stride = 2 ** (len(settings.dim_mult) - 1)
        self.time_stride = 2 ** sum(settings.temperal_downsample)
        self.channels = int(settings.z_dim)
        self._vae = vae
        self._mean = _per_channel(settings.latents_mean, vae.device)
        self._std = _per_channel(settings.latents_std, vae.device)

    def encode(self, frames: Tensor) -> Tensor:
        """Latents of whole videos, on the device of the frames.

        Args:
            frames: Values in [-1, 1].  [..., 1 + n * time_stride, 3, H, W]

        Returns:
            float32 [..., 1 + n, channels, H / stride, W / stride]

        Raises:
            ValueError: If the shape does not fit.
        """
        return torch.cat(list(self.encode_chunks([frames])), dim=-4)

    def decode(self, latents: Tensor) -> Tensor:
        """Frames of whole videos; values may leave [-1, 1], the caller clips.

        Args:
            latents: What `encode` gives.  [..., 1 + n, channels, h, w]

        Returns:
            float32 [..., 1 + n * time_stride, 3, h * stride, w * stride]

        Raises:
            ValueError: If the shape does not fit.
        """
        return torch.cat(list(self.decode_chunks([latents])), dim=-4)

    @torch.no_grad()
    def encode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Latents of videos that arrive in pieces, one latent frame after another.

        Args:
            chunks: Pixel frames in order of time, any number at once.  [..., F, 3, H, W]

        Yields:
            [..., 1, channels, H / stride, W / stride]

        Raises:
            ValueError: If a shape does not fit, or the frames are not 1 + n * time_stride in all.
        """
        memory = _new_memory()
        for part in _regroup(chunks, self.time_stride):
            if part.shape[-3] != 3 or any(side % self.stride for side in part.shape[-2:]):
                raise ValueError(
                    f"frames must be [..., F, 3, H, W] with H and W multiples of {self.stride}, "
                    f"found {tuple(part.shape)}; set source.size to such multiples"
                )
            pixels = _enter(part).to(self._vae.device, self._vae.dtype)
            hidden = self._vae.encoder(pixels, feat_cache=memory, feat_idx=[0])
            means, _ = self._vae.quant_conv(hidden).float().chunk(2, dim=1)  # [B, C, 1, h, w]
            yield _leave((means - self._mean) / self._std, part)

    @torch.no_grad()
    def decode_chunks(self, chunks: Iterable[Tensor]) -> Iterator[Tensor]:
        """Frames of videos whose latents arrive in pieces.

        Args:
            chunks: Latent frames in order of time, any number at once.  [..., F, C, h, w]

        Yields:
            The pixel frames of one latent frame after another: first 1, then `time_stride` each.
            [..., 1 or time_stride, 3, h * stride, w * stride]

        Raises:
            ValueError: If a shape does not fit, or there are no latents.
        """
        memory = _new_memory()
        for number, part in enumerate(_regroup(chunks, 1)):
            if part.shape[-3] != self.channels:
                raise ValueError(
                    f"latents must be [..., F, {self.channels}, h, w], found {tuple(part.shape)}; "
                    "use the codec that the latents were made with"
                )
            means = _enter(part).to(self._mean) * self._std + self._mean
            hidden = self._vae.post_quant_conv(means.to(self._vae.dtype))  # [B, C, 1, h, w]
            frames = self._vae.decoder(
                hidden, feat_cache=memory, feat_idx=[0], first_chunk=number == 0
            )
            yield _leave(frames.float(), part)


def _new_memory() -> Memory:
    return defaultdict(lambda: None)


def _regroup(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Videos in pieces of any length as pieces of 1, size, size, ... frames.

    Raises:
        ValueError: If frames are left over, or there are none.
    """
    waiting, due, total = None, 1, 0
    for chunk in chunks:
        if chunk.dim() < 4:
            raise ValueError(f"a video must be [..., F, C, H, W], found {tuple(chunk.shape)}")
        waiting = chunk if waiting is None else torch.cat([waiting, chunk], dim=-4)
        total += chunk.shape[-4]
        while waiting.shape[-4] >= due:
            yield waiting[..., :due, :, :, :]
            waiting, due = waiting[..., due:, :, :, :], size
    if waiting is None or total == 0 or waiting.shape[-4]:
        raise ValueError(f"a video must have 1 + n x {size} frames, found {total}")


def _enter(video: Tensor) -> Tensor:
    """A video [..., F, C, H, W] as the network takes it, [B, C, F, H, W]."""
    batch = video.flatten(0, -5) if video.dim() > 4 else video[None]  # [B, F, C, H, W]
    return batch.transpose(1, 2)


def _leave(batch: Tensor, like: Tensor) -> Tensor:
    """What the network gave, [B, C, F, H, W], with the leading axes and on the device of `like`."""
    frames = batch.transpose(1, 2)  # [B, F, C, H, W]
    return frames.reshape(*like.shape[:-4], *frames.shape[1:]).to(like.device)


def _per_channel(values: list[float], device: torch.device) -> Tensor:
    """One constant per channel, in float32 at any precision of the network.  [C, 1, 1, 1]."""
    return torch.tensor(values, dtype=torch.float32, device=device).reshape(-1, 1, 1, 1)


def find_vae(config: CodecConfig) -> Path:
    """The folder of the VAE that a config names; its weights are not read.

    Raises:
        PretrainedError: If there is none, or diffusers is missing.
    """
    require_packages(f"codec.name={config.name}", ("diffusers", "accelerate"))
    return find_network("codec.path", config.path, "vae", marks=("AutoencoderKLWan",))


def load_wan_codec(config: CodecConfig, device: torch.device | str) -> WanCodec:
    """The codec that a config names, its weights on a device.

    Raises:
        PretrainedError: If the folder, its weights or the sizes in the config do not fit.
    """
    folder = find_vae(config)
    from diffusers import AutoencoderKLWan

    dtype = PRECISIONS[config.precision]
    vae = load_network(AutoencoderKLWan, folder, key="codec.path", device=device, torch_dtype=dtype)
    settings = vae.config
    constants = [len(settings.latents_mean), len(settings.latents_std)]
    if settings.patch_size is not None or constants != [settings.z_dim] * 2:
        raise PretrainedError(
            f"{folder} must hold a VAE of Wan2.1, without patches and with a latents_mean and a "
            f"latents_std for each of {settings.z_dim} channels, found patch_size="
            f"{settings.patch_size} and {constants} constants; correct codec.path"
        )
    codec = WanCodec(vae)
    sizes = {name: getattr(codec, name) for name in ("stride", "time_stride", "channels")}
    pairs = {name: (getattr(config, name), size) for name, size in sizes.items()}
    require_sizes("codec", folder, **pairs)
    return codec
