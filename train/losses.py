"""Losses of all stages: pure functions of tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor


def flow_matching_loss(
    velocity: Tensor, x0: Tensor, noise: Tensor, mask: Tensor | None = None
) -> Tensor:
    """Mean squared error to the velocity noise - x0, in float32.

    Args:
        velocity: Prediction.  [B, F, C, H, W]
        x0: Clean latents.  [B, F, C, H, W]
        noise: [B, F, C, H, W]
        mask: Frames that count, at least one; all if not given.  [F] or [B, F]
    """
    error = (velocity.float() - (noise - x0).float()).square().mean(dim=(2, 3, 4))  # [B, F]
    return error.mean() if mask is None else error[mask.expand_as(error)].mean()


def guided(conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Tensor:
    """Classifier-free guidance: unconditional + scale * (conditional - unconditional); 1 = off."""
    return unconditional + guidance_scale * (conditional - unconditional)


def distribution_matching_direction(x0: Tensor, real: Tensor, fake: Tensor, mask: Tensor) -> Tensor:
    """Where distribution matching pushes the student's samples, normalised per sample.

    (fake - real) / mean |x0 - real|, the mean over the frames that count. The difference of two
    clean estimates is, up to a factor of the noise level, the difference of the scores of the
    student's and the teacher's distributions; dividing by the teacher's error makes all noise
    levels weigh alike.

    Args:
        x0: The student's samples.  [B, F, C, H, W]
        real: The teacher's clean estimate from noised samples.  [B, F, C, H, W]
        fake: The critic's.  [B, F, C, H, W]
        mask: Frames that count.  [F]

    Returns:
        Descent direction with its sign reversed (a gradient).  [B, F, C, H, W]

    Source: DMD2, arXiv:2405.14867, equation 2 and the reference normalisation of DMD.
    """
    scale = (x0[:, mask] - real[:, mask]).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    return (fake - real) / scale.clamp(min=1e-6)


def distribution_matching_loss(x0: Tensor, direction: Tensor, mask: Tensor) -> Tensor:
    """A loss whose gradient with respect to x0 is direction / (number of counted values).

    Args:
        x0: The student's samples with gradient.  [B, F, C, H, W]
        direction: From `distribution_matching_direction`.  [B, F, C, H, W]
        mask: Frames that count.  [F]
    """
    x0, direction = x0[:, mask].float(), direction[:, mask].float()
    return 0.5 * F.mse_loss(x0, (x0 - direction).detach())


def salience_regression_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over the defined (not NaN) targets.

    Args:
        predicted: [..., 3]
        target: Standardised, NaN where undefined.  [..., 3]
    """
    defined = ~target.isnan()
    return F.mse_loss(predicted[defined], target[defined])


def salience_ranking_loss(predicted: Tensor, target: Tensor, *, shift: int) -> Tensor:
    """Pairwise logistic loss: of two tokens, the one with the higher target should score higher.

    Pairs are (token, token `shift` places later, wrapped), weighted by the difference of their
    targets, so that order among equals costs nothing.

    Args:
        predicted: [B, S, 3]
        target: Standardised, NaN where undefined.  [B, S, 3]
        shift: Distance of the pairs in tokens, drawn anew every step.
    """
    gap = target - target.roll(shift, dims=1)
    margin = (predicted - predicted.roll(shift, dims=1)) * gap.sign()
    defined = ~gap.isnan()
    weight = gap[defined].abs()
    losses = F.softplus(-margin[defined]) * weight
    return losses.sum() / weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
