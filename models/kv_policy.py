"""What a policy of the KV cache is: what it sees, what it decides, and the registry of all.

To add a policy, write one class in `models/kv_policies.py`: a dataclass deriving from `CachePolicy`
(or `ScoredPolicy`) with a `name`. Its fields are its parameters in YAML; being defined registers it
for training, sampling, evaluation, benchmarks and the contract tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from models.kv_tokens import Entering, Eviction, Tokens

POLICIES: dict[str, type[CachePolicy]] = {}


class CachePolicy:
    """Decides which tokens stay when a block has entered and the budget is exceeded.

    Sink and recent frames are protected by the cache itself and never ranked away.
    """

    name: ClassVar[str]
    is_bounded: ClassVar[bool] = True
    protects_sink: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    needs_targets: ClassVar[bool] = False
    observes_attention: ClassVar[bool] = False
    changes_tokens: ClassVar[bool] = False
    """Whether what stays may differ from what entered, as after a merge."""
    acts_every_block: ClassVar[bool] = False
    """Whether `evict` is called after every block, not only above the budget."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            return
        if cls.name in POLICIES:
            raise TypeError(f"policy name '{cls.name}' is taken by {POLICIES[cls.name].__name__}")
        POLICIES[cls.name] = cls

    def enter(self, entering: Entering) -> Tensor:
        """Features remembered for each entering token.  [B, S, K]; none by default."""
        return _no_features(entering)

    def remember(self, memory: Tensor | None, entering: Entering) -> Tensor | None:
        """What to know of the layer's past besides its tokens, once a block has entered.

        Args:
            memory: What the last call returned; None at first.  [B, ...]
            entering: The block.
        """
        return None

    def renew(self, held: Tokens, rotated_keys: Callable[[], Tensor], entering: Entering) -> Tensor:
        """Features of the tokens that are there when a block enters.  [B, S, K].

        Args:
            held: Without the block's tokens.
            rotated_keys: Makes their keys as the block read them.  [B, N, S, D]
            entering: The block.
        """
        return held.features

    def observe(self, features: Tensor, mass: Tensor) -> Tensor:
        """New features once a block is finished; only if `observes_attention`.

        Args:
            features: [B, S, K]
            mass: Attention each token received while the block was made: summed over queries,
                mean over heads and over the forward passes of a block.  [B, S]
        """
        raise TypeError(f"policy '{self.name}' does not observe attention")

    def rank(self, eviction: Eviction) -> Tensor:
        """How much each token is worth keeping, higher = keep.  float32 [B, S]."""
        raise TypeError(f"policy '{self.name}' does not rank")

    def evict(self, eviction: Eviction) -> tuple[Tokens, Tensor]:
        """The tokens that stay, at most `eviction.budget`, in order of time.

        Returns:
            Tokens, and the indices of those that go, [B, n]; n = 0 if nothing is left of them.
        """
        rank = self.rank(eviction).float().masked_fill(eviction.protected, torch.inf)
        # A stable sort breaks ties by age, the same on every device.
        order = rank.argsort(dim=1, descending=True, stable=True)
        kept = order[:, : eviction.budget].sort(dim=1).values
        return eviction.tokens.select(kept), order[:, eviction.budget :].sort(dim=1).values

    def logit_bias(self, tokens: Tokens) -> Tensor | None:
        """Added to the attention scores of the tokens, [B, S]; None adds nothing."""
        return None


def _no_features(entering: Entering) -> Tensor:
    return entering.hidden.new_zeros((*entering.positions.shape[:2], 0), dtype=torch.float32)


@dataclass
class ScoredPolicy(CachePolicy):
    """A score in standard deviations, less a charge for age and one for redundancy.

    Rank = score - age_weight * age in blocks - redundancy_weight * redundancy. A score that was
    given when a token entered cannot see copies: old copies of one content win ties and pile up.
    Redundancy is the largest cosine of the token's key (before rotation, all heads joined) with
    the key of any newer token; -1 until a newer one has come.

    Attributes:
        age_weight: Per block of age.
        redundancy_weight: Of the redundancy; 0 leaves it uncomputed.
    """

    age_weight: float = 0.05
    redundancy_weight: float = 0.0

    def describe(self, entering: Entering) -> Tensor:
        """Features that the score needs.  [B, S, K]; none by default."""
        return _no_features(entering)

    def renew_description(
        self, held: Tokens, features: Tensor, rotated_keys: Callable[[], Tensor], entering: Entering
    ) -> Tensor:
        """As `renew`, for the columns of `describe`, which are `features`."""
        return features

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Score of each token from the columns of `describe`.  [B, S]."""
        raise TypeError(f"policy '{self.name}' does not score")

    def enter(self, entering: Entering) -> Tensor:
        """The description, and a column of redundancy if that counts."""
        described = self.describe(entering)
        if self.redundancy_weight == 0:
            return described
        return torch.cat([described, described.new_full((*described.shape[:2], 1), -1.0)], dim=-1)

    def renew(self, held: Tokens, rotated_keys: Callable[[], Tensor], entering: Entering) -> Tensor:
        """The description renewed, and redundancy raised by newer tokens like it."""
        if self.redundancy_weight == 0:
            return self.renew_description(held, held.features, rotated_keys, entering)
        features, before = held.features[..., :-1], held.features[..., -1]
        renewed = self.renew_description(held, features, rotated_keys, entering)
        similar, _ = nearest(held.read()[0], entering.projected.keys)
        return torch.cat([renewed, torch.maximum(before, similar)[..., None]], dim=-1)

    def rank(self, eviction: Eviction) -> Tensor:
        """Score less the charges."""
        features = eviction.tokens.features
        charge = self.age_weight * eviction.age
        if self.redundancy_weight != 0:
            features, redundancy = features[..., :-1], features[..., -1]
            charge = charge + self.redundancy_weight * redundancy
        return self.score(eviction, features) - charge


def standardised(score: Tensor) -> Tensor:
    """Score over the cached tokens of a sample with mean 0 and deviation 1.  [B, S].

    So that one grid of age weights fits policies whose scores have different units.
    """
    spread = score.std(dim=1, keepdim=True).clamp(min=1e-6)
    return (score - score.mean(dim=1, keepdim=True)) / spread


def nearest(
    keys: Tensor, others: Tensor, *, frames: Tensor | None = None, max_tile_values: int = 1 << 24
) -> tuple[Tensor, Tensor]:
    """For each key the most similar of the others: cosine of all heads joined, and its index.

    Args:
        keys: [B, N, S, D]
        others: [B, N, T, D]
        frames: If given, of both keys and others, which are then the same tokens: only those of
            later frames count.  [B, S]
        max_tile_values: Cosines held at once.

    Returns:
        Cosine in float32, -inf where nothing counts, and index into `others`.  [B, S] each
    """
    unit = F.normalize(_joined(others), dim=-1).transpose(1, 2)
    rows = max(1, max_tile_values // max(1, unit.shape[0] * unit.shape[2]))
    found = []
    for start in range(0, keys.shape[2], rows):
        part = _joined(keys[:, :, start : start + rows])
        # In bfloat16, near copies could not be told apart.
        with torch.autocast(keys.device.type, enabled=False):
            cosine = F.normalize(part, dim=-1) @ unit
        if frames is not None:
            later = frames[:, None, :] > frames[:, start : start + rows, None]
            cosine = cosine.masked_fill(~later, -torch.inf)
        found.append(cosine.max(dim=-1))
    return torch.cat([f.values for f in found], 1), torch.cat([f.indices for f in found], 1)


def pointed_at(queries: Tensor, keys: Tensor) -> Tensor:
    """Mean over queries and heads of q . k / D^0.5, no softmax: one product with the mean query.

    Args:
        queries: [B, N, Q, D]
        keys: [B, N, S, D]

    Returns:
        float32.  [B, S]
    """
    mean = queries.float().mean(dim=2, keepdim=True)
    with torch.autocast(keys.device.type, enabled=False):
        products = (keys.float() @ mean.transpose(2, 3))[..., 0]
    return products.mean(dim=1) * queries.shape[-1] ** -0.5


def _joined(keys: Tensor) -> Tensor:
    return keys.transpose(1, 2).flatten(2).float()


def hash_uniform(seeds: Tensor, *integers: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) as a pure function of integers: no state, no order of drawing.

    A splitmix64 finaliser over the arguments; one sample's numbers never depend on its batch.

    Args:
        seeds: int64, broadcast with the rest.
        integers: int64 tensors or ints.
    """
    state = seeds
    for integer in integers:
        step = (integer + 1) * _GOLDEN
        if isinstance(step, int):
            step = (step + 2**63) % 2**64 - 2**63  # as a product of int64 wraps
        state = _mix(state + step)
    return (state & ((1 << 53) - 1)).double().mul(2.0**-53).float().clamp(max=1 - 2**-24)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer; products wrap


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic
