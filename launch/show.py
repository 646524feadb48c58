"""What a config means before anything runs: the resolved values, parameters and cache sizes."""

from collections.abc import Iterator

import torch
import yaml

from configs.errors import UserError
from configs.load import to_dict
from configs.schema import RunConfig
from launch.geometry import network_config, token_grid
from launch.plan import check_stages, plan_steps, run_folder
from launch.steps import is_complete, step_keys
from launch.student import head_from_config, outline


def describe(config: RunConfig) -> str:
    """The run as text; networks are built on the meta device, so any size fits.

    Raises:
        UserError: If the plan cannot work.
    """
    check_stages(config)
    lines = [yaml.safe_dump(to_dict(config), sort_keys=False), "parameters"]
    lines += [f"  {name:<12} {count:>14,}" for name, count in _parameters(config)]
    lines += ["", "key-value cache of one video in float32 (all layers)"]
    lines += [f"  {name:<26} {size:>14,} bytes" for name, size in _cache_sizes(config)]
    lines += ["", f"steps in {run_folder(config)}"]
    try:
        lines += list(_steps(config))
    except UserError as error:  # what they start from is not here, maybe it never is on a laptop
        lines.append(f"  not known yet: {error}")
    return "\n".join(lines)


def cache_bytes(config: RunConfig, tokens: int) -> int:
    """Bytes of keys and values of `tokens` tokens in every layer, for one video in float32."""
    model = config.model
    return 2 * model.num_layers * tokens * model.num_heads * model.head_dim * torch.float32.itemsize


def _parameters(config: RunConfig) -> Iterator[tuple[str, int]]:
    sizes = network_config(config)
    with torch.device("meta"):
        head = head_from_config(sizes)
    networks = {"transformer": outline(sizes["model"]), "head": head}
    for name, network in networks.items():
        yield name, sum(parameter.numel() for parameter in network.parameters())


def _cache_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    rows, columns = token_grid(config)
    for budget in config.evaluate.budgets:
        yield f"budget {budget} tokens", cache_bytes(config, budget)
    for frames in config.evaluate.frames:
        yield f"full after {frames} frames", cache_bytes(config, frames * rows * columns)


def _steps(config: RunConfig) -> Iterator[str]:
    steps = plan_steps(config)
    keys = step_keys(steps)
    for step in steps:
        state = "complete" if is_complete(step, keys[step.name]) else "to do"
        yield f"  {step.name:<18} {state}"
