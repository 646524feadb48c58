"""Stage `causal`: the teacher's weights become a block-causal student, by teacher forcing."""

import torch
from torch import Tensor

from data.batches import LatentBatch
from models.attention import QueryGroup, group_teacher_forcing, teacher_forcing_spans
from models.flow import add_noise, sampling_sigmas, shift_sigma
from train.kinds import CausalKind, CausalParams
from train.losses import flow_matching_loss
from train.randomness import sample_noise, sample_uniform
from train.stage import Stage


def random_visibility(
    seeds: Tensor, *, num_tokens: int, block_len: int, sink_tokens: int, max_recent_blocks: int
) -> Tensor:
    """Which earlier tokens each query may still read: a stand-in for any eviction policy.

    Per sample: a keep probability of 1.2 u, u uniform (full cache in every sixth sample), for
    tokens older than a random number of blocks; sink tokens always stay.

    Args:
        seeds: [B]
        num_tokens: S
        block_len: Tokens of a block.
        sink_tokens: First tokens that always stay.
        max_recent_blocks: Upper end of the random number of whole blocks.

    Returns:
        bool, query by key.  [B, S, S]
    """
    share = 1.2 * sample_uniform((1,), seeds, "keep share")
    keep = sample_uniform((num_tokens,), seeds, "keep") < share
    keep |= torch.arange(num_tokens) < sink_tokens
    drawn = sample_uniform((1, 1), seeds, "recent") * max_recent_blocks
    block = torch.arange(num_tokens) // block_len
    age = block[:, None] - block[None, :]
    return (age <= drawn.floor() + 1) | keep[:, None, :]


class Causal(CausalKind, Stage):
    """Trains the network `student` on [clean | noisy] pairs of whole videos.

    The clean half is not detached: the loss of a noisy block reaches the keys and values that the
    clean tokens write, which is where a memory is learnt.
    """

    params: CausalParams

    def loss(self, batch: LatentBatch) -> Tensor:
        """Flow matching in the noisy half."""
        x0, seeds, params = batch.latents, batch.seeds, self.params
        size, device = self.frames_per_block, batch.latents.device
        num_frames = x0.shape[1]
        noise = sample_noise(x0.shape[1:], seeds, "causal noise", device=device)
        uniform = sample_uniform((num_frames // size,), seeds, "causal sigma", device=device)
        sigma = shift_sigma(uniform, params.shift).repeat_interleave(size, dim=1)
        level = sample_uniform((1, 1, 1, 1), seeds, "context level", device=device)
        dirt = sample_noise(x0.shape[1:], seeds, "context noise", device=device)
        clean = x0 + params.context_noise * level * dirt
        velocity = self.engine("student")(
            torch.cat([clean, add_noise(x0, noise, sigma)], dim=1),
            torch.cat([torch.zeros_like(sigma), sigma], dim=1),
            batch.text,
            frames=torch.arange(num_frames, device=device).repeat(2),
            mask=self.mask(seeds, num_frames, device),
            wanted=num_frames,
        )
        return flow_matching_loss(velocity, x0, noise)

    def update(self, batch: LatentBatch, step: int) -> dict[str, Tensor | float]:
        """One teacher-forcing step."""
        return self.optimise("student", self.loss, self.micro_batches(batch))

    def mask(self, seeds: Tensor, num_frames: int, device: torch.device) -> list[QueryGroup]:
        """Who reads whom in [clean | noisy], under random eviction if configured."""
        num_tokens = num_frames * self.frame_seq_len
        if self.params.evict:
            visible = random_visibility(
                seeds,
                num_tokens=num_tokens,
                block_len=self.block_len,
                sink_tokens=self.params.sink_frames * self.frame_seq_len,
                max_recent_blocks=self.params.max_recent_blocks,
            )
        else:
            visible = torch.ones(1, num_tokens, num_tokens, dtype=torch.bool)
        spans = teacher_forcing_spans(num_frames // self.frames_per_block, self.block_len)
        return group_teacher_forcing(visible.to(device), self.block_len, spans)

    def sampler_sigmas(self) -> tuple[list[float], bool]:
        """Euler steps along the velocity."""
        return sampling_sigmas(self.params.sample_steps, self.params.sample_shift), False
