"""Ways to store and share the budget of a cache, beside the policy that fills it.

All but `int8` and `int4` take as many bytes as the plain cache of the same budget, those on the
host apart.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from models.ispa import modulation_bytes
from models.kv_budgets import BUDGETS, NEED_STATISTICS, LayerStatistics
from models.kv_storage import storage_named
from models.transformer import VideoTransformer


@dataclass(frozen=True)
class Geometry:
    """What a form works with.

    Attributes:
        network: The student.
        budget: Tokens per layer of the plain cache.
        least: Tokens that sink and recent frames take.
        warmup_blocks: Blocks through which ISPA gathers its gap.
        statistics: Makes those of every layer's attention over a calibration run.
        gaps: Makes the share of each layer's attention that a window lacks, over such a run.
    """

    network: VideoTransformer
    budget: int
    least: int
    warmup_blocks: int
    statistics: Callable[[], Sequence[LayerStatistics]]
    gaps: Callable[[], Sequence[float]]

    @property
    def token_bytes(self) -> int:
        """Of the plain cache, one layer."""
        return self.bytes_as("model")

    def bytes_as(self, precision: str) -> int:
        """Bytes of a token in one layer."""
        network = self.network
        dtype = next(network.parameters()).dtype
        return storage_named(precision).token_bytes(network.num_heads, network.head_dim, dtype)


def _precision(name: str) -> Callable[[Geometry], dict[str, Any]]:
    """As many tokens in fewer bytes."""
    return lambda geometry: {"precision": name}


def _three_quarters(geometry: Geometry) -> int:
    """Tokens that stay as they are where a quarter is spent otherwise."""
    kept = max(geometry.least, geometry.budget - geometry.budget // 4)
    if kept == geometry.budget:
        raise ValueError(
            f"a budget that is partly spent on evicted tokens must be above the {geometry.least} "
            f"tokens of sink and recent frames, got {geometry.budget}; raise the budget"
        )
    return kept


def _low(geometry: Geometry) -> dict[str, Any]:
    """A quarter of the bytes holds evicted tokens in 4 bits."""
    kept = _three_quarters(geometry)
    freed = (geometry.budget - kept) * geometry.token_bytes
    room = freed // geometry.bytes_as("int4")
    return {"budget_tokens": kept, "evicted": "low", "evicted_tokens": room}


def _offload(geometry: Geometry) -> dict[str, Any]:
    """A quarter of the tokens is fetched from the host for each block."""
    kept = _three_quarters(geometry)
    return {
        "budget_tokens": kept,
        "evicted": "offload",
        "evicted_tokens": geometry.budget - kept,
    }


def _layers(rule: str) -> Callable[[Geometry], dict[str, Any]]:
    """The layers' budgets by a rule of `models.kv_budgets`."""

    def form(geometry: Geometry) -> dict[str, Any]:
        layers = geometry.network.num_layers
        total = layers * geometry.budget
        statistics = geometry.statistics() if rule in NEED_STATISTICS else None
        return {"layer_budgets": tuple(BUDGETS[rule](total, layers, geometry.least, statistics))}

    return form


def _ispa(geometry: Geometry) -> dict[str, Any]:
    """Half of the layers local with ISPA's modulation, the others share what that frees.

    Those are local in which a window lacks least. A local layer holds the protected tokens; its
    modulation counts as the tokens it displaces.
    """
    layers, gaps = geometry.network.num_layers, geometry.gaps()
    local = sorted(sorted(range(layers), key=lambda layer: gaps[layer])[: layers // 2])
    matrix = -(-modulation_bytes(geometry.network.width) // geometry.token_bytes)
    freed = len(local) * (geometry.budget - geometry.least - matrix)
    more, rest = divmod(max(0, freed), layers - len(local))
    if not local or freed < 0:
        raise ValueError(
            f"ISPA must free more than its modulation takes, {matrix} tokens in each of "
            f"{len(local)} layers, got {geometry.budget - geometry.least} tokens; raise the budget"
        )
    others = [layer for layer in range(layers) if layer not in local]
    budgets = dict.fromkeys(local, geometry.least) | {
        layer: geometry.budget + more + (place < rest) for place, layer in enumerate(others)
    }
    return {
        "layer_budgets": tuple(budgets[layer] for layer in range(layers)),
        "local_layers": tuple(local),
        "warmup_blocks": geometry.warmup_blocks,
    }


FORMS: dict[str, Callable[[Geometry], dict[str, Any]]] = {
    "int8": _precision("int8"),
    "int4": _precision("int4"),
    "low": _low,
    "offload": _offload,
    "pyramid": _layers("pyramid"),
    "entropy": _layers("entropy"),
    "prefix": _layers("prefix"),
    "ispa": _ispa,
}
"""Name of a form to the fields of `models.kv_spec.CacheSpec` that it sets."""
