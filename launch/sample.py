"""`python -m launch sample`: a video of any length from a trained student, written as it grows."""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from data.files import write_atomically
from data.frame_rate import first_frames
from data.video import VideoWriter, read_chunks, to_pixels, to_values
from launch.sample_settings import SampleSettings, choose_settings
from launch.steps import say
from launch.student import PRECISIONS, Student, in_precision, load_student
from launch.video_blocks import SWITCHES, VideoBlocks
from models.kv_cache import KVCache
from models.kv_policies import POLICIES
from models.kv_spec import EVICTED
from models.kv_storage import STORAGES
from models.rollout import NoiseSource

_RECORDED = (
    *("frames", "seed", "device", "scale"),
    *("storage", "evicted", "evicted_tokens", "at_switch"),
)
"""Choices that are those of a video, as no export has a word on them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="stage folder or export")
    parser.add_argument("--prompt", required=True, help="caption of the video")
    parser.add_argument(
        "--prompt-at",
        nargs=2,
        action="append",
        default=[],
        metavar=("FRAME", "TEXT"),
        help="change the prompt at this latent frame (next block); may be repeated",
    )
    parser.add_argument("--prefix", type=Path, help="video whose frames are continued")
    parser.add_argument(
        "--prefix-frames", type=int, default=24, help="how many of its latent frames"
    )
    parser.add_argument("--frames", type=int, required=True, help="latent frames, prefix included")
    parser.add_argument(
        "--policy", help=f"the student's own by default; one of {', '.join(sorted(POLICIES))}"
    )
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of the policy, e.g. age_weight=0.1 or weights=[1,1,1]",
    )
    parser.add_argument(
        "--budget",
        type=int,
        help="tokens kept per layer; by default, like what follows, as the student was trained",
    )
    parser.add_argument("--sink-frames", type=int, help="first frames that are never evicted")
    parser.add_argument("--recent-frames", type=int, help="newest frames that are never evicted")
    parser.add_argument("--time", choices=("absolute", "relative"), help="how lags are shown")
    parser.add_argument("--max-lag", type=int, help="longest lag in frames that `relative` shows")
    parser.add_argument("--precision", choices=PRECISIONS, help="of the network and its cache")
    parser.add_argument(
        "--storage", default="model", help=f"of cached tokens: {', '.join(STORAGES)}"
    )
    parser.add_argument("--evicted", default="drop", choices=EVICTED, help="what happens to tokens")
    parser.add_argument("--evicted-tokens", type=int, default=0, help="that are still read")
    parser.add_argument(
        "--at-switch",
        default="recache",
        choices=SWITCHES,
        help="where the prompt changes: read the last frames again, or keep only sink and newest "
        "frames, with a cut also showing the next block far later",
    )
    parser.add_argument("--steps", type=int, help="denoising steps; the student's own by default")
    parser.add_argument(
        "--shift", type=float, help="of the noise levels of these steps; likewise, or else 5"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--wan",
        type=Path,
        metavar="DIR",
        help="diffusers folder of VAE and text encoder, if not where they were in training",
    )
    parser.add_argument("--scale", type=int, default=1, help="draw a pixel as N x N pixels")
    parser.add_argument(
        "--out", type=Path, required=True, help="an .mp4 file; what was used is said in OUT.json"
    )


@torch.no_grad()
def sample(arguments: argparse.Namespace) -> None:
    """Generate one video and write it block by block; memory does not grow with its length.

    Beside it comes a JSON file that says what it was made with.

    Raises:
        UserError: If the checkpoint, a flag, the prefix or the output folder does not fit.
    """
    _check_counts(arguments)
    student = _load(arguments)
    settings = choose_settings(arguments, student)
    prompts = _prompts(arguments, student)
    try:
        network = in_precision(student.network, settings.values["precision"])
        for module in filter(None, (student.network, student.head)):
            module.to(arguments.device)
        cache, noise = _start(arguments, student, settings)
    except ValueError as error:
        raise UserError(str(error)) from error
    video = VideoBlocks(student, network, settings.sampler, cache, noise, arguments.at_switch)
    prefix = _read_prefix(arguments, student)
    for line in settings.lines():
        say(line)
    num_frames = -(-arguments.frames // student.frames_per_block) * student.frames_per_block
    began, total = time.perf_counter(), student.codec_config.pixel_frames(num_frames)
    writer = VideoWriter(arguments.out, student.fps, student.size, scale=arguments.scale)
    with writer, tqdm(total=total, unit="frame", file=sys.stderr) as bar:
        blocks = video.make(prompts, prefix, num_frames=num_frames)
        for frames in student.codec.decode_chunks(block[0] for block in blocks):
            writer.write(to_pixels(frames))
            bar.update(len(frames))
    seconds = time.perf_counter() - began
    _write_record(arguments, student, settings)
    say(
        f"{arguments.out}: {total} frames, {total / seconds:.1f} FPS, "
        f"{cache.num_tokens} tokens per layer cached, {cache.num_bytes} bytes"
    )


def _write_record(
    arguments: argparse.Namespace, student: Student, settings: SampleSettings
) -> None:
    """Say beside the video what it was made with."""
    prefix = None
    if arguments.prefix is not None:
        prefix = {"file": str(arguments.prefix), "frames": arguments.prefix_frames}
    prompts = [(0, arguments.prompt), *arguments.prompt_at]
    record = {
        "checkpoint": str(student.export.folder),
        "export": student.export.hash,
        "prompts": [[int(frame), text] for frame, text in prompts],
        "prefix": prefix,
        "settings": settings.record(),
        "wan": None if arguments.wan is None else str(arguments.wan),
        **{key: getattr(arguments, key) for key in _RECORDED},
    }
    path = arguments.out.with_name(f"{arguments.out.name}.json")
    write_atomically(path, json.dumps(record, indent=1).encode())


def _load(arguments: argparse.Namespace) -> Student:
    """The student, with the codec and text encoder of the folder given, if one is."""
    student = load_student(arguments.checkpoint, arguments.device)
    if arguments.wan is not None:
        changed = [part for part in (student.codec_config, student.text_config) if part.path]
        if not changed:
            raise UserError(
                f"--wan needs a student whose codec or text encoder are networks, found codec.name="
                f"{student.codec_config.name} and text.name={student.text_config.name}; leave it "
                "out"
            )
        for part in changed:
            part.path = str(arguments.wan)
    return student


def _check_counts(arguments: argparse.Namespace) -> None:
    """Raise UserError if a number cannot be meant."""
    for name in ("frames", "scale", "prefix_frames"):
        value = getattr(arguments, name)
        if value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    if arguments.prefix is not None and arguments.prefix_frames >= arguments.frames:
        raise UserError(
            f"--frames must be above --prefix-frames {arguments.prefix_frames}, "
            f"got {arguments.frames}"
        )


def _prompts(arguments: argparse.Namespace, student: Student) -> list[tuple[int, Tensor]]:
    """(first frame, encoded prompt) in order of time; the first is for frame 0."""
    prompts, size = [(0, arguments.prompt)], student.frames_per_block
    for frame, text in arguments.prompt_at:
        if not frame.isdigit() or not 0 < int(frame) < arguments.frames:
            raise UserError(
                f"--prompt-at needs a frame between 1 and --frames {arguments.frames}, got {frame}"
            )
        if -(-int(frame) // size) * size >= -(-arguments.frames // size) * size:
            raise UserError(
                f"--prompt-at {frame} must leave a block of {size} frames to be made, the video "
                f"has {arguments.frames}; give an earlier frame"
            )
        prompts.append((int(frame), text))
    frames, texts = zip(*sorted(prompts, key=lambda prompt: prompt[0]), strict=True)
    encoded = [text.to(arguments.device) for text in student.encode_texts(texts)]
    return list(zip(frames, encoded, strict=True))


def _start(
    arguments: argparse.Namespace, student: Student, settings: SampleSettings
) -> tuple[KVCache, NoiseSource]:
    seeds, policy = torch.tensor([arguments.seed], device=arguments.device), settings.policy
    spec = student.cache_spec(
        **settings.geometry,
        precision=arguments.storage,
        evicted=arguments.evicted,
        evicted_tokens=arguments.evicted_tokens,
        preallocate=True,
        max_frames=arguments.frames + student.frames_per_block,
    )
    cache = student.new_cache(policy, seeds, spec=spec)
    if arguments.prompt_at and arguments.at_switch != "recache" and not policy.protects_sink:
        raise UserError(
            f"--at-switch {arguments.at_switch} keeps the sink, which policy {policy.name!r} does "
            "not protect; take --at-switch recache or another --policy"
        )
    return cache, NoiseSource(seeds)


def _read_prefix(arguments: argparse.Namespace, student: Student) -> Tensor | None:
    """Latents of the frames to continue.  [1, P, C, H, W]."""
    if arguments.prefix is None:
        return None
    if arguments.prefix_frames % student.frames_per_block or arguments.prefix_frames < 1:
        raise UserError(
            f"--prefix-frames must be whole blocks of {student.frames_per_block} frames, "
            f"got {arguments.prefix_frames}"
        )
    count = student.codec_config.pixel_frames(arguments.prefix_frames)
    path, every = arguments.prefix, student.every
    frames = first_frames(path, count, rate=student.fps * every, every=every)
    pixels = read_chunks(path, frames=frames, size=student.size)
    latents = torch.cat(list(student.codec.encode_chunks(map(to_values, pixels))))
    return latents[None].to(arguments.device)
