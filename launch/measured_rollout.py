"""A rollout that can be measured: network of any size, its cache, its clock, its physical bound.

Weights, text and noise are random: no policy's speed hangs on what is shown.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from data.codec import TransformCodec
from models.block import Block
from models.flow import sampling_sigmas
from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import NoiseSource, Sampler, denoise_block, make_cache, refresh
from models.salience import SalienceHead
from models.transformer import VideoTransformer

STORAGES: dict[str, dict[str, Any]] = {
    "model": {},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "low": {"evicted": "low"},
    "offload": {"evicted": "offload"},
}
"""What a cache does besides dropping tokens, by name: fields of `CacheSpec`."""
SAMPLER = Sampler(sampling_sigmas(4, 5.0), renoise=True)
CHANNELS, PATCH, STRIDE = 16, 2, 8
"""Channels of a latent, and side of a token in latents and of a latent in pixels, as in Wan2.1."""
SCORING = ("enter", "renew", "remember", "observe")
"""What a policy is asked while a block enters, before it evicts."""
PARTS = ("denoise", "refresh", "score", "evict", "decode")


@dataclass(frozen=True)
class Scene:
    """Sizes of a network of Wan2.1's proportions, of its video and of its cache.

    Attributes:
        layers: Of the network.
        heads: Attention heads.
        head_dim: Channels of a head.
        grid: Token (rows, columns) of a frame.
        block: Frames of a block.
        budget_frames: Frames whose tokens the cache keeps.
        blocks: Of the video.
        dtype: Of weights and cache.
        device: Where all of it is.
    """

    layers: int
    heads: int
    head_dim: int
    grid: tuple[int, int]
    block: int
    budget_frames: int
    blocks: int
    dtype: torch.dtype
    device: str

    def sizes(self) -> dict[str, int]:
        """What follows from the sizes; text and S-MLP of 1.3B have 512 x 4096 and 384."""
        width, per_frame = self.heads * self.head_dim, self.grid[0] * self.grid[1]
        return {
            "width": width,
            "ffn_dim": width * 35 // 6,
            "text_rows": width // 3,
            "text_dim": width * 8 // 3,
            "mlp_hidden": width // 4,
            "tokens_per_frame": per_frame,
            "block_tokens": per_frame * self.block,
            "budget_tokens": per_frame * self.budget_frames,
        }

    def cache_spec(self, storage: str) -> CacheSpec:
        """A cache in memory that is taken once.

        Args:
            storage: A name in `STORAGES`; where evicted tokens live on, a quarter of the budget of
                them can be read.
        """
        sizes, fields = self.sizes(), STORAGES[storage]
        return CacheSpec(
            budget_tokens=sizes["budget_tokens"],
            tokens_per_frame=sizes["tokens_per_frame"],
            frames_per_block=self.block,
            preallocate=True,
            max_frames=self.blocks * self.block,
            evicted_tokens=max(1, sizes["budget_tokens"] // 4) if "evicted" in fields else 0,
            **fields,
        )

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """(F, C, H, W) of a block of latents."""
        return self.block, CHANNELS, PATCH * self.grid[0], PATCH * self.grid[1]

    def network(self) -> VideoTransformer:
        """Random weights."""
        sizes = self.sizes()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = VideoTransformer(
                num_layers=self.layers,
                num_heads=self.heads,
                head_dim=self.head_dim,
                ffn_dim=sizes["ffn_dim"],
                freq_dim=256,
                text_dim=sizes["text_dim"],
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                patch_size=(1, PATCH, PATCH),
            )
        return network.to(self.device, self.dtype).requires_grad_(False).eval()

    def text(self) -> Tensor:
        """A random caption.  [1, T, text_dim]."""
        sizes = self.sizes()
        text = torch.randn(
            1, sizes["text_rows"], sizes["text_dim"], generator=torch.Generator().manual_seed(2)
        )
        return text.to(self.device, self.dtype)

    def cache(self, network: VideoTransformer, *, policy: str, storage: str) -> KVCache:
        """An empty cache; head and targets, if the policy needs them, are random."""
        built, sizes = build_policy(policy), self.sizes()
        head = targets = None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            if built.needs_head:
                head = SalienceHead(
                    num_layers=self.layers,
                    width=sizes["width"],
                    hidden=sizes["mlp_hidden"],
                    grid=self.grid,
                )
                head.to(self.device).requires_grad_(False)
            if built.needs_targets:
                video = self.blocks * sizes["block_tokens"]
                targets = torch.rand(self.layers, 1, video, 3).to(self.device)
        return make_cache(
            network,
            spec=self.cache_spec(storage),
            policy=built,
            seeds=torch.zeros(1, dtype=torch.int64, device=self.device),
            head=head,
            targets=targets,
        )


@dataclass
class MeasuredRollout:
    """One video that is generated under one cache.

    Attributes:
        network: Student.
        cache: Of the video.
        shape: (F, C, H, W) of a block.
        text: [1, T, text_dim]
        latest: The newest block, float32.  [1, F, C, H, W]
    """

    network: VideoTransformer
    cache: KVCache
    shape: tuple[int, int, int, int]
    text: Tensor
    latest: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.noise = NoiseSource(self.cache.seeds)
        self.codec = TransformCodec(STRIDE, CHANNELS)

    def _student(self, latents: Tensor, sigma: Tensor, text: Tensor, **around: Any) -> Tensor:
        """The network in its precision, on latents that stay in float32 between passes."""
        return self.network(latents.to(text.dtype), sigma, text, **around)

    def denoise(self) -> None:
        """Make the next block."""
        self.latest = denoise_block(
            self._student,
            self.text,
            cache=self.cache,
            noise=self.noise,
            shape=self.shape,
            sampler=SAMPLER,
        )

    def refresh(self) -> None:
        """Write the newest block into the cache."""
        refresh(self._student, self.text, self.latest, cache=self.cache)

    def advance(self) -> None:
        """Make and write a block: what is timed."""
        self.denoise()
        self.refresh()

    def decode(self) -> Tensor:
        """Frames of the newest block."""
        return self.codec.decode(self.latest)

    def fill(self, num_blocks: int) -> None:
        """Write blocks of noise."""
        for _ in range(num_blocks):
            self.latest = self.noise.draw(self.shape)
            self.refresh()

    def start(self, num_blocks: int) -> None:
        """Write blocks of noise but for the last one, which is made and decoded as all later."""
        self.fill(num_blocks - 1)
        self.advance()
        self.decode()

    def past_tokens(self) -> int:
        """Tokens of a layer that the next block will read, wherever they are stored."""
        self.cache.begin(self.shape[0])
        past = self.cache.past(0)
        assert past is not None, "a block was written"
        return past.keys.shape[2]

    def block_parts(self) -> dict[str, float]:
        """Seconds of `PARTS` while one more block is made.

        `score` is what the policy's methods `SCORING` take, `evict` the rest of taking the block
        into the cache (encode, copy in, rank, choose, copy together), `refresh` the clean pass
        without both. What a policy costs elsewhere (attention that it observes in every pass, a
        bias on its tokens) and the rotation of kept keys for the coming block are in `denoise`
        and `refresh`. On CUDA every part waits for the device, so that none overlaps the next.
        """
        watch = Watch(self.cache.seeds.device.type)
        with watch.on(self.cache, ("append",)), watch.on(self.cache.policy, SCORING):
            whole = {
                name: watch.seconds_of(getattr(self, name))
                for name in ("denoise", "refresh", "decode")
            }
        append, score = watch.seconds["append"], sum(watch.seconds[name] for name in SCORING)
        return whole | {
            "refresh": whole["refresh"] - append,
            "score": score,
            "evict": append - score,
        }


class Watch:
    """Seconds spent in methods of objects, summed by name.

    Args:
        device: Whose work has to be complete before the clock is read.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}

    def seconds_of(self, function: Callable[[], Any]) -> float:
        """Seconds of one call."""
        start = self._now()
        function()
        return self._now() - start

    @contextmanager
    def on(self, owner: object, names: Sequence[str]) -> Iterator[None]:
        """Count the calls of methods of one object while the context lasts."""
        for name in names:
            self.seconds[name] = 0.0
            setattr(owner, name, self._counted(name, getattr(owner, name)))
        try:
            yield
        finally:
            for name in names:
                delattr(owner, name)  # the method of its class again

    def _counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            start = self._now()
            result = method(*args, **kwargs)
            self.seconds[name] += self._now() - start
            return result

        return counted

    def _now(self) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def unavoidable(rollout: MeasuredRollout, *, past_tokens: int) -> Callable[[], None]:
    """The matrix products and the attention without which no block can be made, and nothing else.

    Of each denoising pass and layer: the projections of queries, keys, values and output, those of
    cross-attention's queries and output, both of the feed-forward, over the block's tokens;
    attention of the block over past and own tokens; attention over the text. The refresh is one
    more pass, of whose last layer only keys and values are needed. Not counted: keys and values of
    the text (they could be kept), embeddings, norms, rotations, modulation, activations, the final
    projection, copies, the cache. Bare `F.linear` with the network's own weights and
    `F.scaled_dot_product_attention`, in the network's precision.

    Args:
        rollout: With the network, the text and the size of a block.
        past_tokens: Tokens of a layer that the block reads.

    Returns:
        Does it for one block.
    """
    network, own_tokens = rollout.network, rollout.cache.spec.block_len
    layers = [layer for layer in network.blocks if isinstance(layer, Block)]

    def random(*shape: int) -> Tensor:
        return torch.randn(1, *shape, dtype=rollout.text.dtype, device=rollout.text.device)

    lengths = own_tokens, past_tokens + own_tokens, rollout.text.shape[1]
    queries, read, text = (random(network.num_heads, n, network.head_dim) for n in lengths)
    values = read.clone()
    tokens = random(own_tokens, network.width)
    first: Any = layers[0].ffn[0]
    wide = random(own_tokens, first.out_features)

    def one_layer(block: Block) -> None:
        own, cross = block.self_attn, block.cross_attn
        for linear in (own.q, own.k, own.v, own.o, cross.q, cross.o, block.ffn[0]):
            _product(tokens, linear)
        _product(wide, block.ffn[2])
        F.scaled_dot_product_attention(queries, read, values)
        F.scaled_dot_product_attention(queries, text, text)

    def one_block() -> None:
        for block in [*layers * SAMPLER.num_steps, *layers[:-1]]:
            one_layer(block)
        for linear in (layers[-1].self_attn.k, layers[-1].self_attn.v):
            _product(tokens, linear)

    return one_block


def _product(x: Tensor, linear: Any) -> None:
    F.linear(x, linear.weight, linear.bias)


def shares(seconds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Shares of a block's time that sum to 1: of the median seconds of each part over rounds."""
    median = {name: statistics.median(s[name] for s in seconds) for name in PARTS}
    return {name: value / sum(median.values()) for name, value in median.items()}
