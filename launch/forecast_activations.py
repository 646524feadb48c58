"""How much memory a network pass takes, from the network's own code run on tensors without data.

Tensors on torch's device `meta` have shapes and no memory, so a pass of any size takes a moment.
The network gets three layers; further ones are as the second. Two things that torch does not do on
`meta` are put in their places: attention by a kernel that keeps no scores, and the rules of
autocast. CUDA's kernels for masks pad, and its libraries have workspaces; neither is known here.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from launch.forecast_flops import group_spans
from launch.forecast_passes import CAUSAL, PAIRED, PROBED, Pass
from models.attention import (
    block_causal_mask,
    grid_positions,
    group_teacher_forcing,
    teacher_forcing_mask,
)
from models.kv_memory import Attending, Past
from models.salience import SalienceMLP
from models.transformer import VideoTransformer

LAYERS = 3
"""Of the network that runs in place of a deeper one."""


@dataclass(frozen=True)
class PassMemory:
    """Bytes that a pass takes, besides inputs, parameters, their gradients and bfloat16 copies.

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
    """

    network: tuple[tuple[str, Any], ...]
    block: int
    size: tuple[int, int]
    rows: int
    is_bf16: bool


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made while it was on and that still exist.

    Args:
        known: Tensors that were there before; views of them are nothing new.

    Attributes:
        now: So many, copies of weights left out.
        peak: The most so far; may be set back.
        copies: Bytes of live copies of weights in another type.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.copies = 0
        self._alive: dict[int, Any] = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator as it would run otherwise, and note what it made."""
        result = func(*args, **(kwargs or {}))
        is_cast = func is torch.ops.aten._to_copy.default and isinstance(args[0], nn.Parameter)
        is_copy = is_cast and args[0].requires_grad
        for made in tree_iter(result):
            if isinstance(made, Tensor):
                self._note(made.untyped_storage(), is_copy)
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage, is_copy: bool) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self._add(-size, is_copy)

        self._alive[key] = weakref.ref(storage, forget)
        self._add(size, is_copy)

    def _add(self, size: int, is_copy: bool) -> None:
        if is_copy:
            self.copies += size
        else:
            self.now += size


class Attention(torch.autograd.Function):
    """Softmax attention without data: one output, one number per query; no scores are kept."""

    @staticmethod
    def forward(ctx: Any, queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
        """Keep what a flash kernel keeps."""
        output = torch.empty_like(queries)
        lse = queries.new_empty(queries.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(queries, keys, values, mask, output, lse)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of queries, keys and values."""
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class Rules:
    """What `torch.nn.functional` does on `meta` in place of what it does elsewhere.

    Args:
        is_bf16: Whether products read bfloat16, as under autocast.
        norms_in_float32: As on CUDA; autocast on a CPU leaves norms as they are.
    """

    def __init__(self, *, is_bf16: bool, norms_in_float32: bool = True) -> None:
        self.is_bf16, self.norms_in_float32 = is_bf16, norms_in_float32
        self._copies: dict[int, Tensor] = {}
        self._own = {name: getattr(F, name) for name in ("linear", "conv3d", "layer_norm")}

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Until the end of the block, for passes on `meta` alone."""
        # Not by a mode of torch's: those are off where layers are recomputed.
        replaced = {
            "scaled_dot_product_attention": self._attend,
            "linear": self._product("linear"),
            "conv3d": self._product("conv3d"),
            "layer_norm": self._norm,
        }
        before = {name: getattr(F, name) for name in replaced}
        try:
            for name, function in replaced.items():
                setattr(F, name, function)
            yield
        finally:
            for name, function in before.items():
                setattr(F, name, function)

    def _attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, attn_mask: Tensor | None = None
    ) -> Any:
        read = (self._narrow(x) for x in (queries, keys, values, attn_mask))
        return Attention.apply(*read)

    def _product(self, name: str) -> Callable[..., Tensor]:
        function = self._own[name]
        return lambda *args: function(*(self._narrow(x) for x in args))

    def _norm(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        wide = x.float() if self.is_bf16 and self.norms_in_float32 else x
        return self._own["layer_norm"](wide, *args, **kwargs)

    def _narrow(self, x: Any) -> Any:
        """In bfloat16, if a product reads it so; weights in training are converted once."""
        if not (self.is_bf16 and isinstance(x, Tensor) and x.dtype == torch.float32):
            return x
        if not (isinstance(x, nn.Parameter) and x.requires_grad):
            return x.to(torch.bfloat16)
        if id(x) not in self._copies:
            with torch.enable_grad():
                self._copies[id(x)] = x.to(torch.bfloat16)
        return self._copies[id(x)]


class FilledCache:
    """Stands in for `KVCache` in passes that read: so many tokens in every layer, made when asked.

    Args:
        network: That reads.
        count: Tokens of each layer.
        is_bf16: Whether autocast is on.
    """

    def __init__(self, network: VideoTransformer, count: int, *, is_bf16: bool) -> None:
        self.shape = (1, network.num_heads, count, network.head_dim)
        self.types = kv_types(is_bf16)
        self.frames = 0

    def begin(self, count: int) -> None:
        """Announce a block of `count` frames."""
        self.frames = count

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of the block's tokens."""
        found = grid_positions(torch.arange(self.frames), *grid)
        return found, found

    def past(self, layer: int) -> Past | None:
        """What a layer reads."""
        if not self.shape[2]:
            return None
        keys, values = (torch.empty(self.shape, dtype=kind) for kind in self.types)
        return Past(keys, values, None, Attending())


class PlainProbe:
    """Attends to all queries, as the one that makes salience targets."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `models.block.Probe`."""
        return F.scaled_dot_product_attention(queries, keys, values)


def kv_types(is_bf16: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of cached keys and values: the weight of the norm of keys, a float32, makes keys float32."""
    return torch.float32, torch.bfloat16 if is_bf16 else torch.float32


@lru_cache(maxsize=256)
def pass_memory(geometry: Geometry, found: Pass, *, recomputes: bool) -> PassMemory:
    """What a pass of one sample takes.

    Args:
        geometry: Sizes.
        found: The pass; `network`, `scored` and `count` do not matter.
        recomputes: Whether layers keep their inputs only.
    """
    with torch.device("meta"):
        network = VideoTransformer(**dict(geometry.network) | {"num_layers": LAYERS})
    network.recomputes_activations = recomputes
    with torch.device("meta"), Rules(is_bf16=geometry.is_bf16).in_force():
        return run_pass(network, geometry, found)


def run_pass(network: VideoTransformer, geometry: Geometry, found: Pass) -> PassMemory:
    """Run a pass, and the backward pass if there is one, and scale up to all layers."""
    network.requires_grad_(found.with_grad)
    more_layers = dict(geometry.network)["num_layers"] - network.num_layers
    latents = torch.randn(1, found.frames, network.patch_embedding.in_channels, *geometry.size)
    sigma = torch.rand(1, found.frames)
    text = torch.randn(1, geometry.rows, dict(geometry.network)["text_dim"])
    entered: list[int] = []
    known = (*network.parameters(), latents, sigma, text)
    with LiveBytes(known) as live, _watched(network, live, entered):
        captured: list[Tensor] = []
        options = _options(network, geometry, found, captured)
        with torch.set_grad_enabled(found.with_grad):
            velocity = network(latents, sigma, text, wanted=found.wanted, **options)
        options.clear()
        kept, forward = live.now, live.peak
        live.peak = live.now
        if found.with_grad:
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            velocity.sum().backward()
        backward = live.peak
    # At the first layer's entry there is less: nothing is left yet of a layer before.
    inner = (entered[2] - entered[1]) * more_layers
    return PassMemory(kept + inner, forward + inner, backward + inner)


def _options(
    network: VideoTransformer, geometry: Geometry, found: Pass, captured: list[Tensor]
) -> dict[str, Any]:
    """The rest of the arguments of a forward pass."""
    rows, columns = network.patch_size[1:]
    frame_len = geometry.size[0] // rows * (geometry.size[1] // columns)
    block_len = geometry.block * frame_len
    if found.past is not None:
        return {"cache": FilledCache(network, found.past, is_bf16=geometry.is_bf16)}
    if found.attention == PROBED:
        network.probe = PlainProbe()
    elif found.attention == CAUSAL:
        mask = block_causal_mask(found.frames // geometry.block, block_len)
        return {"mask": mask, "capture": lambda layer, hidden, *_: captured.append(hidden)}
    elif found.attention == PAIRED:
        frames = found.frames // 2
        tokens = frames * frame_len
        dense = teacher_forcing_mask(torch.ones(1, tokens, tokens, dtype=torch.bool), block_len)
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


def _drop_gradient(parameter: Tensor) -> None:
    parameter.grad = None


@lru_cache(maxsize=16)
def head_memory(width: int, hidden: int, tokens: int, *, is_bf16: bool) -> tuple[int, int]:
    """Bytes of one layer's S-MLP in training, for one sample: kept, and the most in either pass."""
    with FakeTensorMode():  # it turns autocast off, and torch knows no autocast on `meta`
        network = SalienceMLP(width, hidden)
        read = torch.empty(1, tokens, width, dtype=torch.bfloat16 if is_bf16 else torch.float32)
        with LiveBytes((*network.parameters(), read)) as live:
            predicted = network(read)
            kept, live.peak = live.now, live.now
            for parameter in network.parameters():
                parameter.register_post_accumulate_grad_hook(_drop_gradient)
            predicted.sum().backward()
    return kept, live.peak
