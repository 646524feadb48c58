"""How much memory a network pass takes, from the network's own code run on tensors without data.

Such a pass takes a moment, whatever its size, see `launch/forecast_meta.py`. The network gets three
layers; further ones are as the second. CUDA's kernels for masks pad, and its libraries have
workspaces; neither is known here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from configs.schema import LoraConfig
from launch.forecast_flops import group_spans
from launch.forecast_meta import FilledCache, LiveBytes, PlainProbe, Rules, kv_types
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass
from models.attention import block_causal_mask, group_teacher_forcing, teacher_forcing_mask
from models.salience import SalienceMLP
from models.transformer import VideoTransformer
from train.lora import add_adapter

LAYERS = 3
"""Of the network that runs in place of a deeper one."""


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a pass takes, besides inputs, parameters and their gradients.

    Weights that autocast has converted are among them: until the product that reads them is over,
    or, where gradients are wanted, until its backward pass is.

    Attributes:
        kept: What the backward pass needs, or what the caller gets, when the pass is over.
        forward: The most during the pass, `kept` among it.
        backward: The most during the backward pass, what is left of `kept` among it.
    """

    kept: int
    forward: int
    backward: int


@dataclass(frozen=True)
class Geometry:
    """Sizes that decide how much memory a pass takes.

    Attributes:
        network: Arguments of `VideoTransformer`, as sorted pairs.
        block: Frames of a block.
        size: Latent rows and columns of a frame.
        rows: Text rows.
        is_bf16: Whether autocast is on.
        samples: In one pass.
        adapter: Rank and targets of the factors that are trained in place of the network, if any.
    """

    network: tuple[tuple[str, Any], ...]
    block: int
    size: tuple[int, int]
    rows: int
    is_bf16: bool
    samples: int = 1
    adapter: tuple[int, tuple[str, ...]] | None = None


@lru_cache(maxsize=256)
def pass_memory(geometry: Geometry, found: Pass, *, recomputes: bool) -> PassMemory:
    """What a pass takes.

    Args:
        geometry: Sizes.
        found: The pass; `network`, `scored` and `count` do not matter.
        recomputes: Whether layers keep their inputs only.
    """
    sizes = dict(geometry.network)
    rank, targets = geometry.adapter or (0, ())
    if not any(target.startswith("blocks.") for target in targets):  # else layers are not alike
        sizes["num_layers"] = LAYERS
    with torch.device("meta"):
        network = VideoTransformer(**sizes)
        if targets:
            add_adapter(network, LoraConfig(rank=rank, targets=list(targets)), seed=0, key="lora")
    network.recomputes_activations = recomputes
    with torch.device("meta"), Rules(is_bf16=geometry.is_bf16).in_force():
        return run_pass(network, geometry, found)


def run_pass(network: VideoTransformer, geometry: Geometry, found: Pass) -> PassMemory:
    """Run a pass, and the backward pass if there is one, and scale up to all layers."""
    if not found.with_grad:
        network.requires_grad_(False)
    b, more_layers = geometry.samples, dict(geometry.network)["num_layers"] - network.num_layers
    latents = torch.randn(b, found.frames, network.patch_embedding.in_channels, *geometry.size)
    sigma = torch.rand(b, found.frames)
    text = torch.randn(b, geometry.rows, dict(geometry.network)["text_dim"])
    entered: list[int] = []
    known = (*network.parameters(), latents, sigma, text)
    types = kv_types(geometry.is_bf16)
    with LiveBytes(known) as live, _watched(network, live, entered):
        captured: list[Tensor] = []
        options = _options(network, geometry, found, captured)
        if found.past is not None:
            options["cache"] = FilledCache(network, found.past, samples=b, types=types)
        with torch.set_grad_enabled(found.with_grad):
            velocity = network(latents, sigma, text, wanted=found.wanted, **options)
        options.clear()
        kept, forward = live.now, live.peak
        live.peak = live.now
        if found.with_grad:
            _drop_gradients(network)
            velocity.sum().backward()
        backward = live.peak
    # At the first layer's entry there is less: nothing is left yet of a layer before.
    inner = more_layers and (entered[2] - entered[1]) * more_layers
    return PassMemory(kept + inner, forward + inner, backward + inner)


def _options(
    network: VideoTransformer, geometry: Geometry, found: Pass, captured: list[Tensor]
) -> dict[str, Any]:
    """The rest of the arguments of a forward pass, but for a cache."""
    rows, columns = network.patch_size[1:]
    frame_len = geometry.size[0] // rows * (geometry.size[1] // columns)
    block_len = geometry.block * frame_len
    if found.attention == PROBED:
        network.probe = PlainProbe()
    elif found.attention == CAUSAL:
        mask = block_causal_mask(found.frames // geometry.block, block_len)
        return {"mask": mask, "capture": lambda layer, hidden, *_: captured.append(hidden)}
    elif found.attention == PAIRED:
        frames = found.frames // 2
        tokens = frames * frame_len
        visible = torch.ones(geometry.samples, tokens, tokens, dtype=torch.bool)
        dense = teacher_forcing_mask(visible, block_len)
        spans = group_spans(frames // geometry.block)
        groups = group_teacher_forcing(dense, block_len, len(spans))
        return {"mask": groups, "frames": torch.arange(frames).repeat(2)}
    return {}


@contextmanager
def _watched(network: nn.Module, live: LiveBytes, entered: list[int]) -> Iterator[None]:
    """Note what is alive whenever a layer begins for the first time."""

    def note(module: nn.Module, inputs: Any) -> None:
        if len(entered) < LAYERS:
            entered.append(live.now)

    handles = [block.register_forward_pre_hook(note) for block in network.blocks]  # type: ignore[union-attr]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _drop_gradients(network: nn.Module) -> None:
    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop)


@lru_cache(maxsize=16)
def head_memory(width: int, hidden: int, tokens: int, *, is_bf16: bool) -> tuple[int, int]:
    """Bytes of one layer's S-MLP in training, for one sample: kept, and the most in either pass."""
    with FakeTensorMode():  # it turns autocast off, and torch knows no autocast on `meta`
        network = SalienceMLP(width, hidden)
        read = torch.empty(1, tokens, width, dtype=torch.bfloat16 if is_bf16 else torch.float32)
        with LiveBytes((*network.parameters(), read)) as live:
            predicted = network(read)
            kept, live.peak = live.now, live.now
            _drop_gradients(network)
            predicted.sum().backward()
    return kept, live.peak
