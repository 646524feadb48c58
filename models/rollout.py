"""Block-by-block generation with a KV cache: the only such loop, for training and for sampling."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from models.flow import add_noise, velocity_to_x0
from models.kv_cache import KVCache
from models.kv_policy import CachePolicy
from models.kv_spec import CacheSpec
from models.salience import SalienceHead
from models.transformer import VideoTransformer

VelocityModel = Callable[..., Tensor]
"""A `VideoTransformer`, or an engine that wraps one for training."""


class NoiseSource:
    """Standard normal noise that belongs to samples: the same in any batch.

    Args:
        seeds: One per sample.  [B]
    """

    def __init__(self, seeds: Tensor) -> None:
        self.device = seeds.device
        self.generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def draw(self, shape: Sequence[int]) -> Tensor:
        """The next noise of every sample.  [B, *shape]."""
        noise = [torch.randn(*shape, generator=generator) for generator in self.generators]
        drawn = torch.stack(noise)
        if self.device.type == "cuda":
            drawn = drawn.pin_memory()  # the host need not wait for the copy
        return drawn.to(self.device, non_blocking=True)


@dataclass
class Sampler:
    """How a block is denoised.

    Attributes:
        sigmas: Noise levels from 1 to 0, one network pass per interval (see `sampling_sigmas`).
        renoise: False: Euler steps along the velocity (many-step student). True: predict clean
            latents, then noise them anew to the next level (few-step student).
    """

    sigmas: list[float]
    renoise: bool = False

    @property
    def num_steps(self) -> int:
        """Network passes per block, the clean pass not counted."""
        return len(self.sigmas) - 1


def make_cache(
    student: VideoTransformer,
    *,
    spec: CacheSpec,
    policy: CachePolicy,
    seeds: Tensor,
    head: SalienceHead | None = None,
    targets: Tensor | None = None,
) -> KVCache:
    """An empty cache that fits a student."""
    return KVCache(
        num_layers=student.num_layers,
        head_dim=student.head_dim,
        rope_theta=student.rope_theta,
        spec=spec,
        policy=policy,
        seeds=seeds,
        head=head,
        targets=targets,
    )


def denoise_block(
    student: VelocityModel,
    text: Tensor,
    *,
    cache: KVCache,
    noise: NoiseSource,
    shape: Sequence[int],
    sampler: Sampler,
    grad_step: int | None = None,
) -> Tensor:
    """Clean latents of the next block.

    Args:
        student: Block-causal student.
        text: [B, T, text_dim]
        cache: Past; read only.
        noise: Of the batch.
        shape: (F, C, H, W) of the block.
        sampler: Noise levels and rule.
        grad_step: Step whose clean estimate is returned, with gradient if it is enabled; later
            steps are not run. None runs all steps without gradient.

    Returns:
        [B, F, C, H, W]
    """
    latents = noise.draw(shape)
    last = sampler.num_steps - 1 if grad_step is None else grad_step
    for step in range(last + 1):
        sigma = latents.new_full(latents.shape[:2], sampler.sigmas[step])
        with torch.set_grad_enabled(torch.is_grad_enabled() and grad_step == step):
            velocity = student(latents, sigma, text, cache=cache)
        following = sampler.sigmas[step + 1]
        if step == last and (grad_step is not None or sampler.renoise):
            return velocity_to_x0(velocity, latents, sigma)
        if sampler.renoise:
            x0 = velocity_to_x0(velocity, latents, sigma)
            latents = add_noise(x0, noise.draw(shape), torch.full_like(sigma, following))
        else:
            latents = latents + (following - sampler.sigmas[step]) * velocity
    return latents


@torch.no_grad()
def refresh(student: VelocityModel, text: Tensor, block: Tensor, *, cache: KVCache) -> None:
    """Write a finished block into the cache: one pass at noise level 0, then eviction.

    Its velocity is of no use; all attention of the pass counts, if the policy observes it.
    """
    sigma = block.new_zeros(block.shape[:2])
    wanted = None if cache.needs_whole_passes else 0
    student(block.detach(), sigma, text, cache=cache, write=True, wanted=wanted)


@torch.no_grad()
def recache(
    student: VelocityModel, text: Tensor, history: Tensor, *, cache: KVCache, sink: Tensor
) -> None:
    """Rebuild the past of a video under a new prompt, after LongLive's KV re-cache.

    Every cached key has seen the old prompt. The cache is emptied; the sink frames and the last
    frames of the video are read again, block by block, with their own frame numbers and the
    policy's eviction. What was kept from between them is forgotten: single tokens of a frame
    cannot be computed again.

    Args:
        student: As in `denoise_block`.
        text: The new prompt.  [B, T, text_dim]
        history: Last frames of the video, whole blocks.  [B, F, C, H, W]
        cache: Of the video; its frame counter stands after `history`.
        sink: First frames of the video, whole blocks.  [B, F, C, H, W]

    Source: LongLive, arXiv:2509.22622, section 3.2; keeping the sink is our choice.
    """
    size, end = cache.spec.frames_per_block, cache.num_frames
    start = end - history.shape[1]
    cache.clear()
    if start > 0:
        for block in sink[:, :start].split(size, dim=1):
            refresh(student, text, block, cache=cache)
    cache.skip_to(start)
    for block in history.split(size, dim=1):
        refresh(student, text, block, cache=cache)


@torch.no_grad()
def generate_blocks(
    student: VelocityModel,
    text: Tensor,
    *,
    cache: KVCache,
    noise: NoiseSource,
    num_frames: int,
    latent_shape: Sequence[int],
    sampler: Sampler,
    prefix: Tensor | None = None,
) -> Iterator[Tensor]:
    """Continue a video; yields each finished block, so any length runs in constant memory.

    Args:
        student: Block-causal student.
        text: [B, T, text_dim]
        cache: Past; empty, or left by an earlier call.
        noise: Of the batch.
        num_frames: Frames to produce, the prefix counted; rounded up to whole blocks.
        latent_shape: (C, H, W)
        sampler: Noise levels and rule.
        prefix: True frames streamed through the same eviction first.  [B, P, C, H, W]

    Yields:
        [B, frames_per_block, C, H, W], the prefix's blocks included.

    Raises:
        ValueError: If the prefix is not a whole number of blocks.
    """
    size = cache.spec.frames_per_block
    if prefix is not None and prefix.shape[1] % size:
        raise ValueError(
            f"the prefix must be whole blocks of {size} frames, got {prefix.shape[1]} frames"
        )
    known = [] if prefix is None else list(prefix.split(size, dim=1))
    produced = 0
    while produced < num_frames:
        if known:
            block = known.pop(0)
        else:
            block = denoise_block(
                student,
                text,
                cache=cache,
                noise=noise,
                shape=(size, *latent_shape),
                sampler=sampler,
            )
        refresh(student, text, block, cache=cache)
        produced += size
        yield block
