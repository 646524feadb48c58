"""What the teacher sees being read in a video: the targets of the `oracle` policy."""

from dataclasses import dataclass

import torch
from torch import Tensor

from launch.held_out import HeldOut
from models.salience_targets import mask_short_future
from models.transformer import VideoTransformer
from train.kinds import SalienceParams
from train.salience import salience_of

CLIPS_AT_ONCE = 8


@dataclass(frozen=True)
class Seer:
    """A teacher, and how its salience is asked for: as the head's stage asked.

    Attributes:
        teacher: Bidirectional, in evaluation mode.
        params: Of the stage that trained the head.
        frames: Longest video the teacher was trained on.
        frames_per_block: Of the student.
        hash: Of the teacher's export.
    """

    teacher: VideoTransformer
    params: SalienceParams
    frames: int
    frames_per_block: int
    hash: str

    @torch.inference_mode()
    def targets(self, latents: Tensor, clips: HeldOut) -> Tensor:
        """Salience of every token of some videos.

        A video that is longer than the teacher knows is read in windows that overlap by half;
        of the windows' targets of a token the largest counts, as the targets are maxima.

        Args:
            latents: Of the clips, as generated.  [N, F, C, H, W]
            clips: Captions and noise seeds.

        Returns:
            NaN where no window has a target.  [L, N, F * rows * columns, 3]
        """
        parts = [
            self._targets(latents[span], clips.text[span], clips.noise_seeds[span])
            for span in _spans(len(latents))
        ]
        return torch.cat(parts, dim=1)

    def _targets(self, latents: Tensor, text: Tensor, seeds: Tensor) -> Tensor:
        rows, columns = self.teacher.token_grid(latents)
        per_frame, num_frames = rows * columns, latents.shape[1]
        shape = (self.teacher.num_layers, len(latents), num_frames * per_frame, 3)
        found = latents.new_full(shape, torch.nan, dtype=torch.float32)
        for start in window_starts(num_frames, self.frames, self.frames_per_block):
            window = latents[:, start : start + self.frames]
            seen = self._targets_of_window(window, text, seeds, per_frame)
            span = slice(start * per_frame, start * per_frame + seen.shape[2])
            found[:, :, span] = torch.fmax(found[:, :, span], seen)
        return found

    def _targets_of_window(
        self, window: Tensor, text: Tensor, seeds: Tensor, per_frame: int
    ) -> Tensor:
        block_len = self.frames_per_block * per_frame
        found = salience_of(
            self.teacher,
            window,
            text,
            seeds=seeds.cpu(),
            sigma=self.params.sigma,
            block_len=block_len,
        )
        return mask_short_future(found, block_len, self.params.horizon)


def window_starts(num_frames: int, window: int, block: int) -> list[int]:
    """First frames of windows that overlap by half and end with the video, in whole blocks."""
    if num_frames <= window:
        return [0]
    step = max(block, window // 2 // block * block)
    return [*range(0, num_frames - window, step), num_frames - window]


def _spans(count: int) -> list[slice]:
    return [slice(start, start + CLIPS_AT_ONCE) for start in range(0, count, CLIPS_AT_ONCE)]
