"""Compiled layers, and a compiler that is asked for before it is needed."""

from collections.abc import Iterable

import torch
from torch import nn

from configs.errors import ConfigError
from models.block import Block

VARIANTS = 32
"""Of one method: by the number of frames, with and without gradient, trained and frozen."""


def compile_layers(networks: Iterable[nn.Module], *, device: torch.device) -> None:
    """Let every transformer layer in `networks` run compiled; weights keep their names.

    Raises:
        ConfigError: If nothing can be compiled on this machine.
    """
    require_compiler(device)
    # Beyond the limit layers would quietly run as they are; 8 are reached within one stage.
    torch._dynamo.config.recompile_limit = VARIANTS
    for network in networks:
        for module in network.modules():
            if isinstance(module, Block):
                module.is_compiled = True


def require_compiler(device: torch.device) -> None:
    """Compile one addition, and raise `ConfigError` if that fails."""

    def add(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    try:
        torch.compile(add, options={"fx_graph_cache": False})(torch.ones(1, device=device))
    except RuntimeError as error:
        needed = "a C++ compiler (g++, or the one in CXX)" if device.type == "cpu" else "Triton"
        raise ConfigError(
            f"trainer.compile=true needs {needed} that works here, a trial failed: "
            f"{str(error).splitlines()[0]}; install it or set trainer.compile=false"
        ) from error
