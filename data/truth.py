"""Ground truth of the built-in world, and what a generated video can be measured against.

The world is a wheel of gondolas behind a wall with an opening two cells wide. Each gondola has an
identity (one of six colours, solid or checker), shows in the left cell for one frame, in the right
cell for the next, and is hidden for the rest of the revolution. Nothing else in the video tells
which identity comes next, so only a memory of the revolution before can.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError

ROWS, COLUMNS, CELL = 2, 4, 16
"""Cells of a frame, and the side of a cell in pixels; one cell becomes one latent token."""
DARK = -0.8
"""Value of an empty opening, in all three colours, on the scale [-1, 1]."""
LIT_THRESHOLD = 0.14
"""Mean distance from `DARK` above which a cell is lit; the faintest checker has 0.27."""
CRISP_LIMIT = 0.026
"""Mean squared distance to a clean picture up to which a cell is crisp: half of what the faintest
checker is off when its pattern is blurred away."""
COLOR_NAMES = ("red", "green", "blue", "yellow", "cyan", "magenta")
PALETTE = 0.8 * torch.tensor(
    [[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [-1, 1, 1], [1, -1, 1]],
    dtype=torch.float32,
)
NUM_CLASSES = 2 * len(COLOR_NAMES)
"""Identity classes, numbered 2 * colour + shape; shape 0 is solid, 1 is checker."""
FRAMES_SHOWN = 2
"""Frames for which a gondola shows in each revolution: one in each cell of the opening."""


@dataclass(frozen=True)
class Truth:
    """All that a measurement needs to know of a clip; it holds for frames beyond the clip, too."""

    colors: tuple[int, ...]
    """Index into `COLOR_NAMES` of each gondola, in order of appearance."""
    shapes: tuple[int, ...]
    """0 = solid, 1 = checker, of each gondola."""
    phase: int
    """Frames by which the wheel has turned at frame 0."""
    track_row: int
    opening_column: int
    """Left one of the two columns of the opening."""

    @property
    def period(self) -> int:
        """Frames of one revolution."""
        return FRAMES_SHOWN * len(self.colors)

    def to_json(self) -> str:
        """One line of JSON that `from_json` reads back."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | Mapping[str, Any]) -> "Truth":
        """Read what `to_json` wrote, as text or already parsed.

        Raises:
            UserError: If it is not the ground truth of a clip.
        """
        try:
            values = json.loads(text) if isinstance(text, str) else text
            return cls(
                colors=tuple(values["colors"]),
                shapes=tuple(values["shapes"]),
                phase=int(values["phase"]),
                track_row=int(values["track_row"]),
                opening_column=int(values["opening_column"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"ground truth must be JSON with colors, shapes, phase, track_row and "
                f"opening_column, found {str(text)[:80]!r} ({error}); render the world again"
            ) from error


@dataclass(frozen=True)
class FrameTruth:
    """The truth of single frames."""

    identity: Tensor
    """Class of the gondola that shows, 2 * colour + shape.  int64 [F]"""
    lit: Tensor
    """Row and column of the cell it shows in.  int64 [F, 2]"""
    dark: Tensor
    """Row and column of the empty cell of the opening.  int64 [F, 2]"""


def truth_at(truth: Truth, frames: Sequence[int] | Tensor) -> FrameTruth:
    """What frames number `frames` of the clip show; any number from 0 up is valid."""
    turned = torch.as_tensor(frames, dtype=torch.int64) + truth.phase  # [F]
    gondola = (turned // FRAMES_SHOWN) % len(truth.colors)
    side = turned % FRAMES_SHOWN
    classes = 2 * torch.tensor(truth.colors) + torch.tensor(truth.shapes)
    row = torch.full_like(side, truth.track_row)
    lit = torch.stack([row, truth.opening_column + side], dim=-1)  # [F, 2]
    dark = torch.stack([row, truth.opening_column + 1 - side], dim=-1)  # [F, 2]
    return FrameTruth(identity=classes[gondola], lit=lit, dark=dark)


def wall_columns(truth: Truth) -> tuple[int, int]:
    """The two columns of the track that show the wall."""
    return (truth.opening_column + 2) % COLUMNS, (truth.opening_column + 3) % COLUMNS


def checker_pattern() -> Tensor:
    """The checker's shape: +1 at two opposite corners of a cell, -1 at the others, [16, 16].

    It is the single cosine of lowest frequency in both directions, so that a codec that keeps the
    four lowest frequencies of each colour loses nothing of it.
    """
    wave = torch.cos(math.pi * (torch.arange(CELL) + 0.5) / CELL)
    return wave[:, None] * wave[None, :]


def templates() -> Tensor:
    """The noise-free cell of each identity class, values in [-1, 1], [12, 3, 16, 16]."""
    solid = PALETTE[:, :, None, None].expand(-1, -1, CELL, CELL)
    checker = (solid + DARK) / 2 + (solid - DARK) / 2 * checker_pattern()
    return torch.stack([solid, checker], dim=1).flatten(0, 1)


def split_cells(frames: Tensor) -> Tensor:
    """Frames [..., 3, 32, 64] as cells [..., row, column, 3, 16, 16]."""
    lead = frames.shape[:-3]
    cells = frames.reshape(*lead, 3, ROWS, CELL, COLUMNS, CELL)
    return cells.movedim((-4, -2, -5, -3, -1), (-5, -4, -3, -2, -1))


def nearest_class(cells: Tensor) -> tuple[Tensor, Tensor]:
    """The identity class whose template is nearest, and the mean squared distance to it.

    Args:
        cells: Cells of frames.  [..., 3, 16, 16]

    Returns:
        Class and distance of each cell, both [...].
    """
    distance = (cells.unsqueeze(-4) - templates().to(cells)).square().mean(dim=(-3, -2, -1))
    error, identity = distance.min(dim=-1)
    return identity, error


def is_lit(cells: Tensor) -> Tensor:
    """Whether a cell [..., 3, 16, 16] shows anything at all, bool [...]."""
    return (cells - DARK).abs().mean(dim=(-3, -2, -1)) > LIT_THRESHOLD


def measure(
    frames: Tensor,
    truth: Sequence[Truth],
    start: int,
    *,
    reference: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compare videos of the world with their truth, frame by frame.

    A value that is not defined for a frame is NaN: use `nanmean`.

    Args:
        frames: Videos, values in [-1, 1].  [B, F, 3, 32, 64]
        truth: The truth of each of the B videos.
        start: Number of the first frame, counted from the clip's frame 0.
        reference: True frames of the same clips, any number of them, to take the wall from.
            [B, R, 3, 32, 64]

    Returns:
        Tensors [B, F] by name. `identity`: class seen in the lit cell. `identity_correct`: it is
        the true one, 0 or 1. `position_correct`: the lit cell is lit and the other dark, 0 or 1.
        `pixel_error`: mean squared distance of the lit cell to the nearest template.
        `crisp`: the lit cell is a clean picture of some gondola, the right one or not, and the
        other cell is clean and empty, 0 or 1 (see `CRISP_LIMIT`). `checker_contrast`: strength of
        the checker pattern over its true strength, 1 = perfect, 0 = blurred away; only where the
        truth is a checker. `identity_repeated`: the class is the
        one seen a revolution before, from the second revolution in `frames` on.
        `background_error`: mean squared distance of the wall to the mean wall of `reference`;
        only with a reference.
    """
    if frames.dim() != 5 or len(truth) != len(frames):
        raise ValueError(
            f"frames must be [B, F, 3, 32, 64] with one truth per video, found "
            f"{tuple(frames.shape)} and {len(truth)} truths; pass both for the same videos"
        )
    rows = [
        _measure_one(split_cells(video.float()), one, start)
        for video, one in zip(frames, truth, strict=True)
    ]
    result = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    if reference is not None:
        result["background_error"] = torch.stack(
            [
                _wall_error(split_cells(video.float()), split_cells(true.float()), one)
                for video, true, one in zip(frames, reference, truth, strict=True)
            ]
        )
    return result


def _measure_one(cells: Tensor, truth: Truth, start: int) -> dict[str, Tensor]:
    """`measure` for the cells of one video, [F, 2, 4, 3, 16, 16]; values [F]."""
    number = torch.arange(len(cells))
    true = truth_at(truth, number + start)
    lit = cells[number, true.lit[:, 0], true.lit[:, 1]]  # [F, 3, 16, 16]
    dark = cells[number, true.dark[:, 0], true.dark[:, 1]]  # [F, 3, 16, 16]
    identity, pixel_error = nearest_class(lit)
    darkness_error = (dark - DARK).square().mean(dim=(1, 2, 3))
    strength = (PALETTE[true.identity // 2] - DARK)[:, :, None, None] / 2  # [F, 3, 1, 1]
    pattern = (strength * checker_pattern()).to(lit)  # [F, 3, 16, 16]
    contrast = (lit * pattern).sum(dim=(1, 2, 3)) / pattern.square().sum(dim=(1, 2, 3))
    return {
        "identity": identity,
        "identity_correct": (identity == true.identity.to(identity.device)).float(),
        "position_correct": (is_lit(lit) & ~is_lit(dark)).float(),
        "pixel_error": pixel_error,
        "crisp": ((pixel_error < CRISP_LIMIT) & (darkness_error < CRISP_LIMIT)).float(),
        "checker_contrast": contrast.where(true.identity.to(lit.device) % 2 == 1, torch.nan),
        "identity_repeated": _repeated(identity, truth.period),
    }


def _repeated(values: Tensor, period: int) -> Tensor:
    """1 where a value [F] equals the one `period` frames before, 0 where not, NaN at first."""
    result = torch.full(values.shape, torch.nan, device=values.device)
    result[period:] = (values[period:] == values[:-period]).float()
    return result


def _wall_error(cells: Tensor, reference: Tensor, truth: Truth) -> Tensor:
    """Mean squared distance [F] of the wall in `cells` to the mean wall of `reference` cells."""
    columns = list(wall_columns(truth))
    wall = reference[:, truth.track_row, columns].mean(dim=0)  # [2, 3, 16, 16]
    return (cells[:, truth.track_row, columns] - wall).square().mean(dim=(1, 2, 3, 4))


def measure_self_consistency(frames: Tensor, truth: Sequence[Truth]) -> Tensor:
    """Whether a video repeats itself with the wheel's period; needs the layout, not the identities.

    Meant for videos made without true frames at the start, whose identities nobody prescribed.

    Args:
        frames: Videos, values in [-1, 1].  [B, F, 3, 32, 64]
        truth: Only `track_row`, `opening_column` and the period are used.

    Returns:
        1 where exactly one cell of the opening is lit, and it and the class in it are those of one
        revolution before; 0 where not, so that an empty wheel is not consistent; NaN in the first
        revolution.  [B, F]
    """
    rows = []
    for video, one in zip(frames.float(), truth, strict=True):
        columns = [one.opening_column, one.opening_column + 1]
        opening = split_cells(video)[:, one.track_row, columns]  # [F, 2, 3, 16, 16]
        lit = is_lit(opening)  # [F, 2]
        side = lit.int().argmax(dim=1)  # [F]
        identity, _ = nearest_class(opening)  # [F, 2]
        seen = identity.gather(1, side[:, None])[:, 0] * 2 + side
        repeated = _repeated(seen, one.period)
        rows.append(torch.where(repeated.isnan(), repeated, repeated * (lit.sum(dim=1) == 1)))
    return torch.stack(rows)
