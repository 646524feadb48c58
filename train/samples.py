"""Videos of what a stage does, written while it trains."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from numpy.typing import NDArray
from torch import Tensor

from data.video import VideoWriter
from train.randomness import generators_of
from train.ranks import rank
from train.stage import Stage

SAMPLE_HEIGHT = 192
"""Pixels to which the height of small sample videos is brought, or a little less."""


class SampleVideos(L.Callback):
    """Writes what the stage can show as mp4 files, every so many steps.

    Where the stage holds a salience head, a second file beside each, `...-salience.mp4`, shows the
    picture on the left and on the right, in colours, what the head says of its tokens.

    Args:
        folder: Of the videos.
        every: Steps between them.
        decode: Latents [F, C, H, W] to frames in [-1, 1].  [P, 3, height, width]
        fps: Frames per second.
        count: Videos each time, at most.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        decode: Callable[[Tensor], Tensor],
        fps: float,
        count: int = 2,
    ) -> None:
        self.folder = folder
        self.every = every
        self.decode = decode
        self.fps = fps
        self.count = count

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Make and write the videos of this step, without touching the global generators."""
        assert isinstance(pl_module, Stage)
        if pl_module.completed % self.every:
            return
        own = generators_of(pl_module.device)
        with torch.random.fork_rng(devices=own), pl_module.autocast():
            latents = pl_module.preview(batch)
            salience = pl_module.preview_salience(batch)
        if latents is None or rank() != 0:
            return
        written = self.write(f"step-{pl_module.completed:08d}", latents, salience)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                for key, paths in written.items():
                    logger.log_video(
                        key,
                        [str(path) for path in paths],
                        pl_module.completed,
                        caption=[path.name for path in paths],
                    )

    def write(self, name: str, latents: Tensor, salience: Tensor | None) -> dict[str, list[Path]]:
        """Write the first videos of a preview.

        Args:
            name: How the files' names begin.
            latents: [B, F, C, H, W]
            salience: Of every token, if there is a head.  [B, F, rows, columns]

        Returns:
            Files by kind: `samples`, and `salience` if given.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        written: dict[str, list[Path]] = {}
        for number, clip in enumerate(latents[: self.count]):
            pixels = to_pixels(self.decode(clip.float().cpu()))
            shown = {"samples": (f"{name}-{number}.mp4", pixels)}
            if salience is not None:
                panels = beside_salience(pixels, salience[number].float().cpu().numpy())
                shown["salience"] = (f"{name}-{number}-salience.mp4", panels)
            for kind, (file, frames) in shown.items():
                write_video(self.folder / file, frames, fps=self.fps)
                written.setdefault(kind, []).append(self.folder / file)
        return written


def to_pixels(frames: Tensor) -> NDArray[np.uint8]:
    """Frames in [-1, 1], [P, 3, height, width], as bytes.  [P, height, width, 3]."""
    scaled = ((frames.clamp(-1, 1) + 1) * 127.5).round()
    return scaled.to(torch.uint8).permute(0, 2, 3, 1).numpy()


def beside_salience(pixels: NDArray[np.uint8], scores: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Each frame, and right of it the same in grey under the colours of its tokens' scores.

    Args:
        pixels: [P, height, width, 3]
        scores: Of the tokens of latent frames. The first shows the first frame alone, the others
            equally many each.  [F, rows, columns]

    Returns:
        [P, height, 2 width, 3]
    """
    from data.overlay import heat_overlay  # brings matplotlib, which takes half a second

    spread = np.linspace(0, len(scores) - 1, len(pixels))
    latent = np.ceil(spread.round(6)).astype(int)  # of each frame
    return np.concatenate([pixels, heat_overlay(pixels, scores[latent])], axis=2)


def write_video(path: Path, pixels: NDArray[np.uint8], *, fps: float) -> None:
    """Write frames as an mp4 file, small ones enlarged.  [P, height, width, 3]."""
    height, width = pixels.shape[1:3]
    scale = max(1, SAMPLE_HEIGHT // height)
    with VideoWriter(path, fps, (height, width), scale=scale) as writer:
        writer.write(pixels)
