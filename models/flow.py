"""Rectified flow: noise levels, conversions between velocity and clean latents, sampling schedules.

One convention everywhere: latents at noise level sigma are (1 - sigma) * x0 + sigma * noise, the
network predicts the velocity noise - x0, and sigma runs from 0 (clean) to 1 (pure noise).

Source: Esser et al. 2024, arXiv:2403.03206, section 3; the shift as used by Wan2.1.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def shift_sigma(uniform: Tensor, shift: float) -> Tensor:
    """Noise level of a uniform time: shift * u / (1 + (shift - 1) * u); shift > 1 favours noise."""
    return shift * uniform / (1 + (shift - 1) * uniform)


def sampling_sigmas(num_steps: int, shift: float) -> list[float]:
    """Noise levels visited by a sampler, from 1 down to 0.

    Args:
        num_steps: Network evaluations per block, at least 1.
        shift: See `shift_sigma`.

    Returns:
        num_steps + 1 values; the first is 1, the last is 0.

    Raises:
        ValueError: If `num_steps` is below 1.
    """
    if num_steps < 1:
        raise ValueError(f"the number of sampling steps must be at least 1, got {num_steps}")
    uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float64)
    return shift_sigma(uniform, shift).tolist()


def shift_of(sigmas: Sequence[float]) -> float | None:
    """The shift with which `sampling_sigmas` gives these levels.

    None if there is none, as for levels chosen by hand, or if a single step leaves it open.
    """
    num_steps = len(sigmas) - 1
    if num_steps < 2:
        return None
    uniform, sigma = 1 - 1 / num_steps, sigmas[1]
    shift = sigma * (1 - uniform) / (uniform * (1 - sigma))
    wanted = sampling_sigmas(num_steps, shift)
    is_same = all(
        math.isclose(one, other, abs_tol=1e-6) for one, other in zip(sigmas, wanted, strict=True)
    )
    return round(shift, 6) if is_same else None


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Latents at a noise level.

    Args:
        x0: Clean latents.  [B, F, C, H, W]
        noise: Standard normal, same shape.
        sigma: Noise level of each frame.  [B, F]
    """
    sigma = _per_frame(sigma, x0)
    return (1 - sigma) * x0 + sigma * noise


def velocity_to_x0(velocity: Tensor, latents: Tensor, sigma: Tensor) -> Tensor:
    """Clean latents implied by a velocity: latents - sigma * velocity, computed in float32.

    Args:
        velocity: Estimate of noise - x0.  [B, F, C, H, W]
        latents: (1 - sigma) * x0 + sigma * noise.  [B, F, C, H, W]
        sigma: Noise level of each frame.  [B, F]
    """
    sigma = _per_frame(sigma, latents).float()
    return (latents.float() - sigma * velocity.float()).to(latents.dtype)


def _per_frame(sigma: Tensor, latents: Tensor) -> Tensor:
    if sigma.shape != latents.shape[:2]:
        raise ValueError(
            f"sigma must hold one noise level per frame, shape {tuple(latents.shape[:2])}, "
            f"got {tuple(sigma.shape)}; expand a per-video sigma with sigma[:, None].expand(B, F)"
        )
    return sigma[:, :, None, None, None]
