"""An export is read back by other programs' code and compared with what was to be written.

Every tensor is compared bit by bit, by its digest, so that the original need not stay in memory.
Then diffusers' transformer and ours, which share the tensors that were read back, compute outputs
for the same seeded inputs: a wrong name, config or formula shows there. One float32 copy of the
weights is in memory, whatever their number.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
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
        theirs = (
            _from_folder(folder) if is_folder else network_of_diffusers(found.tensors, geometry)
        )
        values = {native_name(name): tensor for name, tensor in theirs.state_dict().items()}
        _check_bits(values, wanted)
        ours = own_network(values, geometry)
        differences.append(largest_difference(outputs(theirs, geometry), outputs(ours, geometry)))
    return {
        "reader": reader(),
        "tensors": {kind: len(weights) for kind, weights in seals.items()},
        **describe(max(differences)),
    }


def reader() -> str:
    """What compared it, for the manifest."""
    return "WanTransformer3DModel of diffusers " + package_version("diffusers")


def describe(difference: float) -> dict[str, Any]:
    """What was found equal, for the manifest.

    Args:
        difference: From `largest_difference`.
    """
    return {
        "bits": "equal",
        "outputs": "equal within the tolerance, all frames in one block",
        "tolerance": TOLERANCE,
        "largest_difference": difference,
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


def network_of_diffusers(weights: Mapping[str, Tensor], geometry: Geometry) -> Any:
    """Diffusers' transformer around native tensors that were read from a file."""
    with optional("accelerate").init_empty_weights():
        model = optional("diffusers").WanTransformer3DModel.from_config(diffusers_config(geometry))
    renamed = {diffusers_name(name): tensor.float() for name, tensor in weights.items()}
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def own_network(weights: Mapping[str, Tensor], geometry: Geometry) -> VideoTransformer:
    """Our transformer around native tensors."""
    with torch.device("meta"):
        network = VideoTransformer(**asdict(geometry))
    network.load_state_dict(dict(weights), assign=True)
    return network.eval()


@torch.no_grad()
def outputs(network: Any, geometry: Geometry) -> list[dict[str, Tensor]]:
    """What a network, ours or diffusers', computes of seeded videos, one entry for each of `SIZES`.

    That is the velocity, and what the last layer gives (a new network's velocity is 0).
    """
    found = []
    for number, (frames, *grid) in enumerate(SIZES):
        size = [n * patch for n, patch in zip(grid, geometry.patch_size[1:], strict=True)]
        generator = torch.Generator().manual_seed(number)
        latents = torch.randn(BATCH, frames, geometry.in_channels, *size, generator=generator)
        text = torch.randn(BATCH, TEXT_ROWS, geometry.text_dim, generator=generator)
        sigma = torch.rand(BATCH, generator=generator)
        with _last_layer(network) as hidden:
            if isinstance(network, VideoTransformer):
                velocity = network(latents, sigma[:, None].expand(BATCH, frames), text)
            else:
                given = latents.transpose(1, 2)
                velocity = network(given, 1000 * sigma, text, return_dict=False)[0].transpose(1, 2)
        found.append({"hidden state behind the last layer": hidden[0], "velocity": velocity})
    return found


def largest_difference(
    theirs: Sequence[Mapping[str, Tensor]], ours: Sequence[Mapping[str, Tensor]]
) -> float:
    """Of two networks' `outputs`, relative to the largest value, over all videos.

    Raises:
        VerifyError: If it is above `TOLERANCE`.
    """
    largest = 0.0
    for (frames, rows, columns), expected, found in zip(SIZES, theirs, ours, strict=True):
        for what, other in expected.items():
            difference = (found[what] - other).abs().max() / other.abs().max().clamp(min=1e-30)
            if not difference <= TOLERANCE:
                raise VerifyError(
                    f"the {what} must be the same in diffusers within {TOLERANCE:g} of its largest "
                    f"value, found a difference of {float(difference):.2g} for {frames} frames of "
                    f"{rows} x {columns} tokens; nothing was exported"
                )
            largest = max(largest, float(difference))
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
