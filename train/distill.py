"""Stage `distill`: distribution matching on the student's own rollouts (Self-Forcing).

The student generates with the cache in the loop, under random eviction; teacher and critic judge
the whole window, and the difference of their estimates is the student's gradient.

Source: Self-Forcing, arXiv:2506.08009; DMD2, arXiv:2405.14867.
"""

import torch
from torch import Tensor

from data.batches import LatentBatch
from models.flow import add_noise, sampling_sigmas, shift_sigma, velocity_to_x0
from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import NoiseSource, Sampler, denoise_block, make_cache, refresh
from train.kinds import (
    DistillKind,
    DistillParams,
    DistributionMatchingKind,
    DistributionMatchingParams,
)
from train.losses import (
    distribution_matching_direction,
    distribution_matching_loss,
    flow_matching_loss,
    guided,
)
from train.randomness import derive_seeds, sample_noise, sample_uniform, step_choice, step_integer
from train.stage import Stage


class DistributionMatching(DistributionMatchingKind, Stage):
    """What `distill` and `streaming` share: student and critic steps on a window of latents."""

    params: DistributionMatchingParams

    def sampler(self) -> Sampler:
        """The few-step student's noise levels."""
        params = self.params
        return Sampler(sampling_sigmas(params.student_steps, params.student_shift), renoise=True)

    def sampler_sigmas(self) -> tuple[list[float], bool]:
        """For the export."""
        return self.sampler().sigmas, True

    def trains_student(self, step: int) -> bool:
        """Whether this step updates the student as well as the critic."""
        return step % self.params.student_every == 0

    def exit_step(self, step: int) -> int:
        """Denoising step at which the rollouts of a training step end; ranks share the draw."""
        return step_integer(self.seed, step, "exit step", high=self.params.student_steps)

    def step_kind(self, step: int) -> str:
        """Which networks are trained, and how far every block is denoised."""
        return f"student {self.trains_student(step)}, exit {self.exit_step(step)}"

    def noised(
        self, window: Tensor, seeds: Tensor, mask: Tensor, tag: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A window as teacher and critic see it: noisy latents, their sigma, the noise.

        One noise level per sample; with `clean_context` the frames that do not count keep level 0.
        """
        low, high = self.params.score_range
        uniform = sample_uniform((1,), seeds, tag, "sigma", device=window.device)
        sigma = shift_sigma(uniform, self.params.score_shift).clamp(low, high)
        sigma = sigma.expand(window.shape[:2])
        if self.params.clean_context:
            sigma = sigma * mask
        noise = sample_noise(window.shape[1:], seeds, tag, "noise", device=window.device)
        return add_noise(window, noise, sigma), sigma, noise

    def student_loss(self, window: Tensor, text: Tensor, seeds: Tensor, mask: Tensor) -> Tensor:
        """Its gradient moves the student's samples to where teacher and critic agree.

        Args:
            window: Rollout with gradient in the frames that count.  [B, F, C, H, W]
            text: [B, T, text_dim]
            seeds: Of the noise.  [B]
            mask: Frames that count.  [F]
        """
        with torch.no_grad():
            noisy, sigma, _ = self.noised(window.detach(), seeds, mask, "student score")
            velocity = self.frozen["teacher"](noisy, sigma, text)
            if self.params.guidance_scale != 1:
                assert self.negative_text is not None, "who builds a guided stage gives it"
                away = self.negative_text.expand_as(text)
                without = self.frozen["teacher"](noisy, sigma, away)
                velocity = guided(velocity, without, self.params.guidance_scale)
            real = velocity_to_x0(velocity, noisy, sigma)
            fake = velocity_to_x0(self.engine("critic")(noisy, sigma, text), noisy, sigma)
            direction = distribution_matching_direction(window.detach(), real, fake, mask)
        return distribution_matching_loss(window, direction, mask)

    def critic_loss(self, window: Tensor, text: Tensor, seeds: Tensor, mask: Tensor) -> Tensor:
        """Flow matching on the student's samples; arguments as in `student_loss`."""
        noisy, sigma, noise = self.noised(window, seeds, mask, "critic score")
        velocity = self.engine("critic")(noisy, sigma, text)
        return flow_matching_loss(velocity, window, noise, mask)

    def roll(
        self,
        cache: KVCache,
        text: Tensor,
        noise: NoiseSource,
        *,
        num_frames: int,
        latent_shape: tuple[int, ...],
        step: int,
        grad: bool,
    ) -> Tensor:
        """Generate the next frames into the cache.

        Every block runs to the same randomly drawn step, with gradient through that step's pass
        only; ranks share the draw.

        Returns:
            [B, num_frames, C, H, W]
        """
        sampler, student = self.sampler(), self.engine("student")
        last = self.exit_step(step)
        blocks = []
        for _ in range(num_frames // self.frames_per_block):
            with torch.set_grad_enabled(grad):
                block = denoise_block(
                    student,
                    text,
                    cache=cache,
                    noise=noise,
                    shape=(self.frames_per_block, *latent_shape),
                    sampler=sampler,
                    grad_step=last,
                )
            refresh(student, text, block, cache=cache)
            blocks.append(block)
        return torch.cat(blocks, dim=1)


class Distill(DistillKind, DistributionMatching):
    """Trains `student` and `critic` on short rollouts that continue true frames."""

    params: DistillParams

    def drawn_sizes(self, step: int) -> tuple[int, int]:
        """True frames and budget of this step's rollouts; ranks share the draws."""
        prefix_frames = step_choice(self.params.prefix_frames, self.seed, step, "prefix")
        return prefix_frames, step_choice(self.params.budgets, self.seed, step, "budget")

    def step_kind(self, step: int) -> str:
        """With the sizes of the rollouts, on which their arithmetic depends."""
        return f"{super().step_kind(step)}, prefix and budget {self.drawn_sizes(step)}"

    def rollout(self, batch: LatentBatch, step: int, *, grad: bool) -> tuple[Tensor, Tensor]:
        """A window of true prefix and generated frames, and the mask of the generated ones."""
        params = self.params
        num_frames = batch.latents.shape[1]
        prefix_frames, budget = self.drawn_sizes(step)
        seeds = derive_seeds(batch.seeds, "rollout").to(batch.latents.device)
        cache = make_cache(
            self.engine("student").module,
            spec=CacheSpec(
                budget_tokens=budget,
                tokens_per_frame=self.frame_seq_len,
                frames_per_block=self.frames_per_block,
                sink_frames=params.sink_frames,
                recent_frames=self.frames_per_block,
            ),
            policy=build_policy("random", {"redraw": False}),
            seeds=seeds,
        )
        prefix = batch.latents[:, :prefix_frames]
        for block in prefix.split(self.frames_per_block, dim=1) if prefix_frames else ():
            refresh(self.engine("student"), batch.text, block, cache=cache)
        generated = self.roll(
            cache,
            batch.text,
            NoiseSource(seeds),
            num_frames=num_frames - prefix_frames,
            latent_shape=tuple(batch.latents.shape[2:]),
            step=step,
            grad=grad,
        )
        window = torch.cat([prefix, generated], dim=1)
        return window, torch.arange(window.shape[1], device=window.device) >= prefix_frames

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """A critic step on fresh rollouts, preceded by a student step on the same ones when due."""
        parts = self.micro_batches(batch)
        windows: list[tuple[Tensor, Tensor]] = []
        metrics: dict[str, Tensor | float] = {}

        def student(part: LatentBatch) -> Tensor:
            with self.spans("rollout"):
                window, mask = self.rollout(part, step, grad=True)
            windows.append((window.detach(), mask))
            return self.student_loss(window, part.text, part.seeds, mask)

        def critic(part: tuple[LatentBatch, tuple[Tensor, Tensor]]) -> Tensor:
            batch, (window, mask) = part
            return self.critic_loss(window, batch.text, batch.seeds, mask)

        if self.trains_student(step):
            metrics |= self.optimise("student", student, parts)
        else:
            with self.spans("rollout"):
                windows = [self.rollout(part, step, grad=False) for part in parts]
        return metrics | self.optimise("critic", critic, list(zip(parts, windows, strict=True)))

    @torch.no_grad()
    def preview(self, batch: LatentBatch) -> Tensor:
        """Rollouts of the current student.  [B, F, C, H, W]."""
        return self.rollout(batch, 0, grad=False)[0]
