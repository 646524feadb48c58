"""`python -m launch import`: checkpoints from elsewhere become exports that stages start from."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.load import load_config, to_dict
from data.files import json_sha256
from launch.export import MANIFEST, require_absent, write_export
from launch.formats import EMA, RAW, Checkpoint, read_checkpoint
from launch.geometry import sampling_config
from launch.longlive import ADAPTER, Adapter, merge, read_adapter
from launch.published import PUBLISHED, Weights, read_export, read_published, require_model
from launch.steps import say
from launch.weight_checks import network_geometry, require_tensors
from launch.weight_files import digests
from models.flow import sampling_sigmas
from models.wan_config import Geometry

STEPS, SHIFT = 4, 5.0
"""Of the sampler of Self-Forcing and its descendants."""
FRAMES_PER_BLOCK, FRAMES = 3, 21
"""Of the same: frames generated together, and frames of the clips that they learnt from."""
_OF_STUDENTS = ("sigmas", "euler", "frames_per_block")
_DESCRIBING = ("config", "heads", "frames", "lora", *_OF_STUDENTS)
"""Options for what checkpoints from elsewhere do not say and our own do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "src",
        type=Path,
        metavar="SRC",
        help="folder of Wan2.1 or of diffusers, .safetensors, .pt of Self-Forcing and its "
        "descendants, an export of ours; told apart by what is inside",
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder")
    parser.add_argument(
        "--role",
        choices=("teacher", "student"),
        help="bidirectional or block-causal; needed where the format does not say",
    )
    parser.add_argument(
        "--config",
        nargs="+",
        metavar="FILE|KEY=VALUE",
        help="of the runs that will use it: checks `model`, and names codec, text, size and fps, "
        "which sampling needs",
    )
    parser.add_argument(
        "--weights",
        choices=(EMA, RAW),
        help="of a .pt with both: the moving average (the default if it is there) or the weights",
    )
    parser.add_argument("--heads", type=int, help="without a config.json; 128 channels each")
    parser.add_argument("--lora", type=Path, metavar="FILE", help="of LongLive, merged into SRC")
    parser.add_argument("--lora-alpha", type=float, help="with --lora, whose file does not say it")
    parser.add_argument(
        "--keep-adapter", action="store_true", help="with --lora: its factors, too, in a file"
    )
    parser.add_argument(
        "--sigmas",
        type=float,
        nargs="+",
        metavar="SIGMA",
        help=f"noise levels of a student, from the highest; by default {STEPS} steps at shift "
        f"{SHIFT:g}, as Self-Forcing",
    )
    parser.add_argument(
        "--euler", action="store_true", help="a student that steps along the velocity, undistilled"
    )
    parser.add_argument(
        "--frames-per-block", type=int, help=f"of a student; by default {FRAMES_PER_BLOCK}"
    )
    parser.add_argument(
        "--frames", type=int, help=f"latent frames that it was trained on; by default {FRAMES}"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry out the verb.

    Raises:
        UserError: If SRC, DST or an option does not fit; nothing is left under DST.
    """
    _check_options(arguments)
    src, dst = arguments.src, arguments.dst
    if (src / MANIFEST).is_file() or (src / "export" / MANIFEST).is_file():
        _require_absent(arguments, (*_DESCRIBING, "weights"), why=f"{str(src)!r} is an export")
        weights, manifest = read_export(src)
    elif (src / PUBLISHED).is_file():
        _require_absent(arguments, _DESCRIBING, why=f"{PUBLISHED} in {str(src)!r} says it")
        weights, manifest = read_published(src, weights=arguments.weights)
    else:
        weights, manifest = _of_others(arguments)
    if arguments.role not in (None, manifest["role"]):
        raise UserError(
            f"--role must be that of {str(src)!r}, {manifest['role']}, found {arguments.role}; "
            "leave it out"
        )
    digest = write_export(dst, weights=weights, manifest=manifest)
    model, tensors = manifest["config"]["model"], weights["transformer"].values()
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    say(
        f"{dst}: {manifest['role']}, {len(tensors)} tensors in {' and '.join(dtypes)}, "
        f"{sum(tensor.numel() for tensor in tensors)} parameters, {model['num_layers']} layers, "
        f"{model['num_heads']} heads of {model['head_dim']}; sha256 {digest}"
    )


def _check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that contradict each other, and a DST that is there."""
    require_absent(arguments.dst)
    for name in ("heads", "frames", "frames_per_block", "lora_alpha"):
        value = getattr(arguments, name)
        if value is not None and value <= 0:
            raise UserError(f"{_option(name)} must be above 0, found {value}")
    if arguments.lora is None:
        why = "only a --lora has them"
        _require_absent(arguments, ("lora_alpha", "keep_adapter"), why=why)
    elif arguments.lora_alpha is None:
        raise UserError(
            "--lora needs --lora-alpha, found none: the file does not say it; LongLive's own "
            "config has alpha 256 at rank 256"
        )
    levels = [*(arguments.sigmas or [1.0]), 0.0]
    if levels[0] > 1 or any(high <= low for high, low in pairwise(levels)):
        raise UserError(
            f"--sigmas must fall from at most 1 to above 0, found {arguments.sigmas}; give the "
            "noise levels in the order in which the student takes them"
        )


def _require_absent(arguments: argparse.Namespace, names: Sequence[str], *, why: str) -> None:
    given = [_option(name) for name in names if getattr(arguments, name) not in (None, False)]
    if given:
        raise UserError(f"{why}, so {' and '.join(given)} would be ignored; leave it out")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _of_others(arguments: argparse.Namespace) -> tuple[Weights, dict[str, Any]]:
    """A checkpoint of another program, described by its options."""
    checkpoint = read_checkpoint(arguments.src, weights=arguments.weights)
    geometry = network_geometry(checkpoint, num_heads=arguments.heads)
    require_tensors(checkpoint, geometry)
    role = _role(checkpoint, arguments)
    manifest = {
        "role": role,
        "stage": "imported",
        "kind": "import",
        "train_seed": None,
        "steps": 0,
        "sampler": _sampler(arguments) if role == "student" else None,
        "weights": checkpoint.chosen,
        "config": _network_config(geometry, arguments),
    }
    _tell(checkpoint, geometry, heads=arguments.heads)
    names, hashes = [path.name for path in checkpoint.files], digests(checkpoint.files)
    parents = {"source": hashes[0] if len(hashes) == 1 else json_sha256(hashes)}
    weights: Weights = {"transformer": checkpoint.tensors}
    if arguments.lora is not None:
        adapter = read_adapter(arguments.lora)
        merge(checkpoint.tensors, adapter, alpha=arguments.lora_alpha)
        parents["lora"] = digests([arguments.lora])[0]
        if arguments.keep_adapter:
            weights[ADAPTER] = adapter.tensors()
            manifest["lora"] = _lora(adapter, alpha=arguments.lora_alpha)
    source = {"form": checkpoint.form, "files": dict(zip(names, hashes, strict=True))}
    return weights, manifest | {"parents": parents, "source": source}


def _role(checkpoint: Checkpoint, arguments: argparse.Namespace) -> str:
    """What the format or the user says; options that only students have go with students."""
    known = "student" if arguments.lora is not None else checkpoint.role
    role = known or arguments.role
    if role is None:
        raise UserError(
            f"--role must be given, for {checkpoint.form} weights do not say what they are: "
            "teacher (bidirectional, as Wan2.1 itself) or student (block-causal)"
        )
    if role == "teacher":
        _require_absent(arguments, _OF_STUDENTS, why="a teacher has no sampler and no blocks")
    return str(role)


def _network_config(geometry: Geometry, arguments: argparse.Namespace) -> dict[str, Any]:
    """The section `config` of the manifest; without --config only what the network itself shows."""
    block, frames = arguments.frames_per_block, arguments.frames or FRAMES
    if arguments.config is None:
        sizes = {**asdict(geometry), "patch_size": list(geometry.patch_size)}
        return {"model": sizes | {"frames_per_block": block or FRAMES_PER_BLOCK}, "frames": frames}

    config = load_config(arguments.config)
    require_model(geometry, to_dict(config.model), where="`model` in --config")
    if block not in (None, config.model.frames_per_block):
        raise UserError(
            f"--frames-per-block must be model.frames_per_block={config.model.frames_per_block} "
            f"of --config, found {block}; leave it out"
        )
    return sampling_config(config, frames=frames)


def _sampler(arguments: argparse.Namespace) -> dict[str, Any]:
    given = arguments.sigmas
    sigmas = sampling_sigmas(STEPS, SHIFT) if given is None else [*given, 0.0]
    return {"sigmas": sigmas, "renoise": not arguments.euler}


def _lora(adapter: Adapter, *, alpha: float) -> dict[str, Any]:
    """The manifest's word on an adapter, in the keys of `stages.X.lora`."""
    return {
        "rank": adapter.rank,
        "alpha": alpha,
        "targets": adapter.targets,
        "networks": ["student"],
    }


def _tell(checkpoint: Checkpoint, geometry: Geometry, *, heads: int | None) -> None:
    """Say what was found and what was chosen without being asked."""
    reason = "as in every published Wan2.1; --heads if not"
    if checkpoint.config is not None:
        reason = "by its config.json"
    elif heads is not None:
        reason = "by --heads"
    say(
        f"{checkpoint.files[0]}: {checkpoint.form} weights, {geometry.num_heads} heads of "
        f"{geometry.head_dim} channels, {reason}"
    )
    if checkpoint.chosen is not None:
        say(f"weights: {checkpoint.chosen}; --weights chooses")
    if checkpoint.unused:
        say(f"left out: {', '.join(checkpoint.unused)}")
