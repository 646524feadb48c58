"""Salience targets that a teacher was asked for once, kept in shards beside the clips.

What is stored of a clip follows from the teacher, the clip and the settings in `TargetSource`
alone: its window and its noise are its own for ever. The batch it is read in, the stage's seed and
the epoch change nothing.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load, save
from torch import Tensor
from tqdm import tqdm

from data.batches import LatentBatch, Sample, read_sample, require_frames
from data.files import json_sha256
from data.shard_writer import ShardSetWriter
from data.shards import BadShard, ShardSet

STORED = "shards"
"""What `targets` in the params of a stage says if it reads stored targets."""
VERSION = 1
"""Part of the source hash: raise it whenever the targets change for the same source."""
MEMBER = "targets.safetensors"


@dataclass(frozen=True)
class TargetSource:
    """All that stored targets follow from; targets of another source are refused.

    Attributes:
        clips: Hash of the shards of the clips.
        teacher: Hash of the teacher's export.
        sigma: Noise level at which the teacher is asked.
        frames: Latent frames of a clip that it is shown.
        block_len: Tokens of a block.
        precision: In which it computes, `fp32` or `bf16`.
    """

    clips: str
    teacher: str
    sigma: float
    frames: int
    block_len: int
    precision: str


def target_seed(key: str, sigma: float) -> int:
    """Seed of the noise that the teacher sees of a clip, in [0, 2^63)."""
    return _draw("noise", key, float(sigma))


def target_window(sample: Sample, frames: int) -> Sample:
    """A clip, cut to the `frames` frames that the teacher is shown of it."""
    return sample.window(_draw("window", sample.key) % sample.num_windows(frames), frames)


def _draw(*tags: str | float) -> int:
    """A number in [0, 2^63) of its own for every combination of tags."""
    return int.from_bytes(hashlib.sha256(repr(tags).encode()).digest()[:8], "little") >> 1


def write_targets(
    latents: ShardSet,
    out: Path,
    *,
    source: TargetSource,
    ask: Callable[[LatentBatch], Tensor],
    samples_per_shard: int = 64,
    progress: bool = True,
) -> None:
    """Ask a teacher about every clip and store what it says.

    A sample of the result has the key of its clip and the members `targets.safetensors`
    (`targets`, float16 [L, S, 3], NaN where undefined) and `json` with `start`, the pixel frame
    that the first latent shows, and `seed`, of the noise. Float16 rounds a probability to 11 bits,
    those below 6e-5 to multiples of 6e-8. The manifest's properties are the source. Clips are
    asked about one by one, so that no batch takes part in a target. An interrupted call goes on
    after its last whole shard; a complete one is left alone.

    Args:
        latents: What `encode` wrote.
        out: Folder of the result.
        source: What the targets follow from.
        ask: Batch of one clip to its targets.  [L, 1, S, 3]
        samples_per_shard: Clips per shard.
        progress: Whether to show a progress bar.

    Raises:
        UserError: If `latents` is damaged, a clip is too short, or `out` holds other files.
    """
    require_frames(latents, source.frames)
    writer = ShardSetWriter(
        out,
        samples_per_shard=samples_per_shard,
        source_hash=json_sha256([VERSION, asdict(source), samples_per_shard]),
        properties=asdict(source),
    )
    if writer.is_complete:
        return
    todo = range(writer.completed, len(latents))
    with writer:
        for index in tqdm(todo, desc="targets", unit="clip", disable=not progress):
            sample = target_window(read_sample(latents, index), source.frames)
            seed = target_seed(sample.key, source.sigma)
            batch = LatentBatch(
                latents=sample.latents[None],
                text=sample.text[None],
                keys=[sample.key],
                seeds=torch.tensor([seed]),
                meta=[sample.meta],
            )
            targets = ask(batch)[:, 0].half().cpu()  # [L, S, 3]
            members = {
                MEMBER: save({"targets": targets.contiguous()}),
                "json": json.dumps({"start": sample.meta["start"], "seed": seed}).encode(),
            }
            caption = latents.entry(index).caption
            writer.write(sample.key, members, caption=caption, frames=source.frames)


class TargetSet:
    """Stored targets of a set of clips; may be used from forked worker processes."""

    def __init__(self, root: Path, source: TargetSource) -> None:
        """Open the shards and compare what they were made from.

        Args:
            root: Folder that `write_targets` wrote.
            source: What the targets must follow from.

        Raises:
            BadShard: If the set is missing or damaged, or was made from something else.
        """
        self.source = source
        self.shards = ShardSet(root)
        found = self.shards.properties
        wrong = [
            f"{name} {found.get(name)!r} in place of {value!r}"
            for name, value in asdict(source).items()
            if found.get(name) != value
        ]
        if wrong:
            raise BadShard(
                f"{root} must hold targets made from what the stage trains on, found "
                f"{', '.join(wrong)}; delete the folder and run the plan, which writes it again"
            )

    def window(self, sample: Sample) -> Sample:
        """A clip, cut to the frames that its targets are about."""
        return target_window(sample, self.source.frames)

    def read(self, index: int) -> Tensor:
        """Targets of clip number `index` of the set of clips.

        Returns:
            float32, NaN where undefined.  [L, S, 3]

        Raises:
            BadSample: If the stored bytes are damaged.
        """
        return load(self.shards.read(index)[MEMBER])["targets"].float()
