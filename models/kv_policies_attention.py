"""Cache policies that look at queries: past, recent and expected ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from models.attention import rotate, split_pairs
from models.kv_policy import CachePolicy, ScoredPolicy, pointed_at, standardised
from models.kv_tokens import Entering, Eviction, Tokens


@dataclass
class AttentionMass(ScoredPolicy):
    """Keep what has been read most: heavy hitters, over all passes.

    Score = attention received so far, summed over queries and mean over heads, divided by the
    passes of a block so that the number of denoising steps does not matter; standardised over
    the cached tokens of a sample before age is charged (our reading, so that one age grid fits
    all scored policies).

    Source: H2O, arXiv:2306.14048, section 4.

    Attributes:
        decay: Factor on the mass per block; 1 = cumulative as in H2O.
    """

    name: ClassVar[str] = "attention_mass"
    observes_attention: ClassVar[bool] = True
    age_weight: float = 0.0
    decay: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay <= 1:
            raise ValueError(
                f"decay of policy 'attention_mass' must be in [0, 1], got {self.decay}"
            )

    def describe(self, entering: Entering) -> Tensor:
        """No attention yet."""
        return entering.hidden.new_zeros((*entering.hidden.shape[:2], 1), dtype=torch.float32)

    def observe(self, features: Tensor, mass: Tensor) -> Tensor:
        """Add the attention of one block."""
        described = features[..., :1] * self.decay + mass[..., None]
        return torch.cat([described, features[..., 1:]], dim=-1)

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Standardised mass."""
        return standardised(features[..., 0])


@dataclass
class Participative(CachePolicy):
    """A deep sink, the newest frames, and in between what recent queries point at.

    Score = sum over heads and over the clean queries of the last `query_blocks` blocks of q . k,
    both rotated, without a softmax. The sink takes `sink_share` of the budget, far beyond the sink
    frames of other policies. Deep Forcing prunes in the first noisy pass of a block and moves its
    sink in time; we prune after the clean pass, as all policies here, and `relative` time moves it.

    Source: Deep Forcing, arXiv:2512.05081 (participative compression; the sum without softmax is
    from a port, the paper's text was not at hand).

    Attributes:
        sink_share: Of the budget, for the first frames.
        query_blocks: Blocks whose queries count.
    """

    name: ClassVar[str] = "participative"
    sink_share: float = 0.5
    query_blocks: int = 2

    def __post_init__(self) -> None:
        if not 0 <= self.sink_share <= 1 or self.query_blocks < 1:
            raise ValueError(
                "sink_share of policy 'participative' must be in [0, 1] and query_blocks at least "
                f"1, got {self.sink_share} and {self.query_blocks}"
            )

    def enter(self, entering: Entering) -> Tensor:
        """Score by the block's own queries, and empty columns for blocks before it."""
        features = entering.hidden.new_zeros(
            (*entering.hidden.shape[:2], self.query_blocks), dtype=torch.float32
        )
        features[..., 0] = pointed_at(
            entering.projected.rotated_queries, entering.projected.rotated_keys
        )
        return features

    def renew(self, held: Tokens, rotated_keys: Callable[[], Tensor], entering: Entering) -> Tensor:
        """Newest block first."""
        newest = pointed_at(entering.projected.rotated_queries, rotated_keys())
        return torch.cat([newest[..., None], held.features[..., :-1]], dim=-1)

    def rank(self, eviction: Eviction) -> Tensor:
        """Recent scores; whole frames of the deep sink above all others."""
        spec = eviction.spec
        room = eviction.budget - spec.protected_frames * spec.tokens_per_frame
        depth = min(int(self.sink_share * eviction.budget), room) // spec.tokens_per_frame
        in_sink = eviction.tokens.positions[..., 0] < depth
        return eviction.tokens.features.sum(dim=-1).masked_fill(in_sink, torch.inf)


@dataclass
class FutureQuery(ScoredPolicy):
    """Keep what the coming queries are expected to read, going by the statistics of past ones.

    Queries before rotation hardly change their distribution over a video. With their mean mu and
    their variance per channel pair, both per head and running over all clean passes, a normal query
    of the coming block has E[exp(q . k / D^0.5)] = exp(mu_R . k / D^0.5 + sum_p var_p |k_p|^2 /
    (2 D)), where mu_R is mu rotated to the coming block's places and averaged over them, and k_p a
    rotated channel pair. Score = mean over heads of the softmax of that over the cached tokens,
    times ||v||; standardised.

    Source: Expected Attention, arXiv:2510.00636; Future Forcing, arXiv:2605.30083 and DapQ use the
    same idea for video. One variance for both channels of a pair, which rotation leaves alone, and
    the coming block as the only horizon are our reading.
    """

    name: ClassVar[str] = "future_query"

    def remember(self, memory: Tensor | None, entering: Entering) -> Tensor:
        """Sums over all queries so far: count, pairs, squared length of pairs.  [B, N, D/2, 4]."""
        pairs = split_pairs(entering.projected.queries)  # [B, N, S, D / 2, 2]
        count = torch.full_like(pairs[:, :, 0, :, :1], pairs.shape[2])
        sums = torch.cat([count, pairs.sum(2), pairs.square().sum((2, 4))[..., None]], dim=-1)
        return sums if memory is None else memory + sums

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Standardised expected attention times the norm of the value."""
        assert eviction.memory is not None, "a block enters before anything is evicted"
        keys, values = eviction.tokens.read()
        scale = keys.shape[-1] ** -0.5
        count, mean, square = eviction.memory.split([1, 2, 1], dim=-1)
        mean, square = mean / count, (square / count)[..., 0]
        variance = (square - mean.square().sum(-1)).clamp(min=0) / 2  # [B, N, D / 2]
        turned = torch.view_as_complex(mean.contiguous()) * eviction.query_angles().mean(dim=0)
        coming = torch.view_as_real(turned).flatten(-2)  # [B, N, D]
        rotated = rotate(keys.float(), eviction.key_angles())
        with torch.autocast(keys.device.type, enabled=False):  # ranks want all digits
            logits = (rotated @ coming[..., None])[..., 0] * scale
            spread = split_pairs(keys).square().sum(-1) @ variance[..., None]  # [B, N, S, 1]
        expected = (logits + spread[..., 0] * scale**2 / 2).softmax(dim=-1)
        return standardised((expected * values.float().norm(dim=-1)).mean(dim=1))
