"""Stage `distill`: distribution matching on the student's own rollouts (Self-Forcing).

The student generates with the cache in the loop, under random eviction; teacher and critic judge
the whole window, and the difference of their estimates is the student's gradient.

Source: Self-Forcing, arXiv:2506.08009; DMD2, arXiv:2405.14867.
"""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from configs.checks import require, require_above_zero, require_blocks, require_range
from configs.schema import StageConfig
from data.datamodule import LatentBatch
from models.flow import add_noise, sampling_sigmas, shift_sigma, velocity_to_x0
from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import NoiseSource, Sampler, denoise_block, make_cache, refresh
from train.losses import (
    distribution_matching_direction,
    distribution_matching_loss,
    flow_matching_loss,
    guided,
)
from train.randomness import derive_seeds, sample_noise, sample_uniform, step_choice, step_integer
from train.stage import Stage


@dataclass
class DistributionMatchingParams:
    """Settings that `distill` and `streaming` share.

    Attributes:
        student_steps: Network passes per block of the few-step student.
        student_shift: Shift of their noise levels.
        score_shift: Shift of the noise levels at which teacher and critic judge.
        score_range: Lowest and highest of those noise levels; draws beyond an end are moved to it.
        clean_context: Let teacher and critic see the frames that do not count without noise; for
            a teacher that was trained with clean prefixes.
        guidance_scale: Of the teacher's estimate, which is led away from `text.negative`: s in
            unconditional + s * (conditional - unconditional); 1 = off.
        student_every: The student is updated every so many steps, the critic in every step.
        sink_frames: Frames never evicted during rollouts.
    """

    student_steps: int = 2
    student_shift: float = 5.0
    score_shift: float = 3.0
    score_range: list[float] = field(default_factory=lambda: [0.02, 0.98])
    clean_context: bool = False
    guidance_scale: float = 1.0
    student_every: int = 5
    sink_frames: int = 1


@dataclass
class DistillParams(DistributionMatchingParams):
    """Settings of the stage, besides those it shares with `streaming`.

    Attributes:
        prefix_frames: True frames that a rollout continues; one is drawn per step.
        budgets: Tokens per layer during rollouts, under random eviction; one is drawn per step.
    """

    prefix_frames: list[int] = field(default_factory=lambda: [24])
    budgets: list[int] = field(default_factory=lambda: [128])


class DistributionMatching(Stage):
    """What `distill` and `streaming` share: student and critic steps on a window of latents."""

    params: DistributionMatchingParams
    takes_lora = True
    frozen_sources: ClassVar = {"teacher": (("teacher", "transformer"),)}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """What both rollout stages need of their settings."""
        super().check(config, params, key=key, block=block)
        require_range(f"{key}.params.student_steps", params.student_steps, 1, 1000)
        require_range(f"{key}.params.student_every", params.student_every, 1, config.steps)
        for name in ("student_shift", "score_shift"):
            require_above_zero(f"{key}.params.{name}", getattr(params, name))
        require(
            len(params.score_range) == 2,
            f"{key}.params.score_range must be [lowest, highest], found {params.score_range}",
        )
        low, high = params.score_range
        require_range(f"{key}.params.score_range", low, 0, high)
        require_range(f"{key}.params.score_range", high, low, 1)

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


class Distill(DistributionMatching):
    """Trains `student` and `critic` on short rollouts that continue true frames."""

    params: DistillParams
    params_type = DistillParams
    network_sources: ClassVar = {
        "student": (("student", "transformer"),),
        "critic": (("critic", "critic"), ("critic", "transformer"), ("teacher", "transformer")),
    }
    export_role = "student"
    exported: ClassVar = {"transformer": "student", "critic": "critic"}

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """A rollout must have frames to generate behind its prefix."""
        super().check(config, params, key=key, block=block)
        for name in ("prefix_frames", "budgets"):
            require(
                len(getattr(params, name)) > 0,
                f"{key}.params.{name} must list at least one number, found none",
            )
        require_blocks(f"{key}.params.prefix_frames", params.prefix_frames, block, least=0)
        for frames in params.prefix_frames:
            require_range(f"{key}.params.prefix_frames", frames, 0, config.frames - block)

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
