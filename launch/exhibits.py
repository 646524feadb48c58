"""What the report shows besides numbers: videos, what is kept, salience on frames."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save
from torch import Tensor

from data.files import write_atomically
from data.truth import truth_at
from data.video import VideoWriter, to_pixels
from launch.arena import Arena
from launch.baselines import score_baselines, token_norms
from launch.contest import Contestant, Job
from launch.held_out import HeldOut
from launch.pictures import stack_panels
from launch.rollouts import decode, measure_rollout, roll_out
from models.attention import block_causal_mask
from models.kv_cache import KVCache
from models.salience import PARTS, SalienceHead, head_scores
from models.transformer import VideoTransformer

SHOWN = ("full", "sink_window", "random", "salience")
"""Policies of the videos, below the truth."""
VIDEO_SCALE = 4
SALIENCE_FRAMES = 10


def write_videos(arena: Arena, jobs: Mapping[str, Job], folder: Path) -> None:
    """Videos of the first clips, all policies below each other, with what is right in each frame.

    Args:
        arena: Of the evaluation.
        jobs: Rollout of each shown policy, by its name, in the order of the panels.
        folder: Gets clip-0.mp4 and so on, then clips.json, and kept.safetensors beside it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    clips = _shown_clips(arena)
    num_frames = min(max(next(iter(jobs.values())).frames), clips.latents.shape[1])
    student = next(iter(arena.students.values()))
    panels = {"truth": decode(student, clips.latents.cpu()[:, :num_frames])}
    words = {"truth": ["1" * num_frames] * len(clips.groups)}
    kept = {}
    for name, job in jobs.items():
        panels[name], words[name], kept[name] = _panel(arena, job, clips, num_frames)
    content = {name: np.ascontiguousarray(share) for name, share in kept.items()}
    content |= {f"frames.{name}": to_pixels(panels[name][0]) for name in kept}
    write_atomically(folder.parent / "kept.safetensors", save(content))
    budget = next(iter(jobs.values())).budget_tokens
    described = []
    for index, truth in enumerate(clips.truth):
        name = f"clip-{index}.mp4"
        video = stack_panels([to_pixels(frames[index]) for frames in panels.values()])
        with VideoWriter(folder / name, student.fps, video.shape[1:3], scale=VIDEO_SCALE,
                         crf=20) as writer:  # fmt: skip
            writer.write(video)
        lit = truth_at(truth, range(num_frames)).lit.tolist()
        about = {"truth": "", "full": f"grows to {num_frames * student.frame_seq_len} tokens"}
        shown = [
            {"series": key, "about": about.get(key, f"{budget} tokens"), "correct": word[index]}
            for key, word in words.items()
        ]
        described.append({"file": name, "lit": lit, "panels": shown})
    facts = {
        "fps": student.fps,
        "frames": num_frames,
        "prefix_frames": arena.config.evaluate.prefix_frames,
        "period": clips.truth[0].period,
        "budget_tokens": budget,
        "grid": list(student.grid),
        "clips": described,
    }
    write_atomically(folder / "clips.json", json.dumps(facts).encode())


def _shown_clips(arena: Arena) -> HeldOut:
    """The first clips of the first seed."""
    count = min(arena.config.evaluate.videos, arena.config.evaluate.clips_per_seed)
    seed = arena.clips.groups[0]
    clips = arena.clips.first(count)
    return HeldOut(
        latents=clips.latents[:count],
        text=clips.text[:count],
        truth=clips.truth[:count],
        noise_seeds=clips.noise_seeds[:count],
        groups=[seed] * count,
    )


def _panel(
    arena: Arena, job: Job, clips: HeldOut, num_frames: int
) -> tuple[Tensor, list[str], NDArray[np.uint8]]:
    """Frames, a word of 0 and 1 per clip for what is right, and what the first clip kept."""
    student = arena.student_for(job)
    cache = arena.new_cache(student, job, clips)
    held: list[NDArray[np.uint8]] = []
    rollout = roll_out(
        student,
        clips,
        cache,
        num_frames=num_frames,
        prefix_frames=arena.config.evaluate.prefix_frames,
        on_block=lambda state: held.append(kept_share(state, num_frames, student.grid)),
    )
    correct = measure_rollout(student, clips, rollout)["identity_correct"]
    words = ["".join("01"[int(value)] for value in row) for row in correct.tolist()]
    return decode(student, rollout.latents), words, np.stack(held)


def kept_share(cache: KVCache, num_frames: int, grid: tuple[int, int]) -> NDArray[np.uint8]:
    """Share of layers that hold each token of the first video, 255 = all.

    Returns:
        [F, rows, columns], zero for frames to come
    """
    counts = np.zeros((num_frames, *grid))
    for tokens in cache.layers:
        if tokens is not None:
            frame, row, column = tokens.positions[0].cpu().numpy().T
            counts[frame, row, column] += 1
    return np.rint(255 * counts / len(cache.layers)).astype(np.uint8)


def shown_contestants(contestants: list[Contestant]) -> list[Contestant]:
    """The first form of each shown policy that takes part."""
    found: dict[str, Contestant] = {}
    for contestant in contestants:
        found.setdefault(contestant.name, contestant)
    return [found[name] for name in SHOWN if name in found]


@torch.inference_mode()
def examine_heads(arena: Arena, path: Path) -> dict[str, Any]:
    """Agreement of every head with its teacher, and the pictures of the first head.

    Stages whose teacher cannot be found through the plan of the run are left out.

    Args:
        arena: Of the evaluation.
        path: Gets frames and salience, as `launch.material.Material` describes.

    Returns:
        `spearman` and `recall_at_budget`: stage to part to a value per layer; `target_by_frame`:
        stage to part to the mean standardised target of each frame, None where no key of the frame
        has one; `baselines`: stage to what `launch.baselines.score_baselines` returns, on the same
        clips and targets; `budget_share`.
    """
    fields = ("spearman", "recall_at_budget", "target_by_frame", "baselines")
    result: dict[str, Any] = {field: {} for field in fields}
    pictures: dict[str, NDArray[Any]] = _clip_pictures(arena)
    for stage, seer in arena.seers.items():
        student, clips = arena.students[stage], arena.clips
        head, params = student.head, seer.params
        assert head is not None, "a salience stage exports a head"
        latents, text = clips.latents[:, : seer.frames], clips.text
        block_len = student.frames_per_block * student.frame_seq_len
        found = seer.targets(latents, clips)
        targets = [head.standardise(layer, target) for layer, target in enumerate(found)]
        with token_norms(student.network) as norms:
            predicted = _predictions(student.network, head, latents, text, block_len)
        scores = [
            head_scores(p, t, params.budget_share) for p, t in zip(predicted, targets, strict=True)
        ]
        result["baselines"][stage] = score_baselines(
            head, norms, targets, seeds=clips.noise_seeds, budget_share=params.budget_share
        )
        by_frame = _means_by_frame(targets, student.frame_seq_len)
        result["target_by_frame"][stage] = dict(zip(PARTS, by_frame, strict=True))
        for number, part in enumerate(PARTS):
            for name, field in (("spearman", "spearman"), ("recall_at_budget", "recall")):
                values = [getattr(layer[number], field) for layer in scores]
                result[name].setdefault(stage, {})[part] = values
        result["budget_share"] = params.budget_share
        if "target" not in pictures:
            layer = int(np.argmax(result["spearman"][stage]["later"]))
            pictures |= _salience_pictures(arena, predicted[layer], targets[layer], layer)
    write_atomically(path, save(pictures))
    return result if "budget_share" in result else {}


def _means_by_frame(targets: Sequence[Tensor], frame_seq_len: int) -> list[list[float | None]]:
    """Mean over layers, clips and places, of every part and frame; targets [N, S, 3] per layer."""
    frames = torch.stack(list(targets)).unflatten(2, (-1, frame_seq_len))  # [L, N, F, P, 3]
    means = frames.nanmean(dim=(0, 1, 3)).T.tolist()
    return [[None if math.isnan(mean) else mean for mean in part] for part in means]


def _clip_pictures(arena: Arena) -> dict[str, NDArray[Any]]:
    student = next(iter(arena.students.values()))
    return {
        "frames": to_pixels(decode(student, arena.clips.latents[0].cpu())),
        "phase": np.array([arena.clips.truth[0].phase]),
    }


def _salience_pictures(
    arena: Arena, predicted: Tensor, target: Tensor, layer: int
) -> dict[str, NDArray[Any]]:
    """A few frames from the middle of the first clip, with `later` of one layer.

    Args:
        arena: Of the evaluation.
        predicted: [N, S, 3]
        target: [N, S, 3]
        layer: Which one it is.
    """
    student = next(iter(arena.students.values()))
    length = student.export.manifest["config"]["frames"]
    span = slice(length // 4, min(length, length // 4 + SALIENCE_FRAMES))
    frames = decode(student, arena.clips.latents[0, span].cpu())
    later = {
        name: values[0, :, 0].unflatten(0, (-1, *student.grid))[span].float().cpu().numpy()
        for name, values in (("predicted", predicted), ("target", target))
    }
    return later | {"salience_frames": to_pixels(frames), "layer": np.array([layer])}


def _predictions(
    network: VideoTransformer, head: SalienceHead, latents: Tensor, text: Tensor, block_len: int
) -> list[Tensor]:
    """What the head says in a clean block-causal pass, per layer.  [N, S, 3]."""
    rows, columns = network.token_grid(latents)
    num_tokens = latents.shape[1] * rows * columns
    mask = block_causal_mask(num_tokens // block_len, block_len).to(latents.device)
    found: list[Tensor] = []
    network(
        latents,
        latents.new_zeros(latents.shape[:2]),
        text,
        mask=mask,
        capture=lambda layer, hidden, queries, keys: found.append(head.predict(layer, hidden)),
        wanted=0,
    )
    return found
