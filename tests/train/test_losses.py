"""Losses in closed form, and distribution matching on a distribution known exactly."""

import pytest
import torch
from torch import nn

from models.flow import add_noise, sampling_sigmas, shift_sigma, velocity_to_x0
from train.losses import (
    distribution_matching_direction,
    distribution_matching_loss,
    flow_matching_loss,
    guided,
    salience_ranking_loss,
    salience_regression_loss,
)


def test_gradient_of_distribution_matching_is_the_stated_direction_in_counted_frames():
    torch.manual_seed(0)
    x0 = torch.randn(2, 4, 3, 2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, 4, 3, 2, 2).unbind(0)
    mask = torch.tensor([False, True, True, False])
    direction = distribution_matching_direction(x0.detach(), real, fake, mask)
    distribution_matching_loss(x0, direction, mask).backward()
    scale = (x0 - real)[:, 1:3].abs().mean(dim=(1, 2, 3, 4))
    expected = (fake - real) / scale[:, None, None, None, None] / x0[:, 1:3].numel()
    torch.testing.assert_close(x0.grad[:, 1:3], expected[:, 1:3])
    assert (x0.grad[:, [0, 3]] == 0).all()


def test_guidance_scale_one_is_off_and_the_convention_is_the_standard_one():
    conditional, unconditional = torch.tensor(3.0), torch.tensor(1.0)
    assert guided(conditional, unconditional, 1.0) == 3
    assert guided(conditional, unconditional, 4.0) == 1 + 4 * 2  # "3.0" of Self-Forcing is this 4


def test_flow_matching_counts_masked_frames_only():
    velocity, x0, noise = (
        torch.zeros(1, 2, 1, 1, 1),
        torch.zeros(1, 2, 1, 1, 1),
        torch.ones(1, 2, 1, 1, 1),
    )
    noise[:, 1] = 3
    assert flow_matching_loss(velocity, x0, noise) == 5
    assert flow_matching_loss(velocity, x0, noise, torch.tensor([True, False])) == 1


def test_salience_losses_leave_undefined_targets_out():
    target = torch.tensor([[[1.0, 2.0, torch.nan], [0.0, torch.nan, torch.nan]]])
    predicted = torch.zeros(1, 2, 3, requires_grad=True)
    assert salience_regression_loss(predicted, target).item() == pytest.approx((1 + 4 + 0) / 3)
    salience_ranking_loss(predicted, target, shift=1).backward()
    assert predicted.grad[0, 0, 0] < 0 < predicted.grad[0, 1, 0]
    assert (predicted.grad[..., 1:] == 0).all()


def test_schedule_values():
    assert sampling_sigmas(4, 5.0) == pytest.approx([1, 0.9375, 5 / 6, 0.625, 0])
    assert sampling_sigmas(1, 8.0) == [1.0, 0.0]
    torch.manual_seed(0)
    x0, noise, sigma = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2), torch.rand(2, 3)
    noisy = add_noise(x0, noise, sigma)
    torch.testing.assert_close(velocity_to_x0(noise - x0, noisy, sigma), x0)
    with pytest.raises(ValueError, match="one noise level per frame"):
        add_noise(x0, noise, sigma[:, :1])
    with pytest.raises(ValueError, match="at least 1"):
        sampling_sigmas(0, 5.0)


class Small(nn.Module):
    """An MLP on single numbers that look like latents.  [B, 1, 1, 1, 1]"""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1)
        )

    def forward(self, *columns: torch.Tensor) -> torch.Tensor:
        return self.layers(torch.stack([c.flatten() for c in columns], dim=1)).view(-1, 1, 1, 1, 1)


MODES, SPREAD = torch.tensor([-1.0, 2.0]), 0.3


def exact_x0(noisy: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Posterior mean of x0 under equal weights of N(-1, 0.3^2) and N(2, 0.3^2)."""
    scale = 1 - sigma[..., None, None, None]
    variance = scale.square() * SPREAD**2 + sigma[..., None, None, None].square()
    weight = -0.5 * (noisy[..., None] - scale[..., None] * MODES).square() / variance[..., None]
    gain = (scale * SPREAD**2 / variance)[..., None]
    means = MODES + gain * (noisy[..., None] - scale[..., None] * MODES)
    return (weight.softmax(-1) * means).sum(-1)


def test_distribution_matching_reaches_the_moments_of_two_gaussians():
    torch.manual_seed(0)
    student, critic = Small(1), Small(2)
    optimizers = [
        torch.optim.AdamW(student.parameters(), lr=1e-3, betas=(0.0, 0.99), weight_decay=0),
        torch.optim.AdamW(critic.parameters(), lr=3e-3, betas=(0.0, 0.99), weight_decay=0),
    ]
    mask = torch.ones(1, dtype=torch.bool)

    def critic_x0(noisy, sigma):
        return velocity_to_x0(critic(noisy, sigma), noisy, sigma)

    for step in range(1500):
        optimizers[0].param_groups[0]["lr"] = 1e-3 * (1 - step / 1500)
        x0 = student(torch.randn(256, 1, 1, 1, 1))
        sigma = shift_sigma(torch.rand(256, 1), 1.0).clamp(0.05, 0.95)
        if step % 3 == 0:
            noisy = add_noise(x0.detach(), torch.randn_like(x0), sigma)
            with torch.no_grad():
                real, fake = exact_x0(noisy, sigma), critic_x0(noisy, sigma)
            direction = distribution_matching_direction(x0.detach(), real, fake, mask)
            optimizers[0].zero_grad()
            distribution_matching_loss(x0, direction, mask).backward()
            optimizers[0].step()
        noise = torch.randn_like(x0)
        velocity = critic(add_noise(x0.detach(), noise, sigma), sigma)
        optimizers[1].zero_grad()
        flow_matching_loss(velocity, x0.detach(), noise).backward()
        optimizers[1].step()
    with torch.no_grad():
        samples = student(torch.randn(20_000, 1, 1, 1, 1)).flatten()
    # Target: mean 0.5, standard deviation sqrt(1.5^2 + 0.3^2) = 1.53, half of the mass per mode.
    assert samples.mean() == pytest.approx(0.5, abs=0.2)
    assert samples.std() == pytest.approx(1.53, abs=0.15)
    assert (samples > 0.5).float().mean() == pytest.approx(0.5, abs=0.1)
