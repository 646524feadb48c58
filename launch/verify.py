"""An export is read back by other programs' code and compared with what was to be written.

Every tensor is compared bit by bit, by its digest, so that the original need not stay in memory.
Then diffusers' transformer and ours, which share the tensors that were read back, compute outputs
for the same seeded inputs: a wrong name, config or formula shows there. One float32 copy of the
weights is in memory, whatever their number.
"""

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launch.export import ExportError
from launch.formats import read_checkpoint
from launch.layouts import TRANSFORMER, Layout, optional
from launch.weight_files import read_safetensors, read_torch
from models.transformer import VideoTransformer
from models.wan_config import Geometry, diffusers_config
from models.wan_names import diffusers_name, native_name
from train.versions import package_version

TOLERANCE = 1e-5
"""Of float32 outputs, relative to the largest value: the same sums in another order."""
SIZES = ((1, 3, 5), (3, 2, 7), (5, 4, 3))
"""Frames, token rows and token columns of the videos that are compared."""
BATCH, TEXT_ROWS = 2, 7


class VerifyError(ExportError):
    """What was written is not what was to be written, or means something else to its readers."""


class Seal(NamedTuple):
    """What a tensor must be when it is read back."""

    dtype: torch.dtype
    shape: torch.Size
    digest: str


def seal(weights: Mapping[str, Tensor]) -> dict[str, Seal]:
    """The seals of named tensors."""
    return {
        name: Seal(tensor.dtype, tensor.shape, _digest(tensor)) for name, tensor in weights.items()
    }


def verify(
    folder: Path, layout: Layout, geometry: Geometry, seals: Mapping[str, Mapping[str, Seal]]
) -> dict[str, Any]:
    """Read back what was written to `folder` and compare it.

    Args:
        folder: As `layout.write` left it.
        layout: Its form.
        geometry: Of the network.
        seals: Of the native tensors that were to be written, by set.

    Returns:
        What was compared and with what result, for the manifest.

    Raises:
        VerifyError: If anything differs; says what.
    """
    _check_list(folder, layout, seals)
    differences = []
    for kind, wanted in seals.items():
        found = read_checkpoint(folder, weights=kind if layout.holds_sets else None)
        if found.config not in (None, geometry):
            raise VerifyError(
                f"config.json must say {geometry}, found {found.config}; nothing was exported"
            )
        is_folder = (folder / TRANSFORMER).is_dir()
        theirs = _from_folder(folder) if is_folder else _from_tensors(found.tensors, geometry)
        values = {native_name(name): tensor for name, tensor in theirs.state_dict().items()}
        _check_bits(values, wanted)
        differences.append(_largest_difference(theirs, _ours(values, geometry), geometry))
    return {
        "reader": "WanTransformer3DModel of diffusers " + package_version("diffusers"),
        "tensors": {kind: len(weights) for kind, weights in seals.items()},
        "bits": "equal",
        "outputs": "equal within the tolerance, all frames in one block",
        "tolerance": TOLERANCE,
        "largest_difference": max(differences),
        "videos": [list(size) for size in SIZES],
    }


def _check_list(folder: Path, layout: Layout, seals: Mapping[str, Mapping[str, Seal]]) -> None:
    """Raise `VerifyError` unless the files hold exactly the names, shapes and dtypes wanted."""
    found = {
        name: (tensor.dtype, tensor.shape)
        for path in folder.rglob("*.safetensors")
        for name, tensor in read_safetensors(path).items()
    }
    found |= {
        f"{key}.{name}": (tensor.dtype, tensor.shape)
        for path in folder.rglob("*.pt")
        for key, weights in read_torch(path).items()
        for name, tensor in weights.items()
    }
    wanted = {
        layout.name(kind, name): (entry.dtype, entry.shape)
        for kind, entries in seals.items()
        for name, entry in entries.items()
    }
    wrong = [name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)]
    if wrong:
        raise VerifyError(
            f"the files must hold {len(wanted)} names with their shapes and dtypes, found "
            f"{len(wrong)} that differ, such as {min(wrong)}; nothing was exported"
        )


def _check_bits(values: Mapping[str, Tensor], wanted: Mapping[str, Seal]) -> None:
    wrong = [
        name
        for name, entry in wanted.items()
        if _digest(values[name].to(entry.dtype)) != entry.digest
    ]
    if wrong:
        raise VerifyError(
            f"tensors must come back with the same bits, found {len(wrong)} that do not, such as "
            f"{wrong[0]}; nothing was exported, try again on another disk"
        )


def _digest(tensor: Tensor) -> str:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(raw.numpy().data).hexdigest()


def _from_folder(folder: Path) -> Any:
    """Diffusers' transformer as diffusers reads it from a folder."""
    model, info = optional("diffusers").WanTransformer3DModel.from_pretrained(
        folder, subfolder=TRANSFORMER, torch_dtype=torch.float32, output_loading_info=True
    )
    lost = [name for names in info.values() for name in names]
    if lost:
        raise VerifyError(f"diffusers must find all tensors and no other, found {lost[:10]} amiss")
    return model.eval()


def _from_tensors(weights: Mapping[str, Tensor], geometry: Geometry) -> Any:
    """Diffusers' transformer around native tensors that were read from a file."""
    with optional("accelerate").init_empty_weights():
        model = optional("diffusers").WanTransformer3DModel.from_config(diffusers_config(geometry))
    renamed = {diffusers_name(name): tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def _ours(weights: Mapping[str, Tensor], geometry: Geometry) -> VideoTransformer:
    with torch.device("meta"):
        network = VideoTransformer(**asdict(geometry))
    network.load_state_dict(dict(weights), assign=True)
    return network.eval()


@torch.no_grad()
def _largest_difference(theirs: Any, ours: VideoTransformer, geometry: Geometry) -> float:
    """Of all videos: of the velocity, and behind the last layer (a new network's velocity is 0)."""
    largest = 0.0
    for number, (frames, *grid) in enumerate(SIZES):
        size = [n * patch for n, patch in zip(grid, geometry.patch_size[1:], strict=True)]
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(BATCH, frames, geometry.in_channels, *size, generator=generator)
        text = torch.randn(BATCH, TEXT_ROWS, geometry.text_dim, generator=generator)
        sigma = torch.rand(BATCH, generator=generator)
        with _last_layer(ours) as own_hidden, _last_layer(theirs) as hidden:
            found = ours(latents, sigma[:, None].expand(BATCH, frames), text)
            expected = theirs(latents.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0]
        for what, own, other in (
            ("hidden state behind the last layer", own_hidden[0], hidden[0]),
            ("velocity", found, expected.transpose(1, 2)),
        ):
            difference = float((own - other).abs().max() / other.abs().max().clamp(min=1e-30))
            if not difference <= TOLERANCE:
                raise VerifyError(
                    f"the {what} must be the same in diffusers within {TOLERANCE:g} of its largest "
                    f"value, found a difference of {difference:.2g} for {frames} frames of "
                    f"{grid[0]} x {grid[1]} tokens; nothing was exported"
                )
            largest = max(largest, difference)
    return largest


@contextmanager
def _last_layer(network: Any) -> Iterator[list[Tensor]]:
    """What the last layer gives out, appended to the list at each pass."""
    seen: list[Tensor] = []

    def keep(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = network.blocks[-1].register_forward_hook(keep)
    try:
        yield seen
    finally:
        handle.remove()
