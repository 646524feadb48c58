"""Benchmark `codec`: what pixels lose on their way to latents and back, and how long it takes."""

import argparse
import math
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.load import load_config
from configs.schema import RunConfig
from data.codec import Codec, build_codec, codec_identity
from data.frame_rate import first_frames
from data.ingest import VideoRow
from data.video import read_video, to_values
from launch import benchmark
from launch.source import list_videos
from launch.steps import say


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the config that names codec and videos."""
    parser.add_argument(
        "config",
        nargs="+",
        metavar="FILE|KEY=VALUE",
        help="YAML files and overrides; the first clip of each video of `source` is taken",
    )
    benchmark.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """Encode and decode one clip of every video, and write the record.

    It holds for every video the peak signal-to-noise ratio of what comes back, `psnr` in dB over
    all its pixels and colours; the same of all videos together, from their mean squared error;
    `pixel_values_per_latent_value`; and seconds per pixel frame, medians of the first video's.

    Raises:
        UserError: If an argument, the config or a video does not fit.
    """
    benchmark.check_arguments(arguments)
    config = load_config(arguments.config)
    if config.source.kind != "videos":
        raise UserError(
            f"bench codec needs films, source.kind=videos, found source.kind={config.source.kind}, "
            "which was made to lose nothing; take configs/clips.yaml or a list of your own"
        )
    torch.set_num_threads(arguments.threads)
    codec = build_codec(config.codec, arguments.device)
    rows = list_videos(config.source)
    clips = [read_clip(config, row).to(arguments.device) for row in rows]
    result = measure(codec, clips[0], arguments) | score(codec, rows, clips)
    source = {name: getattr(config.source, name) for name in ("size", "frames", "every", "fps")}
    benchmark.write_result(
        arguments, {"codec": codec_identity(config.codec)} | source | result, verb="codec"
    )


def read_clip(config: RunConfig, row: VideoRow) -> Tensor:
    """The first clip that `encode` would cut from a video.  [F, 3, H, W]."""
    source = config.source
    rate = source.fps * source.every
    frames = first_frames(row.path, source.frames, rate=rate, every=source.every)
    return to_values(read_video(row.path, frames=frames, size=source.size))


def score(codec: Codec, rows: list[VideoRow], clips: list[Tensor]) -> dict[str, Any]:
    """How far decoded clips are from the originals."""
    videos, errors = [], []
    for row, clip in zip(rows, clips, strict=True):
        latents = codec.encode(clip)
        errors.append(squared_error(clip, codec.decode(latents)))
        videos.append({"file": row.path.name, "psnr": psnr(errors[-1])})
        say(f"codec: {row.path.name}: PSNR {videos[-1]['psnr']:.2f} dB")
    together = psnr(sum(errors) / len(errors))
    ratio = clips[0].numel() / latents.numel()
    say(f"codec: all: PSNR {together:.2f} dB, {ratio:.1f} values of pixels per value of latents")
    return {"videos": videos, "psnr": together, "pixel_values_per_latent_value": ratio}


def squared_error(frames: Tensor, decoded: Tensor) -> float:
    """Mean squared error on the scale [0, 1]; what is decoded is clipped, as it is when shown."""
    return float(((decoded.clamp(-1, 1) - frames) / 2).double().square().mean())


def psnr(error: float) -> float:
    """Peak signal-to-noise ratio in dB of a mean squared error on the scale [0, 1]."""
    return -10 * math.log10(error) if error else math.inf


def measure(codec: Codec, clip: Tensor, arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per pixel frame, both ways."""
    latents = codec.encode(clip)
    seconds = benchmark.time_interleaved(
        {"encode": lambda: codec.encode(clip), "decode": lambda: codec.decode(latents)},
        repeats=arguments.repeats,
        device=arguments.device,
    )
    return {f"seconds_per_frame_{name}": value / len(clip) for name, value in seconds.items()}
