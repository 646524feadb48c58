"""What a config means before anything runs: the resolved values, parameters and cache sizes."""

from collections.abc import Iterator
from typing import Any

import torch
import yaml

from configs.errors import UserError
from configs.load import parse_section, to_dict
from configs.schema import RunConfig
from launch.geometry import network_config
from launch.plan import check_stages, plan_steps, run_folder
from launch.steps import is_complete, step_keys
from launch.student import head_from_config, outline
from train.kinds import stage_kind


def describe(config: RunConfig) -> str:
    """The run as text; networks are built on the meta device, so any size fits.

    Raises:
        UserError: If the plan cannot work.
    """
    check_stages(config)
    lines = [yaml.safe_dump(_settings(config), sort_keys=False), "parameters"]
    lines += [f"  {name:<12} {count:>14,}" for name, count in _parameters(config)]
    sizes = list(_cache_sizes(config))
    if sizes:
        lines += ["", "key-value cache of one video (all layers)"]
        lines += [f"  {name:<38} {size:>16,} bytes" for name, size in sizes]
    lines += ["", f"steps in {run_folder(config)}"]
    try:
        lines += list(_steps(config))
    except UserError as error:  # what they start from is not here, maybe it never is on a laptop
        lines.append(f"  not known yet: {error}")
    return "\n".join(lines)


def cache_bytes(config: RunConfig, tokens: int, *, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of keys and values of `tokens` tokens in every layer, for one video."""
    model = config.model
    return 2 * model.num_layers * tokens * model.num_heads * model.head_dim * dtype.itemsize


def _settings(config: RunConfig) -> dict[str, Any]:
    """The resolved values, without those of an evaluation or a world that there is not."""
    settings: dict[str, Any] = to_dict(config)
    if not config.evaluate.stages:
        del settings["evaluate"]
    if config.source.kind != "world":
        del settings["source"]["world"]
    return settings


def _parameters(config: RunConfig) -> Iterator[tuple[str, int]]:
    sizes = network_config(config)
    with torch.device("meta"):
        head = head_from_config(sizes)
    networks = {"transformer": outline(sizes["model"]), "head": head}
    for name, network in networks.items():
        yield name, sum(parameter.numel() for parameter in network.parameters())


def _cache_sizes(config: RunConfig) -> Iterator[tuple[str, int]]:
    """Of each stage that rolls out, in the precision of training; of the evaluation in float32."""
    dtype = torch.bfloat16 if config.trainer.precision == "bf16" else torch.float32
    for name, stage in config.stages.items():
        cls = stage_kind(stage.kind)
        params: Any = to_dict(parse_section(cls.params_type, stage.params, key=f"stages.{name}"))
        budgets = [*params.get("budgets", []), params.get("budget_tokens")]
        for budget in filter(None, budgets):
            yield f"{name}, {budget} tokens", cache_bytes(config, budget, dtype=dtype)
        if "stream_frames" in params:
            frames = params["stream_frames"]
            size = cache_bytes(config, frames * config.frame_seq_len, dtype=dtype)
            yield f"{name}, all of {frames} frames", size
    if config.evaluate.stages:
        for budget in config.evaluate.budgets:
            yield f"evaluate, {budget} tokens", cache_bytes(config, budget)
        for frames in config.evaluate.frames:
            size = cache_bytes(config, frames * config.frame_seq_len)
            yield f"evaluate, all of {frames} frames", size


def _steps(config: RunConfig) -> Iterator[str]:
    steps = plan_steps(config)
    keys = step_keys(steps)
    for step in steps:
        state = "complete" if is_complete(step, keys[step.name]) else "to do"
        yield f"  {step.name:<18} {state}"
