"""LoRA: a frozen network with two small trained factors beside each of some linear layers.

A layer of weight W then computes W x + alpha / rank * B A x. At the start A [rank, inputs] is drawn
at random and B [outputs, rank] is zero, so that training begins at the network itself.

Source: LoRA, arXiv:2106.09685; the layers are those of the library `peft`.
"""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from configs.errors import ConfigError, UserError
from configs.schema import LoraConfig

NAME = "factors"
"""Of the adapter, in peft's names of parameters: `LAYER.lora_A.factors.weight`."""


def require_peft() -> None:
    """Raise `UserError` unless the library is installed."""
    if find_spec("peft") is None:
        raise UserError(
            "stages.*.lora needs the package 'peft', which is not installed; "
            "pip install -e '.[wan]'"
        )


def target_layers(network: nn.Module, targets: Sequence[str], *, key: str) -> list[str]:
    """Full names of the linear layers whose name is, or ends with, one of `targets`.

    Args:
        network: Without adapters; may be on the meta device.
        targets: Such as `self_attn.q` or `blocks.0.ffn.2`.
        key: Where the targets stand in the config, for messages.

    Raises:
        ConfigError: If a target names no layer.
    """
    linears = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    unknown = [target for target in targets if not any(is_named(one, target) for one in linears)]
    if unknown:
        # `blocks.7.ffn.0` is told as `ffn.0`: the layers are alike.
        short = {name.split(".", 2)[2] if name.startswith("blocks.") else name for name in linears}
        raise ConfigError(
            f"{key} must be ends of names of linear layers, {unknown} are none; there are "
            f"{', '.join(sorted(short))}"
        )
    return [name for name in linears if any(is_named(name, target) for target in targets)]


def is_named(name: str, target: str) -> bool:
    """Whether a target means the layer of this full name."""
    return name == target or name.endswith(f".{target}")


def add_adapter(network: nn.Module, settings: LoraConfig, *, seed: int, key: str) -> None:
    """Freeze `network` and give it adapters, in place; it keeps its class and computes as before.

    Args:
        network: On the CPU or the meta device.
        settings: Of the adapters.
        seed: Of their random factors.
        key: Where the settings stand in the config, for messages.

    Raises:
        ConfigError: If a target names no layer.
        UserError: If the library is not installed.
    """
    layers = target_layers(network, settings.targets, key=f"{key}.targets")
    require_peft()
    import peft

    wanted = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # divided by r, may be any number
        target_modules=layers,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(wanted, network, adapter_name=NAME)


def adapter_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The trained factors among the tensors of an adapted network.

    Returns:
        `LAYER.lora_A.weight` [rank, inputs] and `LAYER.lora_B.weight` [outputs, rank], with the
        names that layers have without adapters.
    """
    return {key.replace(f".{NAME}.", "."): value for key, value in state.items() if _is_factor(key)}


def base_tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The other tensors of an adapted network, with the names that they have without adapters."""
    return {
        key.replace(".base_layer.", "."): value
        for key, value in state.items()
        if not _is_factor(key)
    }


def _is_factor(key: str) -> bool:
    return f".{NAME}." in key


@torch.no_grad()
def merge_into(weights: dict[str, Tensor], adapter: Mapping[str, Tensor], *, scale: float) -> None:
    """Add to weights what an adapter adds; a network with them computes what the adapted one does.

    Sums are float32, and each is rounded once to the dtype of its weight.

    Args:
        weights: By the names that `base_tensors` gives; entries are replaced one by one, so that no
            second copy of all is held.
        adapter: With the names that `adapter_tensors` gives.
        scale: alpha / rank; what the factors add counts so often.
    """
    for key, second in adapter.items():
        layer, found, _ = key.partition(".lora_B.")
        if found:
            # In one buffer: matrices are large.
            merged = (second.float() @ adapter[f"{layer}.lora_A.weight"].float()).mul_(scale)
            weight = weights[f"{layer}.weight"]
            weights[f"{layer}.weight"] = merged.add_(weight).to(weight.dtype)
