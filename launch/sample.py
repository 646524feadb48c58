"""`python -m launch sample`: a video of any length from a trained student, written as it grows."""

import argparse
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import OmegaConf
from torch import Tensor
from tqdm import tqdm

from configs.errors import UserError
from data.video import VideoWriter, read_chunks, to_pixels, to_values
from launch.student import Student, load_student
from models.kv_cache import KVCache
from models.kv_policies import POLICIES, build_policy
from models.kv_spec import EVICTED
from models.kv_storage import STORAGES
from models.rollout import NoiseSource, denoise_block, recache, refresh

SWITCHES = ("recache", "flush", "cut")
CUT_FRAMES = 24
"""How much later a cut shows the first block of a new scene: far, but within a training clip."""


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
    parser.add_argument("--policy", default="salience", help=", ".join(sorted(POLICIES)))
    parser.add_argument(
        "--param",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="parameter of the policy, e.g. age_weight=0.1 or weights=[1,1,1]",
    )
    parser.add_argument("--budget", type=int, required=True, help="tokens kept per layer")
    parser.add_argument("--sink-frames", type=int, default=1)
    parser.add_argument("--recent-frames", type=int, default=2)
    parser.add_argument("--time", default="relative", choices=("absolute", "relative"))
    parser.add_argument("--precision", default="model", help=f"of the cache: {', '.join(STORAGES)}")
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
    parser.add_argument("--shift", type=float, default=5.0, help="with --steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--wan",
        type=Path,
        metavar="DIR",
        help="diffusers folder of VAE and text encoder, if not where they were in training",
    )
    parser.add_argument("--scale", type=int, default=1, help="draw a pixel as N x N pixels")
    parser.add_argument("--out", type=Path, required=True, help="an .mp4 file")


@torch.no_grad()
def sample(arguments: argparse.Namespace) -> None:
    """Generate one video and write it block by block; memory does not grow with its length.

    Raises:
        UserError: If the checkpoint, a flag, the prefix or the output folder does not fit.
    """
    _check_counts(arguments)
    student = _load(arguments)
    student.network.to(arguments.device)
    if student.head is not None:
        student.head.to(arguments.device)
    prompts, codec = _prompts(arguments, student), student.codec
    cache, noise = _start(arguments, student)
    prefix = _read_prefix(arguments, student)
    num_frames = -(-arguments.frames // student.frames_per_block) * student.frames_per_block
    began = time.perf_counter()
    total = student.codec_config.pixel_frames(num_frames)
    blocks = _blocks(
        student,
        cache,
        noise=noise,
        prompts=prompts,
        prefix=prefix,
        num_frames=num_frames,
        at_switch=arguments.at_switch,
    )
    writer = VideoWriter(arguments.out, student.fps, student.size, scale=arguments.scale)
    with writer, tqdm(total=total, unit="frame", file=sys.stderr) as bar:
        for frames in codec.decode_chunks(block[0] for block in blocks):
            writer.write(to_pixels(frames))
            bar.update(len(frames))
    seconds = time.perf_counter() - began
    sys.stdout.write(
        f"{arguments.out}: {total} frames, {total / seconds:.1f} FPS, "
        f"{cache.num_tokens} tokens per layer cached, {cache.num_bytes} bytes\n"
    )


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


def _start(arguments: argparse.Namespace, student: Student) -> tuple[KVCache, NoiseSource]:
    params: dict[str, Any] = {}
    for item in arguments.param:
        if "=" not in item:
            raise UserError(f"--param must be KEY=VALUE, got {item!r}")
        try:
            params.update(OmegaConf.from_dotlist([item]))
        except yaml.YAMLError as error:
            raise UserError(f"--param must be KEY=VALUE with a YAML value, got {item!r}") from error
    seeds = torch.tensor([arguments.seed], device=arguments.device)
    try:
        if arguments.steps is not None:
            student.sampler = student.with_steps(arguments.steps, shift=arguments.shift)
        spec = student.cache_spec(
            budget_tokens=arguments.budget,
            sink_frames=arguments.sink_frames,
            recent_frames=arguments.recent_frames,
            time=arguments.time,
            max_lag=student.export.manifest["config"]["frames"] - 1,
            precision=arguments.precision,
            evicted=arguments.evicted,
            evicted_tokens=arguments.evicted_tokens,
            preallocate=True,
            max_frames=arguments.frames + student.frames_per_block,
        )
        policy = build_policy(arguments.policy, params)
        cache = student.new_cache(policy, seeds, spec=spec)
    except ValueError as error:
        raise UserError(str(error)) from error
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
    frames = range(0, count * student.every, student.every)
    pixels = read_chunks(arguments.prefix, frames=frames, size=student.size)
    latents = torch.cat(list(student.codec.encode_chunks(map(to_values, pixels))))
    return latents[None].to(arguments.device)


def _blocks(
    student: Student,
    cache: KVCache,
    *,
    noise: NoiseSource,
    prompts: list[tuple[int, Tensor]],
    prefix: Tensor | None,
    num_frames: int,
    at_switch: str,
) -> Iterator[Tensor]:
    """Blocks of one video; `at_switch` says what happens where the prompt changes."""
    size = student.frames_per_block
    known = iter(()) if prefix is None else iter(prefix.split(size, dim=1))
    window = student.export.manifest["config"]["frames"] // 2 // size
    history: deque[Tensor] = deque(maxlen=max(1, window))
    sink: list[Tensor] = []
    pending = deque(prompts)
    text = pending.popleft()[1]
    for start in range(0, num_frames, size):
        changed = False
        while pending and pending[0][0] <= start:
            text, changed = pending.popleft()[1], True
        if changed and at_switch == "recache":
            recache(
                student.network,
                text,
                torch.cat(list(history), dim=1),
                cache=cache,
                sink=torch.cat(sink, dim=1),
            )
        elif changed:
            cache.flush(cache.spec.protected_frames)
            if at_switch == "cut":
                cache.cut(CUT_FRAMES)
        block = next(known, None)
        if block is None:
            block = denoise_block(
                student.network,
                text,
                cache=cache,
                noise=noise,
                shape=(size, *student.latent_shape),
                sampler=student.sampler,
            )
        refresh(student.network, text, block, cache=cache)
        history.append(block)
        if start < max(cache.spec.sink_frames, 1):
            sink.append(block)
        yield block
