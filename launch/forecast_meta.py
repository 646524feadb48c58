"""What stands in for data, kernels and autocast in passes on torch's device `meta`.

Tensors there have shapes and no memory. Two things that torch does not do with them are put in
their places: attention by a kernel that keeps no scores, and the rules of autocast.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.attention import grid_positions
from models.kv_memory import Attending, Past
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import make_cache, refresh
from models.transformer import VideoTransformer
from train.lora import target_layers


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operators made while it was on and that still exist.

    Args:
        known: Tensors that were there before; views of them are nothing new.

    Attributes:
        now: So many.
        peak: The most so far; may be set back.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, Any] = {x.untyped_storage()._cdata: None for x in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator as it would run otherwise, and note what it made."""
        result = _run(func, args, kwargs or {})
        for made in _tensors(result):
            self._note(made.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return

        def forget(_: Any) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, forget)
        self.now += size


_made: dict[tuple[Any, ...], Any] = {}
"""What operators make of arguments of some shapes on `meta`; None where it is no new tensor."""


def _run(func: Any, args: Any, kwargs: Mapping[str, Any]) -> Any:
    """The result of an operator; if there is no data, shapes seen before are not asked for again.

    Torch works them out in Python, which takes a hundred times as long.
    """
    if not _makes_tensors(func):
        return func(*args, **kwargs)
    given = list(_tensors((args, *kwargs.values())))
    if not given or any(type(x) not in (Tensor, nn.Parameter) or not x.is_meta for x in given):
        return func(*args, **kwargs)
    key = (func, _described(args), *((name, _described(x)) for name, x in kwargs.items()))
    known = _made.get(key)
    if known is not None:
        made = tuple(
            torch.empty_strided(*shape, dtype=kind, device="meta") for *shape, kind in known
        )
        return made if len(func._schema.returns) > 1 else made[0]
    result = func(*args, **kwargs)
    if key not in _made:
        storages = {x.untyped_storage()._cdata for x in given}
        made = result if isinstance(result, tuple) else (result,)
        is_new = all(
            isinstance(x, Tensor) and x.untyped_storage()._cdata not in storages for x in made
        )
        _made[key] = _described(made) if is_new else None
    return result


@cache
def _makes_tensors(func: Any) -> bool:
    """Whether no result of an operator is, or looks into, one of its arguments."""
    return all(result.alias_info is None for result in func._schema.returns)


def _tensors(found: Any) -> Iterator[Tensor]:
    """Those in what an operator takes or makes."""
    if isinstance(found, Tensor):
        yield found
    elif isinstance(found, (list, tuple)):
        for x in found:
            yield from _tensors(x)


def _described(found: Any) -> Any:
    """An argument of an operator as far as shapes follow from it; 1, 1.0 and True differ."""
    if isinstance(found, Tensor):
        return found.shape, found.stride(), found.dtype
    if isinstance(found, (list, tuple)):
        return tuple(_described(x) for x in found)
    return type(found), found


class AdaptedLinear(nn.Module):
    """A linear layer with the factors of an adapter, as `peft` computes it.

    That library takes longer to load than a forecast takes.

    Args:
        base: The layer, which is frozen.
        rank: Of the factors.
    """

    def __init__(self, base: nn.Linear, rank: int) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        device = base.weight.device
        self.first = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.second = nn.Linear(rank, base.out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's result and that of the factors, which are given float32."""
        result = self.base(x)
        kind, x = result.dtype, x.float()  # held until the end
        result = result + self.second(self.first(x)) * 0.5  # alpha / rank, of any value
        return result.to(kind)


def adapt(network: VideoTransformer, rank: int, targets: Sequence[str]) -> None:
    """Freeze a network and put `AdaptedLinear` in place of the layers that are targets."""
    network.requires_grad_(False)
    for name in target_layers(network, targets, key="lora.targets"):
        parent, _, child = name.rpartition(".")
        layer = network.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        setattr(network.get_submodule(parent), child, AdaptedLinear(layer, rank))


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
        """In bfloat16, if a product reads it so; nothing is cached, see `Stage.autocast`."""
        is_wide = self.is_bf16 and isinstance(x, Tensor) and x.dtype == torch.float32
        return x.to(torch.bfloat16) if is_wide else x


class FilledCache:
    """Stands in for `KVCache` in passes that read: so many tokens in every layer, made when asked.

    Args:
        network: That reads.
        count: Tokens of each layer.
        samples: Videos.
        types: Of keys and values.
    """

    def __init__(
        self,
        network: VideoTransformer,
        count: int,
        *,
        samples: int,
        types: tuple[torch.dtype, torch.dtype],
    ) -> None:
        self.shape = (samples, network.num_heads, count, network.head_dim)
        self.types, self.device = types, network.patch_embedding.weight.device
        self.frames = 0

    def begin(self, count: int) -> None:
        """Announce a block of `count` frames."""
        self.frames = count

    def positions(self, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Of the block's tokens."""
        found = grid_positions(torch.arange(self.frames, device=self.device), *grid)
        return found, found

    def past(self, layer: int) -> Past | None:
        """What a layer reads."""
        if not self.shape[2]:
            return None
        keys, values = (
            torch.empty(self.shape, dtype=kind, device=self.device) for kind in self.types
        )
        return Past(keys, values, None, Attending())


class PlainProbe:
    """Attends to all queries, as the one that makes salience targets."""

    def attend(self, layer: int, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """See `models.block.Probe`."""
        return F.scaled_dot_product_attention(queries, keys, values)


@cache
def kv_types(is_bf16: bool) -> tuple[torch.dtype, torch.dtype]:
    """Of cached keys and values: asked of the smallest student there is, on the CPU."""
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        student = VideoTransformer(
            num_layers=1, num_heads=1, head_dim=12, ffn_dim=4, freq_dim=4, text_dim=4
        )
        spec = CacheSpec(budget_tokens=3, tokens_per_frame=1, frames_per_block=1)
        past = make_cache(
            student, spec=spec, policy=build_policy("fifo", {}), seeds=torch.zeros(1).long()
        )
        block, text = torch.zeros(1, 1, 16, 2, 2), torch.zeros(1, 1, 4)
        with torch.autocast("cpu", dtype=torch.bfloat16) if is_bf16 else nullcontext():
            refresh(student, text, block, cache=past)
    (held,) = past.layers
    assert held is not None
    parts = held.parts
    return parts["keys"].dtype, parts["values"].dtype
