"""What a KV cache keeps: every policy of the project, and their registry.

To add a policy, write one class here: a dataclass deriving from `CachePolicy` with a `name`. Its
fields are its parameters in YAML (`cache.params`); being defined registers it for training,
sampling, evaluation and the contract tests.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from models.salience import SalienceHead

POLICIES: dict[str, type[CachePolicy]] = {}


@dataclass
class Tokens:
    """What a policy may look at: one layer's cached tokens, oldest first.

    Attributes:
        keys: Before rotation.  [B, N, S, D]
        values: [B, N, S, D]
        positions: (frame, row, column).  [B, S, 3]
        features: Columns the policy gave each token when it entered.  [B, S, K]
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    features: Tensor

    def select(self, indices: Tensor) -> Tokens:
        """The tokens at `indices` of each sample.  [B, k]."""

        def gather(x: Tensor, axis: int) -> Tensor:
            shape = [1] * x.dim()
            shape[0], shape[axis] = indices.shape
            expanded = indices.view(shape).expand(*x.shape[:axis], -1, *x.shape[axis + 1 :])
            return x.gather(axis, expanded)

        return Tokens(
            gather(self.keys, 2),
            gather(self.values, 2),
            gather(self.positions, 1),
            gather(self.features, 1),
        )


@dataclass
class Entering:
    """One block's tokens of one layer as they enter the cache.

    Attributes:
        layer: Number of the layer.
        hidden: The layer's input in the clean pass.  [B, S, E]
        positions: (frame, row, column).  [B, S, 3]
        seeds: Seed of each sample.  [B]
        head: The salience head, or None where no policy needs it.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    seeds: Tensor
    head: SalienceHead | None


def hash_uniform(seeds: Tensor, *integers: Tensor | int) -> Tensor:
    """Uniform numbers in [0, 1) as a pure function of integers: no state, no order of drawing.

    A splitmix64 finaliser over the arguments; one sample's numbers never depend on its batch.

    Args:
        seeds: int64, broadcast with the rest.
        integers: int64 tensors or ints.
    """
    state = seeds
    for integer in integers:
        state = _mix(state + torch.as_tensor(integer, device=seeds.device).add(1) * _GOLDEN)
    return (state & ((1 << 53) - 1)).double().mul(2.0**-53).float().clamp(max=1 - 2**-24)


_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer; products wrap


def _mix(z: Tensor) -> Tensor:
    z = (z ^ _shift_right(z, 30)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ _shift_right(z, 27)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ _shift_right(z, 31)


def _shift_right(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # logical, not arithmetic


class CachePolicy:
    """Ranks the tokens that compete for the free slots of the cache.

    Sink and recent frames are protected by the cache itself and never ranked away.
    """

    name: ClassVar[str]
    is_bounded: ClassVar[bool] = True
    protects_sink: ClassVar[bool] = True
    needs_head: ClassVar[bool] = False
    observes_attention: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if cls.name in POLICIES:
            raise TypeError(f"policy name '{cls.name}' is taken by {POLICIES[cls.name].__name__}")
        POLICIES[cls.name] = cls

    def enter(self, tokens: Entering) -> Tensor:
        """Features remembered for each entering token.  [B, S, K]; none by default."""
        return tokens.positions.new_zeros((*tokens.positions.shape[:2], 0), dtype=torch.float32)

    def observe(self, features: Tensor, mass: Tensor) -> Tensor:
        """New features once a block is finished; only if `observes_attention`.

        Args:
            features: [B, S, K]
            mass: Attention each token received while the block was made: summed over queries,
                mean over heads and over the forward passes of a block.  [B, S]
        """
        raise TypeError(f"policy '{self.name}' does not observe attention")

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """How much each token is worth keeping, higher = keep.

        Args:
            tokens: One layer's cached tokens, oldest first.
            age: Blocks since each token's block, 0 for the newest.  [B, S]

        Returns:
            float32.  [B, S]
        """
        raise TypeError(f"policy '{self.name}' does not rank")


@dataclass
class Full(CachePolicy):
    """Keep everything; memory grows with the video. The upper reference within trained lags."""

    name: ClassVar[str] = "full"
    is_bounded: ClassVar[bool] = False


@dataclass
class FirstInFirstOut(CachePolicy):
    """Keep the newest tokens only: the rolling window of Self-Forcing (arXiv:2506.08009)."""

    name: ClassVar[str] = "fifo"
    protects_sink: ClassVar[bool] = False

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """Position in time: oldest first, hence rank by slot."""
        return _slot(age)


@dataclass
class SinkWindow(CachePolicy):
    """Keep the first frames and the newest tokens: LongLive (arXiv:2509.22622)."""

    name: ClassVar[str] = "sink_window"

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """As first-in-first-out; the cache protects the sink."""
        return _slot(age)


@dataclass
class Random(CachePolicy):
    """Keep a random subset: the control for any score.

    Attributes:
        redraw: True: new lots at every eviction (old tokens vanish geometrically). False: one lot
            per token for life.
    """

    name: ClassVar[str] = "random"
    redraw: bool = True

    def enter(self, tokens: Entering) -> Tensor:
        """One lot, from the sample's seed, the layer and the token's position."""
        frame, row, column = tokens.positions.unbind(-1)
        lot = hash_uniform(tokens.seeds[:, None], frame, row, column, tokens.layer)
        return lot[..., None]

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """The lot, hashed with the age where lots are redrawn."""
        lot = tokens.features[..., 0]
        if not self.redraw:
            return lot
        return hash_uniform((lot.double() * 2**24).long(), age)


@dataclass
class AttentionMass(CachePolicy):
    """Keep what has been read most: heavy hitters (H2O, arXiv:2306.14048), over all passes.

    Score = attention received so far, summed over queries and mean over heads, divided by the
    passes of a block so that the number of denoising steps does not matter; standardised over
    the cached tokens of a sample before age is charged (our reading, so that one age grid fits
    all scored policies).

    Attributes:
        age_weight: Charge per block of age, in standard deviations of the score.
        decay: Factor on the mass per block; 1 = cumulative as in H2O.
    """

    name: ClassVar[str] = "attention_mass"
    observes_attention: ClassVar[bool] = True
    age_weight: float = 0.0
    decay: float = 1.0

    def enter(self, tokens: Entering) -> Tensor:
        """No attention yet."""
        return tokens.hidden.new_zeros((*tokens.hidden.shape[:2], 1), dtype=torch.float32)

    def observe(self, features: Tensor, mass: Tensor) -> Tensor:
        """Add the attention of one block."""
        return features * self.decay + mass[..., None]

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """Standardised mass minus the charge for age."""
        mass = tokens.features[..., 0]
        spread = mass.std(dim=1, keepdim=True).clamp(min=1e-6)
        return (mass - mass.mean(dim=1, keepdim=True)) / spread - self.age_weight * age


@dataclass
class PositionPrior(CachePolicy):
    """Keep the places that are worth keeping on average: the strongest trivial rival.

    Score = the mean teacher target of the token's (row, column) and layer, weighted over the three
    parts; it sees where a token is, never what it shows.

    Attributes:
        weights: Of the parts later, within, earlier.
        age_weight: Charge per block of age, in standard deviations of the target.
    """

    name: ClassVar[str] = "position_prior"
    needs_head: ClassVar[bool] = True
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    age_weight: float = 0.05

    def enter(self, tokens: Entering) -> Tensor:
        """The three mean targets of the token's place.  [B, S, 3]."""
        assert tokens.head is not None
        return tokens.head.place_means(tokens.layer, tokens.positions)

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """Weighted mean target minus the charge for age."""
        return _weighted(tokens.features, self.weights) - self.age_weight * age


@dataclass
class Salience(CachePolicy):
    """PaFu-KV (arXiv:2601.21896): keep what the head expects to be read.

    Score = weights . (later, within, earlier) as predicted by the S-MLP from the clean pass alone.
    The split into parts is the paper's; the weights, the standardisation and the charge for age
    are ours: a static salience cannot see redundancy, so copies of one content pile up and old
    copies win ties.

    Attributes:
        weights: Of the parts later, within, earlier; negative values invert.
        age_weight: Charge per block of age, in standard deviations of the target.
    """

    name: ClassVar[str] = "salience"
    needs_head: ClassVar[bool] = True
    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)
    age_weight: float = 0.05

    def enter(self, tokens: Entering) -> Tensor:
        """The head's three standardised predictions.  [B, S, 3]."""
        assert tokens.head is not None
        return tokens.head.predict(tokens.layer, tokens.hidden)

    def rank(self, tokens: Tokens, age: Tensor) -> Tensor:
        """Weighted prediction minus the charge for age."""
        return _weighted(tokens.features, self.weights) - self.age_weight * age


def _slot(age: Tensor) -> Tensor:
    return torch.arange(age.shape[1], device=age.device, dtype=torch.float32).expand_as(age)


def _weighted(features: Tensor, weights: tuple[float, float, float]) -> Tensor:
    return features @ features.new_tensor(weights)


def build_policy(name: str, params: dict[str, Any] | None = None) -> CachePolicy:
    """A policy by name.

    Raises:
        ValueError: If the name or a parameter is unknown, or three weights are not given.
    """
    if name not in POLICIES:
        raise ValueError(f"cache policy '{name}' is unknown; choose one of {sorted(POLICIES)}")
    cls, params = POLICIES[name], dict(params or {})
    known = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for key in params:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"policy '{name}' has no parameter '{key}', only {known}{hint}")
    for key in params.keys() & {"age_weight", "decay"}:
        if not isinstance(params[key], int | float):
            raise ValueError(f"{key} of policy '{name}' must be a number, got {params[key]!r}")
    if "redraw" in params and not isinstance(params["redraw"], bool):
        raise ValueError(f"redraw of policy '{name}' must be true or false, got {params['redraw']}")
    if "weights" in params:
        params["weights"] = _three_weights(params["weights"])
    return cls(**params)


def _three_weights(weights: Any) -> tuple[float, ...]:
    if isinstance(weights, Sequence) and len(weights) == 3:
        numbers = [weight for weight in weights if isinstance(weight, int | float)]
        if len(numbers) == 3:
            return tuple(float(number) for number in numbers)
    raise ValueError(f"weights must be three numbers (later, within, earlier), got {weights!r}")
