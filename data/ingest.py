"""From videos with captions to raw shards, and from raw shards to latents."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tqdm import tqdm

from configs.errors import UserError
from configs.schema import CodecConfig, TextConfig
from data.codec import build_codec, codec_identity
from data.files import json_sha256
from data.frame_rate import frames_at
from data.shard_writer import ShardSetWriter
from data.shards import BadSample, ShardSet
from data.text import build_text, text_identity
from data.video import BadVideo, VideoInfo, check_video, read_chunks, to_values

LIST_NAME = "captions.jsonl"
VERSION = 1
"""Part of the source hash: raise it whenever the samples change for the same input."""
REPORTED = 20
"""Bad videos that one error names at most."""


@dataclass(frozen=True)
class VideoRow:
    """One line of a list of videos."""

    path: Path
    caption: str
    extra: dict[str, Any]
    """The line's other keys, kept with the sample."""


def read_list(source: Path) -> list[VideoRow]:
    """Read a list of videos.

    Args:
        source: A file with one JSON object {"file", "caption", ...} per line, or a folder that
            holds such a file, captions.jsonl. Files are relative to the list.

    Raises:
        UserError: If the list is missing, empty or malformed.
    """
    path = source / LIST_NAME if source.is_dir() else source
    if not path.is_file():
        raise UserError(
            f'{path} must be a list of videos, lines of {{"file": ..., "caption": ...}}, found no '
            f"such file; write one, or correct source.path"
        )
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = json.loads(line)
            file, caption = values.pop("file"), values.pop("caption")
            if not isinstance(file, str) or not isinstance(caption, str):
                raise TypeError("file and caption must be text")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f'{path}, line {number}, must be {{"file": ..., "caption": ...}}, found '
                f"{line[:80]!r} ({error}); correct the line"
            ) from error
        rows.append(VideoRow(path.parent / file, caption, values))
    if not rows:
        raise UserError(f"{path} must list at least one video, found none; add a line")
    return rows


def ingest(
    source: Path,
    out: Path,
    *,
    samples_per_shard: int = 64,
    min_frames: int = 1,
    rate: float | None = None,
    progress: bool = True,
) -> None:
    """Check videos strictly and copy them, with their captions, into shards.

    Nothing is written before every video has been decoded without an error. An interrupted call
    goes on after its last whole shard; a complete one is left alone.

    Args:
        source: See `read_list`.
        out: Folder of the raw shards. A sample has two members: the video file under its own
            extension, and `json` with `caption`, `file`, `frames`, `fps`, `height`, `width` and
            the other keys of its line.
        samples_per_shard: Videos per shard.
        min_frames: Fewest frames of a video, at `rate`.
        rate: At which `encode` will read the videos, see there; only checked here.
        progress: Whether to show progress bars.

    Raises:
        UserError: If the list is bad, or `out` holds other files.
        BadVideo: Naming all videos that cannot be used.
    """
    rows = read_list(source)
    writer = ShardSetWriter(
        out,
        samples_per_shard=samples_per_shard,
        source_hash=_videos_hash(rows, samples_per_shard, min_frames),
    )
    if writer.is_complete:
        return
    first = writer.completed
    infos = _check_all(rows[first:], min_frames, rate, progress)
    todo = list(zip(range(first, len(rows)), rows[first:], infos, strict=True))
    with writer:
        for number, row, info in tqdm(todo, desc="ingest", unit="video", disable=not progress):
            stem = re.sub(r"[^A-Za-z0-9_-]+", "-", row.path.stem)
            meta = {**row.extra, "caption": row.caption, "file": row.path.name, **asdict(info)}
            members = {
                row.path.suffix.lower().lstrip("."): row.path.read_bytes(),
                "json": json.dumps(meta).encode(),
            }
            key = f"{number:06d}-{stem}"
            writer.write(key, members, caption=row.caption, frames=info.frames)


def _videos_hash(rows: list[VideoRow], samples_per_shard: int, min_frames: int) -> str:
    """Names a list of videos by names, sizes and times of change, without reading them."""
    missing = [str(row.path) for row in rows if not row.path.is_file()]
    if missing:
        raise _bad_videos([f"{path}: no such file" for path in missing])
    stats = [row.path.stat() for row in rows]
    videos = [
        [row.path.name, row.caption, row.extra, stat.st_size, stat.st_mtime_ns]
        for row, stat in zip(rows, stats, strict=True)
    ]
    return json_sha256([VERSION, samples_per_shard, min_frames, videos])


def _check_all(
    rows: list[VideoRow], min_frames: int, rate: float | None, progress: bool
) -> list[VideoInfo]:
    """`check_video` of every row; one error for all that fail."""
    infos, problems = [], []
    for row in tqdm(rows, desc="check", unit="video", disable=not progress):
        try:
            info = check_video(row.path)
            count = len(_frames(info.frames, info.fps, rate, str(row.path)))
        except BadVideo as error:
            problems.append(str(error))
            continue
        infos.append(info)
        if count < min_frames:
            at_rate = "" if count == info.frames else f", of which {count} at {rate:g} per second"
            problems.append(
                f"{row.path} must have at least {min_frames} frames for one clip, found "
                f"{info.frames}{at_rate}; leave it out or lower source.frames"
            )
    if problems:
        raise _bad_videos(problems)
    return infos


def _frames(count: int, fps: float, rate: float | None, name: str) -> Sequence[int]:
    """Numbers of the frames of a video that are used: all, or those at `rate`."""
    return range(count) if rate is None else frames_at(rate, own=fps, count=count, name=name)


def _bad_videos(problems: list[str]) -> BadVideo:
    """One error for many videos."""
    more = [f"and {len(problems) - REPORTED} more"] if len(problems) > REPORTED else []
    count = "1 video" if len(problems) == 1 else f"{len(problems)} videos"
    lines = "\n  ".join([*problems[:REPORTED], *more])
    return BadVideo(f"{count} cannot be used:\n  {lines}")


def encode(
    raw: Path,
    out: Path,
    *,
    codec: CodecConfig,
    text: TextConfig,
    size: tuple[int, int],
    frames: int,
    stride: int = 0,
    every: int = 1,
    rate: float | None = None,
    samples_per_shard: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> None:
    """Decode raw shards, cut the videos into clips, and write latents and text vectors.

    A sample of the result has the members `latents.safetensors` (`latents`, float32 [F, C, H, W]),
    `text.safetensors` (`text`, float32 [words, dim], without padding) and `json`: that of the
    video, and `clip_start` (frame that the clip starts at, counted at `rate`), `every` and
    `time_stride`. The manifest counts latent frames; its properties are `codec`, `text` (see
    `codec_identity`) and `latents` ([C, H, W]). Clips and captions are encoded one by one, so that
    a result depends on nothing beside it. An interrupted call goes on after its last whole shard; a
    complete one is left alone.

    Args:
        raw: What `ingest` wrote.
        out: Folder of the result.
        codec: Pixels to latents.
        text: Captions to vectors.
        size: Height and width in pixels to which videos are scaled and cropped.
        frames: Pixel frames of a clip.
        stride: Frames of the video between the starts of two clips; 0 = one clip per video.
        every: Take every n-th frame of the video.
        rate: Frames per second at which videos are read, see `data.frame_rate.frames_at`; `stride`
            and `every` count these. None = all frames that there are.
        samples_per_shard: Clips per shard.
        device: Where networks compute.
        progress: Whether to show progress bars.

    Raises:
        UserError: If `raw` is damaged, codec or text encoder cannot be built, a caption is too
            long, or `out` holds other files.
    """
    source = ShardSet(raw)
    if any(length % codec.stride for length in size):
        raise UserError(
            f"source.size must be multiples of codec.stride = {codec.stride}, found "
            f"{list(size)}; change one of them"
        )
    properties = {
        "codec": codec_identity(codec),
        "text": text_identity(text),
        "latents": [codec.channels, *(length // codec.stride for length in size)],
    }
    settings = [VERSION, source.hash, properties, list(size), frames, stride, every]
    settings += [] if rate is None else [rate]
    writer = ShardSetWriter(
        out,
        samples_per_shard=samples_per_shard,
        source_hash=json_sha256([*settings, samples_per_shard]),
        properties=properties,
    )
    if writer.is_complete:
        return
    latent_frames = codec.latent_frames(frames)
    image_codec, text_encoder = build_codec(codec, device), build_text(text, device)
    for index in tqdm(range(len(source)), desc="captions", disable=not progress):
        text_encoder.count(source.entry(index).caption)  # one that is too long is found here
    clips = _cut(source, frames=frames, stride=stride, every=every, rate=rate)
    with writer:
        todo = clips[writer.completed :]
        for index, start in tqdm(todo, desc="encode", unit="clip", disable=not progress):
            video, meta = _read_raw(source, index)
            key, caption = source.entry(index).key, meta["caption"]
            numbers = _frames(meta["frames"], meta["fps"], rate, f"{raw}::{key}")
            wanted = numbers[start : start + frames * every : every]
            pixels = read_chunks(video, frames=wanted, size=size, name=f"{raw}::{key}")
            latents = torch.cat(list(image_codec.encode_chunks(map(to_values, pixels))))
            vectors, words = text_encoder(caption)
            meta |= {"clip_start": start, "every": every, "time_stride": codec.time_stride}
            content = {
                "latents.safetensors": save({"latents": latents.contiguous()}),
                "text.safetensors": save({"text": vectors[:words].contiguous()}),
                "json": json.dumps(meta).encode(),
            }
            writer.write(f"{key}-{start:06d}", content, caption=caption, frames=latent_frames)


def _cut(
    source: ShardSet, *, frames: int, stride: int, every: int, rate: float | None
) -> list[tuple[int, int]]:
    """Sample index and first frame of every clip; what is left at a video's end is not used."""
    span = (frames - 1) * every + 1
    clips = []
    for index in range(len(source)):
        entry = source.entry(index)
        name, count = f"{source.root}::{entry.key}", entry.frames
        if rate is not None:
            meta = json.loads(source.read(index, "json")["json"])
            count = len(_frames(count, meta["fps"], rate, name))
        if count < span:
            raise BadSample(
                f"{name} must have {span} frames for one clip, found "
                f"{count}; lower source.frames or source.every, or leave the video out"
            )
        last = count - span
        clips += [(index, start) for start in (range(0, last + 1, stride) if stride else [0])]
    return clips


def _read_raw(source: ShardSet, index: int) -> tuple[bytes, dict[str, Any]]:
    """The video file and the `json` of a raw sample."""
    members = source.read(index)
    meta: dict[str, Any] = json.loads(members.pop("json"))
    (video,) = members.values()
    return video, meta
