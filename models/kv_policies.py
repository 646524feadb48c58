"""The policies that need no attention: windows, lots, norms, and the learned head.

All policies of the project are known once this file is imported; those that look at queries are in
`models/kv_policies_attention.py`, those that merge tokens in `models/kv_policies_merging.py`.
"""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

import models.kv_policies_attention
import models.kv_policies_merging  # noqa: F401  (both register their policies)
from models.kv_policy import POLICIES, CachePolicy, ScoredPolicy, hash_uniform, standardised
from models.kv_tokens import Entering, Eviction

__all__ = ["POLICIES", "build_policy"]


@dataclass
class Full(CachePolicy):
    """Keep everything; memory grows with the video. The upper reference within trained lags."""

    name: ClassVar[str] = "full"
    is_bounded: ClassVar[bool] = False


class _Newest(CachePolicy):
    def rank(self, eviction: Eviction) -> Tensor:
        """Position in time: tokens are oldest first, hence rank by slot."""
        age = eviction.age
        return torch.arange(age.shape[1], device=age.device, dtype=torch.float32).expand_as(age)


@dataclass
class FirstInFirstOut(_Newest):
    """Keep the newest tokens only, the first frames like any others.

    Source: the rolling window of Self-Forcing, arXiv:2506.08009, section 3.4.
    """

    name: ClassVar[str] = "fifo"
    protects_sink: ClassVar[bool] = False


@dataclass
class SinkWindow(_Newest):
    """Keep the first frames and the newest tokens; the cache itself protects the sink.

    Source: LongLive, arXiv:2509.22622, section 3.4 (3 sink frames, 9 newest with the current).
    """

    name: ClassVar[str] = "sink_window"


@dataclass
class Random(CachePolicy):
    """Keep a random subset: the control for any score.

    Attributes:
        redraw: True: new lots at every eviction (old tokens vanish geometrically). False: one lot
            per token for life.
    """

    name: ClassVar[str] = "random"
    redraw: bool = True

    def enter(self, entering: Entering) -> Tensor:
        """One lot, from the sample's seed, the layer and the token's position."""
        frame, row, column = entering.positions.unbind(-1)
        lot = hash_uniform(entering.seeds[:, None], frame, row, column, entering.layer)
        return lot[..., None]

    def rank(self, eviction: Eviction) -> Tensor:
        """The lot, hashed with the age where lots are redrawn."""
        lot = eviction.tokens.features[..., 0]
        if not self.redraw:
            return lot
        return hash_uniform((lot.double() * 2**24).long(), eviction.age)


@dataclass
class Norm(ScoredPolicy):
    """Keep large values under small keys: no query, no head, no training.

    Score = mean over heads of log ||v|| - key_weight * log ||k||, standardised over the cached
    tokens. A key of small norm tends to be read much (Devoto et al., arXiv:2406.11430), and what is
    read counts by the norm of its value (VATP, arXiv:2406.12335). The product of the two is our
    reading; Wan normalises its keys, so that their norms differ less than in language models.

    Attributes:
        key_weight: Of the key's norm; 0 ranks by the values alone.
    """

    name: ClassVar[str] = "norm"
    key_weight: float = 1.0

    def describe(self, entering: Entering) -> Tensor:
        """The score, before it is standardised.  [B, S, 1]."""
        keys = entering.projected.keys.float().norm(dim=-1).clamp(min=1e-6)
        values = entering.projected.values.float().norm(dim=-1).clamp(min=1e-6)
        return (values.log() - self.key_weight * keys.log()).mean(dim=1)[..., None]

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Standardised norms."""
        return standardised(features[..., 0])


@dataclass
class PromptSimilarity(ScoredPolicy):
    """Keep what the prompt speaks of.

    BlockVid (arXiv:2511.22973) keeps and retrieves chunks whose prompt resembles the current one.
    With one prompt for a video all chunks tie, so that we go down to tokens and use the network's
    own measure: mean over heads of the largest cosine between the token's cross-attention query
    and the cross-attention key of any text row, both as the layer makes them from the layer's input
    in the clean pass; standardised over the cached tokens.
    """

    name: ClassVar[str] = "prompt_similarity"

    def describe(self, entering: Entering) -> Tensor:
        """The similarity.  [B, S, 1]."""
        return entering.match_prompt()[..., None]

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Standardised similarity."""
        return standardised(features[..., 0])


@dataclass
class _Weighted(ScoredPolicy):
    """A weighting of the parts later, within, earlier; negative weights invert."""

    weights: tuple[float, float, float] = (1.0, 0.0, 0.0)

    def score(self, eviction: Eviction, features: Tensor) -> Tensor:
        """Weights . parts."""
        later, within, earlier = features.unbind(-1)
        a, b, c = self.weights  # numbers of the host: a tensor of them would have to be sent
        return a * later + b * within + c * earlier


@dataclass
class PositionPrior(_Weighted):
    """Keep the places that are worth keeping on average: the strongest trivial rival.

    Score = the mean teacher target of the token's (row, column) and layer, weighted over the three
    parts; it sees where a token is, never what it shows. Our own control.

    Attributes:
        weights: Of the parts later, within, earlier.
    """

    name: ClassVar[str] = "position_prior"
    needs_head: ClassVar[bool] = True

    def describe(self, entering: Entering) -> Tensor:
        """The three mean targets of the token's place.  [B, S, 3]."""
        assert entering.head is not None
        return entering.head.place_means(entering.layer, entering.positions)


@dataclass
class Salience(_Weighted):
    """PaFu-KV (arXiv:2601.21896): keep what the head expects to be read.

    Score = weights . (later, within, earlier) as predicted by the S-MLP from the clean pass alone.
    The split into parts is the paper's; the weights, the standardisation and the charge for age
    are ours: a static salience cannot see redundancy, so copies of one content pile up and old
    copies win ties.

    Attributes:
        weights: Of the parts later, within, earlier; negative values invert.
    """

    name: ClassVar[str] = "salience"
    needs_head: ClassVar[bool] = True

    def describe(self, entering: Entering) -> Tensor:
        """The head's three standardised predictions.  [B, S, 3]."""
        assert entering.head is not None
        return entering.head.predict(entering.layer, entering.hidden)


@dataclass
class Oracle(_Weighted):
    """Keep what the teacher saw being read: the targets themselves in place of a prediction.

    Two passes: the video is generated once with everything kept, the teacher's targets are taken on
    it, and it is generated again from the same noise under eviction. A bound for any head that
    learns these targets, not for policies that ask something else. Ours, as a reference.

    Attributes:
        weights: Of the parts later, within, earlier.
    """

    name: ClassVar[str] = "oracle"
    needs_head: ClassVar[bool] = True
    needs_targets: ClassVar[bool] = True

    def describe(self, entering: Entering) -> Tensor:
        """Standardised targets; a part that does not exist counts as average.  [B, S, 3]."""
        assert entering.head is not None
        assert entering.targets is not None
        standard = entering.head.standardise(entering.layer, entering.targets)
        return standard.masked_fill(standard.isnan(), 0.0)


def build_policy(name: str, params: dict[str, Any] | None = None) -> CachePolicy:
    """A policy by name.

    Raises:
        ValueError: If the name or a parameter is unknown, or a value is of the wrong kind.
    """
    if name not in POLICIES:
        raise ValueError(f"cache policy '{name}' is unknown; choose one of {sorted(POLICIES)}")
    cls, params = POLICIES[name], dict(params or {})
    defaults = {field.name: field.default for field in fields(cls)}  # type: ignore[arg-type]
    for key, value in params.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, list(defaults), n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(
                f"policy '{name}' has no parameter '{key}', only {list(defaults)}{hint}"
            )
        params[key] = _like_default(f"{key} of policy '{name}'", value, defaults[key])
    return cls(**params)


def _like_default(what: str, value: Any, default: Any) -> Any:
    """`value` in the type of the parameter's default."""
    if isinstance(default, bool):
        if not isinstance(value, bool):
            raise ValueError(f"{what} must be true or false, got {value!r}")
        return value
    if isinstance(default, tuple):
        if isinstance(value, Sequence) and len(value) == len(default):
            numbers = [type(default[0])(v) for v in value if _is_number(v)]
            if len(numbers) == len(default):
                return tuple(numbers)
        raise ValueError(f"{what} must be {len(default)} numbers, got {value!r}")
    if not _is_number(value):
        raise ValueError(f"{what} must be a number, got {value!r}")
    if isinstance(default, int) and value != int(value):
        raise ValueError(f"{what} must be a whole number, got {value!r}")
    return type(default)(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
