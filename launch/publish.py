"""`python -m launch export`: a transformer and its head, in the form other programs take.

    DST/
      ...                        the transformer, see `launch.layouts`
      salience_head.safetensors  the S-MLP with its statistics, if there is one
      pafukv.json                role, stage, sampler, cache policy, parents, config, versions, the
                                 hash of every file, and what was verified and how
      README.md                  the model card

DST appears by one rename, when everything in it is written and, with --verify, compared.
"""

import argparse
import errno
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from configs.load import to_dict
from data.files import file_sha256
from launch.adapters import ADAPTER_LAYOUTS, AdapterLayout
from launch.card import model_card, not_for_wan
from launch.export import ExportError, new_folder, require_absent, sync
from launch.formats import Checkpoint
from launch.layouts import LAYOUTS, Layout
from launch.origin import SETS, Origin, open_origin
from launch.published import HEAD, PUBLISHED, VERSION
from launch.steps import say
from launch.verify import Seal, VerifyError, seal, verify
from launch.verify_adapters import verify_adapters
from launch.weight_checks import require_tensors
from models.kv_policies import build_policy
from models.wan_config import TEXT_LEN, Geometry, native_config
from train.versions import code_version, package_version

CARD = "README.md"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("pafukv", "torch", "safetensors", "diffusers")
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the verb."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="RUN_OR_CKPT",
        help="stage folder, export, imported checkpoint, or a checkpoint such as "
        "runs/tiny/distill/checkpoints/step-00000006 of any number of ranks",
    )
    parser.add_argument("dst", type=Path, metavar="DST", help="new folder")
    layouts: dict[str, Layout | AdapterLayout] = {**LAYOUTS, **ADAPTER_LAYOUTS}
    forms = "; ".join(f"{name}: {layout.title}" for name, layout in layouts.items())
    parser.add_argument("--format", required=True, choices=layouts, dest="form", help=forms)
    parser.add_argument(
        "--weights",
        choices=SETS,
        help="moving average or the weights themselves; by default the average if there is one, in "
        "the form self-forcing both if both are there",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the transformer; by default what it has"
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="read the result back with diffusers' transformer and compare bits and outputs with "
        "ours; needs memory for the transformer once in float32 (5.7 GB at 1.3B, 57 GB at 14B), as "
        "both implementations compute with the same tensors",
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry out the verb."""
    manifest = publish(
        arguments.source,
        arguments.dst,
        form=arguments.form,
        weights=arguments.weights,
        dtype=DTYPES.get(arguments.dtype),
        is_verified=arguments.verify,
    )
    found, steps = manifest["verified"], manifest.get("steps")
    result = "not verified"
    if found is not None:
        result = f"verified, largest difference of outputs {found['largest_difference']:.1e}"
    size = sum(entry["bytes"] for entry in manifest["files"].values())
    age = f" after {steps} steps" if steps else ""
    say(
        f"{arguments.dst}: {manifest['role']} of stage {manifest['stage']!r}{age}, "
        f"{manifest['parameters']} parameters, {size / 1e6:.1f} MB as {arguments.form}, {result}"
    )
    misfit = not_for_wan(manifest)
    if misfit is not None:
        say(misfit)


def publish(
    source: Path,
    dst: Path,
    *,
    form: str,
    weights: str | None = None,
    dtype: torch.dtype | None = None,
    is_verified: bool = False,
) -> dict[str, Any]:
    """Write an export for other programs under `dst`.

    Args:
        source: See `launch.origin.open_origin`.
        dst: Must not exist.
        form: A key of `LAYOUTS` or of `ADAPTER_LAYOUTS`.
        weights: One of `SETS`, or None for what is preferred.
        dtype: Of the transformer; None = as it is.
        is_verified: Whether the result is compared before it appears.

    Returns:
        What `PUBLISHED` says.

    Raises:
        UserError: If the source or the folder does not fit, the disk is full, or what was written
            differs; nothing is left behind.
    """
    require_absent(dst)
    layout = ADAPTER_LAYOUTS[form] if form in ADAPTER_LAYOUTS else LAYOUTS[form]
    with _reading(source):
        origin = open_origin(source, weights=weights)
    if origin.manifest["role"] not in layout.roles:
        raise ExportError(
            f"--format {form} must be given a {' or '.join(layout.roles)}, found a "
            f"{origin.manifest['role']} in {str(source)!r}; choose another format"
        )
    geometry = _geometry(origin, source)
    with _flushed_folder(dst) as part:
        if isinstance(layout, AdapterLayout):
            seals = _write_adapters(part, origin, layout, dtype=dtype, source=source)
            verified = None
            if is_verified:
                with _reading(source):
                    merged = origin.read(origin.sets[0], None)
                verified = verify_adapters(part, form, geometry, seals, merged)
        else:
            seals = _write_weights(part, source, origin, layout, geometry, dtype=dtype)
            verified = verify(part, layout, geometry, seals) if is_verified else None
        if origin.head is not None:
            _write_head(part / HEAD, origin.head, is_verified=is_verified)
        manifest = _describe(part, origin, form, seals) | {"verified": verified}
        (part / PUBLISHED).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
        (part / CARD).write_text(model_card(manifest))
    return manifest


def _geometry(origin: Origin, source: Path) -> Geometry:
    """Geometry of the network, if Wan's code can compute it."""
    sizes = dict(origin.manifest["config"]["model"])
    del sizes["frames_per_block"]
    geometry = Geometry(**sizes | {"patch_size": tuple(sizes["patch_size"])})
    try:
        native_config(geometry)
    except ValueError as error:
        raise ExportError(f"{str(source)!r} cannot be used by other programs: {error}") from error
    return geometry


def _write_weights(
    part: Path,
    source: Path,
    origin: Origin,
    layout: Layout,
    geometry: Geometry,
    *,
    dtype: torch.dtype | None,
) -> dict[str, dict[str, Seal]]:
    """Write the transformer; returns the seals of its sets of weights."""
    kinds = origin.sets if layout.holds_sets else origin.sets[:1]
    seals: dict[str, dict[str, Seal]] = {}
    weights: dict[str, dict[str, Tensor]] = {}
    parked = []
    for kind in kinds:
        with _reading(source):
            tensors = origin.read(kind, dtype)
        require_tensors(Checkpoint("origin", (source,), tensors), geometry)
        seals[kind] = seal(tensors)
        if len(kinds) > 1:
            # Mapped from a file, so that only one set at a time takes memory.
            parked.append(part / f".{kind}.safetensors")
            safetensors.torch.save_file(tensors, parked[-1])
            tensors = safetensors.torch.load_file(parked[-1])
        weights[kind] = tensors
    text = origin.manifest["config"].get("text", {})
    layout.write(part, geometry, weights, text.get("length", TEXT_LEN))
    for path in parked:
        path.unlink()
    return seals


def _write_adapters(
    part: Path, origin: Origin, layout: AdapterLayout, *, dtype: torch.dtype | None, source: Path
) -> dict[str, dict[str, Seal]]:
    """Write what was trained of student and critic; returns the seals of the one set of it."""
    if origin.read_adapters is None:
        raise ExportError(
            f"{str(source)!r} must hold the adapter of a student to be {layout.title}, its stage "
            f"{origin.manifest['stage']!r} has trained whole networks; train with "
            "stages.NAME.lora, or choose a format for whole networks"
        )
    kind = origin.sets[0]
    with _reading(source):
        adapters = {
            network: {name: tensor.to(dtype or tensor.dtype) for name, tensor in own.items()}
            for network, own in origin.read_adapters(kind).items()
            if network in layout.networks
        }
    layout.write(part, adapters)
    return {
        kind: {f"{name}.{k}": s for name, own in adapters.items() for k, s in seal(own).items()}
    }


def _write_head(path: Path, head: Mapping[str, Tensor], *, is_verified: bool) -> None:
    content = {name: tensor.contiguous() for name, tensor in head.items()}
    safetensors.torch.save_file(content, path)
    if is_verified and seal(safetensors.torch.load_file(path)) != seal(content):
        raise VerifyError(f"{HEAD} must come back bit by bit; it did not, try another disk")


def _describe(
    part: Path, origin: Origin, form: str, seals: Mapping[str, Mapping[str, Seal]]
) -> dict[str, Any]:
    """What is known of an export but for its verification."""
    kinds, first = list(seals), next(iter(seals.values()))
    dtypes = {str(entry.dtype).removeprefix("torch.") for entry in first.values()}
    policy = origin.manifest.get("policy")
    if policy is None and origin.head is not None:
        policy = {"name": "salience", "params": to_dict(vars(build_policy("salience")))}
    return origin.manifest | {
        "format": form,
        "version": VERSION,
        "sets": kinds,
        "weights": None if origin.manifest.get("weights") is None else kinds[0],
        "dtypes": sorted(dtypes),
        "parameters": sum(entry.shape.numel() for entry in first.values()),
        "has_head": origin.head is not None,
        "policy": policy,
        "source": origin.record,
        "run": origin.run,
        "versions": {name: package_version(name) for name in PACKAGES},
        "code": code_version(),
        "files": {
            str(path.relative_to(part)): {
                "bytes": path.stat().st_size,
                "sha256": file_sha256(path),
            }
            for path in sorted(part.rglob("*"))
            if path.is_file()
        },
    }


@contextmanager
def _reading(source: Path) -> Iterator[None]:
    """Raise `ExportError` if the source cannot be read within the block."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason, _ = _explain(error)
        where = getattr(error, "filename", None) or source
        raise ExportError(
            f"{str(where)!r} must be readable, found {reason}; check the file or bring it back, "
            "and run the same command again"
        ) from error


@contextmanager
def _flushed_folder(dst: Path) -> Iterator[Path]:
    """As `launch.export.new_folder`, for any files, readable as the user's others are.

    Raises:
        ExportError: If it cannot be written.
    """
    try:
        with new_folder(dst) as part:
            yield part
            for path in part.rglob("*"):
                if path.is_file():
                    path.chmod((part / CARD).stat().st_mode)  # safetensors' are for us alone
                sync(path)
    except (OSError, SafetensorError) as error:
        reason, advice = _explain(error)
        raise ExportError(
            f"DST {str(dst)!r} must be writable, found {reason}; {advice} and run the same command "
            "again"
        ) from error


def _explain(error: OSError | SafetensorError) -> tuple[str, str]:
    """What was found, and what to do."""
    reason = str(error)
    number = error.errno if isinstance(error, OSError) else None
    if isinstance(error, SafetensorError):
        found = re.search(r"os error (\d+)", reason)
        number = int(found[1]) if found else None
    if number is not None:
        reason = os.strerror(number)
    return reason, "free some space" if number in FULL else "check the folder"
