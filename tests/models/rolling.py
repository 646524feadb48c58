"""A small student, a cache for it and a rollout, shared by the tests of the cache."""

import torch

from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import NoiseSource, Sampler, generate_blocks, make_cache
from models.salience import SalienceHead

SINK, RECENT, BLOCK, PLACES = 1, 2, 2, 6
GEOMETRY = {"frames_per_block": BLOCK, "sink_frames": SINK, "recent_frames": RECENT}
SAMPLER = Sampler([1.0, 0.5, 0.0])


def head() -> SalienceHead:
    """Untrained, with statistics of its own."""
    torch.manual_seed(1)
    made = SalienceHead(num_layers=2, width=24, hidden=8, grid=(2, 3))
    made.place.normal_()
    return made


def targets(seeds) -> torch.Tensor:
    """Made up, by sample, for 400 frames; a few are undefined.  [L, B, S, 3]."""
    parts = [torch.rand(2, 2400, 3, generator=torch.Generator().manual_seed(s)) for s in seeds]
    made = torch.stack(parts, dim=1)
    made[..., ::7, 0] = torch.nan
    return made


def new_cache(
    network, policy="salience", *, budget=36, seeds=(5, 6), params=None, **spec
) -> KVCache:
    """An empty cache for frames of two by three tokens and blocks of two frames."""
    return make_cache(
        network,
        spec=CacheSpec(budget_tokens=budget, tokens_per_frame=PLACES, **{**GEOMETRY, **spec}),
        policy=build_policy(policy, params),
        seeds=torch.tensor(seeds),
        head=head(),
        targets=targets(seeds),
    )


def roll(network, cache, num_frames, *, prefix=None) -> torch.Tensor:
    """A video of the cache's samples, whose caption and noise follow from their seeds."""
    seeds, dtype = cache.seeds, network.head.head.weight.dtype
    text = torch.stack(
        [torch.randn(3, 8, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
    )
    blocks = generate_blocks(
        network,
        text.to(dtype),
        cache=cache,
        noise=TypedNoise(seeds, dtype),
        num_frames=num_frames,
        latent_shape=(16, 2, 3),
        sampler=SAMPLER,
        prefix=prefix,
    )
    return torch.cat(list(blocks), dim=1)


class TypedNoise(NoiseSource):
    """In the precision of the network."""

    def __init__(self, seeds, dtype):
        super().__init__(seeds)
        self.dtype = dtype

    def draw(self, shape):
        return super().draw(shape).to(self.dtype)
