"""Stage `teacher`: a bidirectional video transformer by flow matching."""

from dataclasses import dataclass

import torch
from torch import Tensor

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
        text_dropout: Share of samples whose caption is zeroed, so that guidance has an
            unconditional estimate.
        preview_steps: Sampler steps of the videos shown during training.
    """

    shift: float = 3.0
    text_dropout: float = 0.1
    preview_steps: int = 16


class Teacher(Stage):
    """Trains the network `teacher`; one noise level per video."""

    params: TeacherParams
    params_type = TeacherParams
    export_role = "teacher"
    exported = {"transformer": "teacher"}

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """One flow-matching step."""
        x0, seeds = batch.latents, batch.seeds
        noise = sample_noise(x0.shape[1:], seeds, "teacher noise")
        uniform = sample_uniform((1,), seeds, "teacher sigma")
        sigma = shift_sigma(uniform, self.params.shift).expand(x0.shape[:2])
        kept = sample_uniform((1, 1), seeds, "teacher text") >= self.params.text_dropout
        velocity = self.engine("teacher")(add_noise(x0, noise, sigma), sigma, batch.text * kept)
        loss = flow_matching_loss(velocity, x0, noise)
        return {"loss": loss.detach(), **self.optimise("teacher", loss)}

    @torch.no_grad()
    def preview(self, batch: LatentBatch) -> Tensor:
        """Videos denoised from noise under the batch's captions.  [B, F, C, H, W]"""
        teacher = self.engine("teacher")
        latents = sample_noise(batch.latents.shape[1:], batch.seeds, "preview")
        sigmas = sampling_sigmas(self.params.preview_steps, self.params.shift)
        for current, following in zip(sigmas[:-1], sigmas[1:], strict=True):
            sigma = latents.new_full(latents.shape[:2], current)
            latents = latents + (following - current) * teacher(latents, sigma, batch.text)
        return latents
