"""Stage `teacher`: a bidirectional video transformer by flow matching."""

import itertools

import torch
from torch import Tensor

from data.batches import LatentBatch
from models.flow import add_noise, sampling_sigmas, shift_sigma
from train.kinds import TeacherKind, TeacherParams
from train.losses import flow_matching_loss
from train.randomness import sample_noise, sample_uniform
from train.stage import Stage


class Teacher(TeacherKind, Stage):
    """Trains the network `teacher`; no loss is taken in clean frames."""

    params: TeacherParams

    def sigma(self, seeds: Tensor, num_frames: int) -> Tensor:
        """Noise level of every frame.  [B, F]."""
        params, size = self.params, self.frames_per_block
        num_blocks = num_frames // size
        levels = shift_sigma(sample_uniform((1 + num_blocks,), seeds, "sigma"), params.shift)
        kind = sample_uniform((1,), seeds, "kind")
        has_prefix = kind < params.clean_prefix
        by_block = ~has_prefix & (kind < params.clean_prefix + params.block_noise)
        length = sample_uniform((1,), seeds, "prefix") * num_blocks
        in_prefix = torch.arange(num_blocks) < length.floor()
        is_clean = sample_uniform((num_blocks,), seeds, "clean") < 0.5
        is_clean[:, -1] = False  # a video without any noise would have no loss
        sigma = torch.where(by_block, levels[:, 1:], levels[:, :1])
        sigma = sigma.masked_fill(has_prefix & in_prefix | by_block & is_clean, 0)
        return sigma.repeat_interleave(size, dim=1)

    def loss(self, batch: LatentBatch) -> Tensor:
        """Flow matching."""
        x0, seeds = batch.latents, batch.seeds
        noise = sample_noise(x0.shape[1:], seeds, "teacher noise", device=x0.device)
        sigma = self.sigma(seeds, x0.shape[1]).to(x0.device)
        kept = sample_uniform((1, 1), seeds, "teacher text") >= self.params.text_dropout
        text = batch.text * kept.to(x0.device)
        velocity = self.engine("teacher")(add_noise(x0, noise, sigma), sigma, text)
        return flow_matching_loss(velocity, x0, noise, sigma > 0)

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """One flow-matching step."""
        return self.optimise("teacher", self.loss, self.micro_batches(batch))

    @torch.no_grad()
    def preview(self, batch: LatentBatch) -> Tensor:
        """Videos denoised from noise under the batch's captions.  [B, F, C, H, W]."""
        teacher = self.engine("teacher")
        latents = sample_noise(
            batch.latents.shape[1:], batch.seeds, "preview", device=batch.latents.device
        )
        sigmas = sampling_sigmas(self.params.preview_steps, self.params.shift)
        for current, following in itertools.pairwise(sigmas):
            sigma = latents.new_full(latents.shape[:2], current)
            latents = latents + (following - current) * teacher(latents, sigma, batch.text)
        return latents
