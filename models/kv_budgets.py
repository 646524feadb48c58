"""How a total of cached tokens is shared among the layers.

Every rule gives whole numbers that add up to the total exactly, none below what a layer must hold
in any case (its protected tokens). `uniform` and `pyramid` need to know nothing; `entropy` and
`prefix` look at the attention that cached keys received, gathered by `LayerStatistics`.

One list of budgets serves all samples of a batch. Where results must not depend on the batch,
statistics must come from somewhere else, such as a calibration run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import pad


class LayerStatistics:
    """Attention that the cached keys of one layer received in successive passes.

    The mass of a pass is scaled to a mean of 1 over the keys that could be read in it: neither the
    number of queries, nor the part that went to keys not cached, nor a growing number of keys
    changes what an evenly read key gets. A key counts from the first pass in which it could be
    read, so its mean and its variance are over the passes since then.
    """

    def __init__(self) -> None:
        # Of each key: mean of its scaled mass over passes, sum of squared deviations from it, and
        # number of passes.  float64, [3, B, S]
        self._moments: Tensor | None = None

    def update(self, mass: Tensor) -> None:
        """Add a pass.

        Args:
            mass: Attention each key received: summed over queries, mean over heads. Keys that are
                new since the last pass come last.  [B, S]

        Raises:
            ValueError: If keys or samples vanished since the last pass.
        """
        mass = mass.detach().double()
        mass = mass / mass.mean(dim=1, keepdim=True)
        if self._moments is None:
            self._moments = mass.new_zeros(3, mass.shape[0], 0)
        _, num_samples, num_keys = self._moments.shape
        if mass.shape[0] != num_samples or mass.shape[1] < num_keys:
            raise ValueError(
                f"mass must be of {num_samples} samples and of the {num_keys} keys seen before, "
                f"then new ones, got {list(mass.shape)}; call select when keys are evicted"
            )
        mean, squares, passes = pad(self._moments, (0, mass.shape[1] - num_keys))
        # Welford's update: the variance of steady attention is exactly 0.
        deviation, passes = mass - mean, passes + 1
        mean = mean + deviation / passes
        self._moments = torch.stack([mean, squares + deviation * (mass - mean), passes])

    def select(self, indices: Tensor) -> None:
        """Forget all keys but these, as the cache does when it evicts.  [B, k]."""
        moments = self._seen()
        self._moments = moments.gather(2, indices.expand(len(moments), -1, -1))

    @property
    def shares(self) -> Tensor:
        """Share of each key in the mean attention.  float64, sums to 1.  [B, S].

        Raises:
            ValueError: If no pass was seen, or its mass was not a mass.
        """
        mean = self._seen()[0]
        if not bool(mean.isfinite().all() and (mean >= 0).all()):
            raise ValueError(
                "the attention mass of a pass must be finite, nowhere negative and positive in "
                "sum for every sample, found otherwise; look for NaN in the attention"
            )
        return mean / mean.sum(dim=1, keepdim=True)

    @property
    def entropy(self) -> float:
        """H of the mean attention over keys, in nats, mean over samples; large where it spreads.

        CAKE adds up the entropies of the queries of a window; of summed attention we can know only
        the entropy of their mean, which is never below the mean of theirs.
        """
        return float(torch.special.entr(self.shares).sum(dim=1).mean())

    @property
    def variance(self) -> float:
        """V, variance over passes of the scaled mass, mean over keys and samples; 0 = steady.

        CAKE takes the variance over the queries of a window, summed over keys; we see sums over
        queries, hence the variance over passes. With S keys throughout it is S times the sum over
        keys of the variance of their share, a factor that all layers have in common. A key seen
        once has variance 0.
        """
        _, squares, passes = self._seen()
        return float((squares / passes).mean())

    @property
    def sorted_shares(self) -> Tensor:
        """Largest, second, ... share of a key, mean over samples.  float64, sums to 1.  [S]."""
        return self.shares.sort(dim=1, descending=True).values.mean(dim=0)

    def _seen(self) -> Tensor:
        if self._moments is None:
            raise ValueError(
                "attention statistics need at least one pass, got none; share evenly until then"
            )
        return self._moments


def apportion(total: int, preferences: Sequence[float], *, least: int) -> list[int]:
    """`least` for every layer and the rest in proportion to `preferences`, by largest remainder.

    A layer gets the whole part of its quota; the tokens left go to the largest fractions, equal
    ones to the earlier layer. Computed in exact fractions, so nothing depends on rounding. That the
    protected tokens come first and only the rest is shared is as in the public code of PyramidKV
    and CAKE, whose windows are always kept.

    Raises:
        ValueError: If the total cannot hold the least, or preferences are not shares of anything.
    """
    rest = _rest(total, len(preferences), least)
    if not all(0 <= preference < float("inf") for preference in preferences):
        raise ValueError(f"preferences must be finite and >= 0, got {list(preferences)}")
    exact = [Fraction(preference) for preference in preferences]
    if not sum(exact):
        raise ValueError(
            "at least one layer must have a positive preference, all are 0; attention that is "
            "steady or reads a single key tells nothing: observe more passes or share evenly"
        )
    quotas = [rest * preference / sum(exact) for preference in exact]
    counts = [int(quota) for quota in quotas]
    order = sorted(range(len(quotas)), key=lambda layer: counts[layer] - quotas[layer])
    for layer in order[: rest - sum(counts)]:
        counts[layer] += 1
    return [least + count for count in counts]


def uniform(total: int, num_layers: int, least: int) -> list[int]:
    """The same for every layer; what does not divide goes to the first layers, one token each.

    Raises:
        ValueError: If the total cannot hold the least of every layer.
    """
    return apportion(total, [1.0] * num_layers, least=least)


def pyramid(total: int, num_layers: int, least: int, slope: float = 0.95) -> list[int]:
    """Linearly fewer from the first layer to the last: PyramidKV (arXiv:2406.02069).

    Attention funnels from many tokens in early layers to few in late ones. With a mean of m tokens
    beyond the least, layer l of L gets

        m (1 + slope (1 - 2 l / (L - 1))),    from m (1 + slope) to m (1 - slope).

    The paper gives the last layer m / beta and the first 2 m - m / beta, so slope = 1 - 1 / beta;
    its code has beta = 20, the default here.

    Args:
        total: Tokens of all layers.
        num_layers: L; one layer gets everything.
        least: Tokens that every layer must hold.
        slope: In [0, 1]; 0 is uniform, with 1 the last layer gets the least only.

    Raises:
        ValueError: If the slope lies outside, or the total cannot hold the least of every layer.
    """
    if not 0 <= slope <= 1:
        raise ValueError(f"the slope of a pyramid must be in [0, 1], got {slope}")
    if num_layers == 1:
        return apportion(total, [1.0], least=least)
    heights = [1 - 2 * layer / (num_layers - 1) for layer in range(num_layers)]
    return apportion(total, [1 + slope * height for height in heights], least=least)


def entropy(
    total: int,
    least: int,
    *,
    spatial: Sequence[float],
    temporal: Sequence[float],
    spatial_temperature: float = 1.0,
    temporal_temperature: float = 1.0,
) -> list[int]:
    """More for layers whose attention spreads and shifts: CAKE (arXiv:2503.12491).

    The preference of a layer is H^(1 / tau_1) V^(1 / tau_2), with the entropy H of its attention
    over keys and the variance V of its attention over time; tokens beyond the least are shared in
    proportion to it. The temperatures are tuned per model in the paper; 1 is our default.

    Args:
        total: Tokens of all layers.
        least: Tokens that every layer must hold.
        spatial: H of each layer.
        temporal: V of each layer.
        spatial_temperature: tau_1, greater than 0; a large one evens H out.
        temporal_temperature: tau_2, greater than 0.

    Raises:
        ValueError: If a temperature is not positive, H or V of all layers are 0 or one is not
            finite and >= 0, or the total cannot hold the least of every layer.
    """
    if not (spatial_temperature > 0 and temporal_temperature > 0):
        raise ValueError(
            f"temperatures must be greater than 0, got {spatial_temperature} and "
            f"{temporal_temperature}"
        )
    if not all(0 <= x < float("inf") for x in (*spatial, *temporal)):
        raise ValueError(
            f"entropy and variance must be finite and >= 0, got {list(spatial)} and "
            f"{list(temporal)}"
        )
    # Relative to the largest: the same shares, and no power overflows.
    most_spread, most_shifting = max(spatial, default=0) or 1, max(temporal, default=0) or 1
    preferences = [
        (h / most_spread) ** (1 / spatial_temperature)
        * (v / most_shifting) ** (1 / temporal_temperature)
        for h, v in zip(spatial, temporal, strict=True)
    ]
    return apportion(total, preferences, least=least)


def prefix(total: int, least: int, mass: Sequence[Tensor]) -> list[int]:
    """Every layer keeps the same share p of its importance: PrefixKV (arXiv:2412.03409).

    With its tokens sorted by importance, descending, a layer keeps the shortest prefix whose share
    reaches p; p is the one that spends the total. Each prefix is at least `least` long (the paper
    protects nothing). The paper bisects p; as p rises past the share that a prefix holds, that
    prefix takes one more token, so sorting these shares over all layers finds the same lengths,
    ties included: equal shares go to the earlier layer first. A total beyond all tokens of any
    importance gives every layer those, and the rest evenly.

    Args:
        total: Tokens of all layers.
        least: Tokens that every layer must hold.
        mass: Importance of each layer's tokens, >= 0, in any order and unit.  Each [S]

    Raises:
        ValueError: If importance is negative, not finite or 0 in sum, or the total cannot hold the
            least of every layer.
    """
    rest = _rest(total, len(mass), least)
    passed, layers = [], []
    for layer, importance in enumerate(mass):
        held = importance.double().sort(descending=True).values.cumsum(0)
        if not (held.numel() and 0 < held[-1] < torch.inf and importance.min() >= 0):
            raise ValueError(
                f"importance of tokens must be finite, >= 0 and positive in sum, not so in layer "
                f"{layer}"
            )
        before = torch.cat([held.new_zeros(1), held[:-1]]) / held[-1]  # [S]
        before = before[least:][before[least:] < 1]
        passed.append(before)
        layers.append(torch.full(before.shape, layer, device=before.device))
    order = torch.cat(passed).argsort(stable=True)[:rest]
    counts = torch.cat(layers)[order].bincount(minlength=len(mass)).tolist()
    unspent = uniform(rest - sum(counts), len(mass), 0)
    return [least + count + more for count, more in zip(counts, unspent, strict=True)]


def _rest(total: int, num_layers: int, least: int) -> int:
    """Tokens beyond the least of every layer."""
    if num_layers < 1 or least < 0:
        raise ValueError(
            f"budgets need at least one layer and a least of 0 or more tokens, got {num_layers} "
            f"layers and {least} tokens"
        )
    if total < num_layers * least:
        raise ValueError(
            f"the total must hold what every layer protects, {num_layers} layers of {least} tokens "
            f"= {num_layers * least}, got {total}; raise the total or protect less"
        )
    return total - num_layers * least


Statistics = Sequence[LayerStatistics] | None


def _share_uniform(total: int, num_layers: int, least: int, _: Statistics) -> list[int]:
    return uniform(total, num_layers, least)


def _share_pyramid(
    total: int, num_layers: int, least: int, _: Statistics, **params: float
) -> list[int]:
    return pyramid(total, num_layers, least, **params)


def _share_entropy(
    total: int, num_layers: int, least: int, statistics: Statistics, **params: float
) -> list[int]:
    seen = _of_all_layers(statistics, num_layers)
    spatial, temporal = [layer.entropy for layer in seen], [layer.variance for layer in seen]
    return entropy(total, least, spatial=spatial, temporal=temporal, **params)


def _share_prefix(total: int, num_layers: int, least: int, statistics: Statistics) -> list[int]:
    seen = _of_all_layers(statistics, num_layers)
    return prefix(total, least, [layer.sorted_shares for layer in seen])


def _of_all_layers(statistics: Statistics, num_layers: int) -> Sequence[LayerStatistics]:
    if statistics is None or len(statistics) != num_layers:
        found = "none" if statistics is None else f"those of {len(statistics)}"
        raise ValueError(
            f"this rule needs the attention statistics of all {num_layers} layers, got {found}"
        )
    return statistics


BUDGETS: dict[str, Callable[..., list[int]]] = {
    "uniform": _share_uniform,
    "pyramid": _share_pyramid,
    "entropy": _share_entropy,
    "prefix": _share_prefix,
}
"""Rule of a name, as f(total, num_layers, least, statistics or None, **its own parameters)."""

NEED_STATISTICS = frozenset({"entropy", "prefix"})
