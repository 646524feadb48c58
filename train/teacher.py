"""Stage `teacher`: a bidirectional video transformer by flow matching."""

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from configs.checks import require_range
from configs.schema import StageConfig
from data.datamodule import LatentBatch
from models.flow import add_noise, sampling_sigmas, shift_sigma
from train.losses import flow_matching_loss
from train.randomness import sample_noise, sample_uniform
from train.stage import Stage


@dataclass
class TeacherParams:
    """Settings of the stage.

    Attributes:
        shift: Of the noise levels drawn, see `models.flow.shift_sigma`.
        clean_prefix: Share of samples whose first blocks, half of them on average, are clean; the
            rest of such a video, and all of every other, has one noise level. Clean frames are
            what teaches a small teacher to look things up far away, and a teacher that knows them
            can judge a continuation (`clean_context` in `train.distill`).
        text_dropout: Share of samples whose caption is zeroed, so that guidance has an
            unconditional estimate.
        preview_steps: Sampler steps of the videos shown during training.
    """

    shift: float = 3.0
    clean_prefix: float = 0.0
    text_dropout: float = 0.1
    preview_steps: int = 16


class Teacher(Stage):
    """Trains the network `teacher`; no loss is taken in clean frames."""

    params: TeacherParams
    params_type = TeacherParams
    network_sources: ClassVar = {"teacher": ()}
    export_role = "teacher"
    exported: ClassVar = {"transformer": "teacher"}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """Shares must be shares."""
        super().check(config, params, key=key, block=block)
        for name in ("clean_prefix", "text_dropout"):
            require_range(f"{key}.params.{name}", getattr(params, name), 0, 1)
        require_range(f"{key}.params.preview_steps", params.preview_steps, 1, 1000)

    def sigma(self, seeds: Tensor, num_frames: int) -> Tensor:
        """Noise level of every frame.  [B, F]."""
        size, num_blocks = self.frames_per_block, num_frames // self.frames_per_block
        level = shift_sigma(sample_uniform((1,), seeds, "teacher sigma"), self.params.shift)
        length = (sample_uniform((1,), seeds, "prefix") * num_blocks).floor() * size
        has_prefix = sample_uniform((1,), seeds, "has prefix") < self.params.clean_prefix
        is_clean = has_prefix & (torch.arange(num_frames) < length)
        return level.expand(-1, num_frames).masked_fill(is_clean, 0)

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
