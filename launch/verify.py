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

from launch.adapters import (
    ADAPTER_LAYOUTS,
    DIFFUSERS_FILE,
    LONGLIVE,
    LONGLIVE_FILE,
    Adapters,
)
from launch.export import ExportError
from launch.layouts import TRANSFORMER, Layout, optional
from models.transformer import VideoTransformer
from models.wan_config import Geometry, diffusers_config
from models.wan_names import diffusers_name, native_name, native_names
from train.lora import merge_into
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
    shape: tuple[int, ...]
    digest: str


def seal(weights: Mapping[str, Tensor]) -> dict[str, Seal]:
    """The seals of named tensors."""
    return {
        name: Seal(tensor.dtype, tuple(tensor.shape), _digest(tensor))
        for name, tensor in weights.items()
    }


def check_list(found: Mapping[str, Any], geometry: Geometry, *, what: str) -> None:
    """Raise `VerifyError` unless names and shapes are exactly those of a network.

    Args:
        found: Native name to something with a shape.
        geometry: Of the network.
        what: What holds them, for the message.
    """
    with torch.device("meta"):
        wanted = VideoTransformer(**asdict(geometry)).state_dict()
    assert set(wanted) == set(native_names(geometry.num_layers))
    wrong = [f"{name} is missing" for name in wanted if name not in found]
    wrong += [f"{name} is unknown" for name in found if name not in wanted]
    wrong += [
        f"{name} is {list(found[name].shape)}, not {list(wanted[name].shape)}"
        for name in wanted
        if name in found and tuple(found[name].shape) != tuple(wanted[name].shape)
    ]
    if wrong:
        raise VerifyError(
            f"{what} must hold the {len(wanted)} tensors of its network, found {len(wrong)} "
            f"differences: {'; '.join(wrong[:10])}; compare `model` in its manifest"
        )


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
    said, found = layout.read(folder)
    if said is not None and said != geometry:
        raise VerifyError(f"config.json must say {geometry}, found {said}; nothing was exported")
    if not layout.holds_sets:
        found = dict(zip(seals, found.values(), strict=True))
    if set(found) != set(seals):
        raise VerifyError(f"sets of weights must be {list(seals)}, found {list(found)}")
    differences = []
    for kind, weights in found.items():
        check_list(weights, geometry, what=f"the exported {layout.title}")
        wrong = [
            name for name, tensor in weights.items() if tensor.dtype != seals[kind][name].dtype
        ]
        _refuse(wrong, "dtype")
        is_folder = (folder / TRANSFORMER).is_dir()
        theirs = _from_folder(folder) if is_folder else _from_tensors(weights, geometry)
        values = {native_name(name): tensor for name, tensor in theirs.state_dict().items()}
        _refuse(
            [n for n, s in seals[kind].items() if _digest(values[n].to(s.dtype)) != s.digest],
            "bits",
        )
        differences.append(_largest_difference(theirs, _ours(values, geometry), geometry))
    return {
        "reader": _reader(),
        "tensors": {kind: len(weights) for kind, weights in seals.items()},
        "bits": "equal",
        "outputs": "equal within the tolerance, all frames in one block",
        "tolerance": TOLERANCE,
        "largest_difference": max(differences),
        "videos": [list(size) for size in SIZES],
    }


def verify_adapters(
    folder: Path,
    form: str,
    geometry: Geometry,
    seals: Mapping[str, Mapping[str, Seal]],
    merged: Mapping[str, Tensor],
) -> dict[str, Any]:
    """Read back adapters that were written to `folder` and compare them.

    What diffusers' transformer computes with the student's adapter on top of the weights without it
    must be what ours computes with the merged weights.

    Args:
        folder: As the form's `write` left it.
        form: A key of `ADAPTER_LAYOUTS`.
        geometry: Of the networks.
        seals: Of the adapters that were to be written, by set and then `NETWORK.FACTOR`.
        merged: Native weights of the student.

    Returns:
        As `verify`.

    Raises:
        VerifyError: If anything differs; says what.
    """
    found = ADAPTER_LAYOUTS[form].read(folder)
    ((kind, wanted),) = seals.items()
    read = {f"{name}.{k}": tensor for name, own in found.items() for k, tensor in own.items()}
    _refuse(sorted(set(read) ^ set(wanted)), "names")
    _refuse([name for name, own in seal(read).items() if own != wanted[name]], "bits")
    adapter = {name: tensor.float() for name, tensor in found["transformer"].items()}
    weights = {name: tensor.float() for name, tensor in merged.items()}
    ours = _ours(weights, geometry)
    base = dict(weights)
    merge_into(base, adapter, scale=-1)
    theirs, reader = _ADAPTED[form](folder, base, geometry, found)
    return {
        "reader": reader,
        "tensors": {kind: len(wanted)},
        "bits": "equal",
        "outputs": "equal within the tolerance, all frames in one block",
        "tolerance": TOLERANCE,
        "largest_difference": _largest_difference(theirs, ours, geometry),
        "videos": [list(size) for size in SIZES],
    }


def _adapted_by_diffusers(
    folder: Path, base: Mapping[str, Tensor], geometry: Geometry, found: Adapters
) -> tuple[Any, str]:
    loader = optional("diffusers.loaders").WanLoraLoaderMixin
    theirs = _from_tensors(base, geometry)
    state = loader.lora_state_dict(str(folder), weight_name=DIFFUSERS_FILE)
    loader.load_lora_into_transformer(state, theirs)
    layers = sum(hasattr(module, "lora_A") for module in theirs.modules())
    if 2 * layers != len(found["transformer"]):
        raise VerifyError(
            f"diffusers must find a layer for all {len(found['transformer'])} factors, found "
            f"{layers} layers; nothing was exported"
        )
    return theirs, f"{_reader()} with the adapter loaded by its WanLoraLoaderMixin"


def _adapted_by_peft(
    folder: Path, base: Mapping[str, Tensor], geometry: Geometry, found: Adapters
) -> tuple[Any, str]:
    peft = optional("peft")
    content = torch.load(folder / LONGLIVE_FILE, weights_only=True, mmap=True)
    state = content[LONGLIVE["transformer"]]
    seconds = [name for name in found["transformer"] if ".lora_B." in name]
    rank = found["transformer"][seconds[0]].shape[1]
    layers = [name.partition(".lora_B.")[0] for name in seconds]
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=layers)
    wrapped = peft.get_peft_model(_ours(base, geometry), settings)
    _refuse(sorted(set(state) ^ set(peft.get_peft_model_state_dict(wrapped))), "names")
    peft.set_peft_model_state_dict(wrapped, dict(state))
    theirs = _from_tensors(wrapped.merge_and_unload().state_dict(), geometry)
    reader = f"peft {package_version('peft')}, and by {_reader()} what peft has merged"
    return theirs, f"{reader} (LongLive itself has read nothing of it)"


_ADAPTED = {"diffusers-lora": _adapted_by_diffusers, "longlive-lora": _adapted_by_peft}


def _reader() -> str:
    return "WanTransformer3DModel of diffusers " + package_version("diffusers")


def _refuse(names: list[str], what: str) -> None:
    if names:
        raise VerifyError(
            f"tensors must come back with the same {what}, found {len(names)} that do not, such as "
            f"{names[0]}; nothing was exported, try again on another disk"
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
