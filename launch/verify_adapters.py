"""An adapter is read back by other programs' code and must do to a network what it does here."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.adapters import (
    ADAPTER_LAYOUTS,
    DIFFUSERS_FILE,
    LONGLIVE,
    LONGLIVE_FILE,
    Adapters,
)
from launch.layouts import optional
from launch.verify import (
    Seal,
    VerifyError,
    describe,
    largest_difference,
    network_of_diffusers,
    outputs,
    own_network,
    reader,
    seal,
)
from models.wan_config import Geometry
from train.lora import merge_into
from train.versions import package_version


def verify_adapters(
    folder: Path,
    form: str,
    geometry: Geometry,
    seals: Mapping[str, Mapping[str, Seal]],
    weights: dict[str, Tensor],
) -> dict[str, Any]:
    """Read back adapters that were written to `folder` and compare them.

    What diffusers' transformer computes with the student's adapter on top of the weights without it
    must be what ours computes with the merged weights. One float32 copy of them is in memory.

    Args:
        folder: As the form's `write` left it.
        form: A key of `ADAPTER_LAYOUTS`.
        geometry: Of the networks.
        seals: Of the adapters that were to be written, by set and then `NETWORK.FACTOR`.
        weights: Native, of the student with the adapter merged; become float32, and what they are
            without the adapter.

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
    for name, tensor in weights.items():
        weights[name] = tensor.float()
    ours = outputs(own_network(weights, geometry), geometry)
    merge_into(weights, adapter, scale=-1)
    theirs, read_by = _ADAPTED[form](folder, weights, geometry, found)
    return {
        "reader": read_by,
        "tensors": {kind: len(wanted)},
        **describe(largest_difference(outputs(theirs, geometry), ours)),
    }


def _adapted_by_diffusers(
    folder: Path, base: Mapping[str, Tensor], geometry: Geometry, found: Adapters
) -> tuple[Any, str]:
    loader = optional("diffusers.loaders").WanLoraLoaderMixin
    theirs = network_of_diffusers(base, geometry)
    state = loader.lora_state_dict(str(folder), weight_name=DIFFUSERS_FILE)
    loader.load_lora_into_transformer(state, theirs)
    layers = sum(hasattr(module, "lora_A") for module in theirs.modules())
    if 2 * layers != len(found["transformer"]):
        raise VerifyError(
            f"diffusers must find a layer for all {len(found['transformer'])} factors, found "
            f"{layers} layers; nothing was exported"
        )
    loaded = "with the adapter loaded by its WanLoraLoaderMixin onto the merged weights less it"
    return theirs, f"{reader()} {loaded}"


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
    wrapped = peft.get_peft_model(own_network(base, geometry), settings)
    _refuse(sorted(set(state) ^ set(peft.get_peft_model_state_dict(wrapped))), "names")
    peft.set_peft_model_state_dict(wrapped, dict(state))
    theirs = network_of_diffusers(wrapped.merge_and_unload().state_dict(), geometry)
    read_by = f"peft {package_version('peft')}, and by {reader()} what peft has merged"
    return theirs, f"{read_by} (LongLive itself has read nothing of it)"


_ADAPTED = {"diffusers-lora": _adapted_by_diffusers, "longlive-lora": _adapted_by_peft}


def _refuse(names: list[str], what: str) -> None:
    if names:
        raise VerifyError(
            f"factors must come back with the same {what}, found {len(names)} that do not, such as "
            f"{names[0]}; nothing was exported, try again on another disk"
        )
