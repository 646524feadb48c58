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

from launch.forecast_meta import FilledCache, LiveBytes, PlainProbe, Rules, adapt, kv_types
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass
from models.attention import group_teacher_forcing, teacher_forcing_spans
from models.salience import SalienceMLP
from models.transformer import VideoTransformer

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
    network = _network(geometry.network, geometry.adapter)
    network.recomputes_activations = recomputes
    with Rules(is_bf16=geometry.is_bf16).in_force():
        return run_pass(network, geometry, found)


@lru_cache(maxsize=8)
def _network(
    sizes: tuple[tuple[str, Any], ...], adapter: tuple[int, tuple[str, ...]] | None
) -> VideoTransformer:
    """A network without data, as far as it is needed."""
    rank, targets = adapter or (0, ())
    changes = {"num_layers": LAYERS}
    if any(target.startswith("blocks.") for target in targets):  # so layers are not alike
        changes = {}
    with torch.device("meta"):
        network = VideoTransformer(**dict(sizes) | changes)
        if targets:
            adapt(network, rank, targets)
    return network


def run_pass(network: VideoTransformer, geometry: Geometry, found: Pass) -> PassMemory:
    """Run a pass, and the backward pass if there is one, and scale up to all layers."""
    b, more_layers = geometry.samples, dict(geometry.network)["num_layers"] - network.num_layers
    channels, device = network.patch_embedding.in_channels, network.patch_embedding.weight.device
    latents = torch.randn(b, found.frames, channels, *geometry.size, device=device)
    sigma = torch.rand(b, found.frames, device=device)
    text = torch.randn(b, geometry.rows, dict(geometry.network)["text_dim"], device=device)
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
            with _gradients_dropped(network):
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
    block_len, device = geometry.block * frame_len, network.patch_embedding.weight.device
    network.probe = PlainProbe() if found.attention == PROBED else None
    if found.attention == CAUSAL:
        tokens = found.frames * frame_len
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)  # of any content
        return {"mask": mask, "capture": lambda layer, hidden, *_: captured.append(hidden)}
    if found.attention == PAIRED:
        frames = found.frames // 2
        tokens = frames * frame_len
        visible = torch.ones(geometry.samples, tokens, tokens, dtype=torch.bool, device=device)
        spans = teacher_forcing_spans(frames // geometry.block, block_len)
        groups = group_teacher_forcing(visible, block_len, spans)
        return {"mask": groups, "frames": torch.arange(frames, device=device).repeat(2)}
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


@contextmanager
def _gradients_dropped(network: nn.Module) -> Iterator[None]:
    """Let no gradient of a weight outlive the moment at which it is there."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    handles = [parameter.register_post_accumulate_grad_hook(drop) for parameter in trained]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@lru_cache(maxsize=16)
def head_memory(width: int, hidden: int, tokens: int, *, is_bf16: bool) -> tuple[int, int]:
    """Bytes of one layer's S-MLP in training, for one sample: kept, and the most in either pass."""
    with FakeTensorMode():  # it turns autocast off, and torch knows no autocast on `meta`
        network = SalienceMLP(width, hidden)
        read = torch.empty(1, tokens, width, dtype=torch.bfloat16 if is_bf16 else torch.float32)
        with LiveBytes((*network.parameters(), read)) as live:
            predicted = network(read)
            kept, live.peak = live.now, live.now
            with _gradients_dropped(network):
                predicted.sum().backward()
    return kept, live.peak
