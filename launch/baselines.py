"""What ranks tokens without training: a salience head has to be better than these.

`position` is the mean target of a token's place, from the statistics that travel with the head.
`key_norm` prefers small keys: they were seen to draw the most attention (arXiv:2406.11430, language
models, Euclidean norm of the cached key). `value_norm` prefers large values, which weigh most in
what attention reads.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models.attention import Attention, grid_positions
from models.block import Block
from models.salience import PARTS, SalienceHead, head_scores
from models.transformer import VideoTransformer
from train.randomness import sample_uniform

NORMS = ("key_norm", "value_norm")
BASELINES = ("position", *NORMS)

Scores = dict[str, dict[str, list[float]]]
"""Part to `spearman` and `recall`, a value per layer each."""


@contextmanager
def token_norms(network: VideoTransformer) -> Iterator[dict[str, list[Tensor]]]:
    """Norms of what the self-attention of every layer would cache, in a pass made meanwhile.

    Yields:
        `key_norm`, negative, and `value_norm`: mean over heads of the Euclidean norm, one tensor
        per layer in the order of the layers once the pass is done.  [B, S]
    """
    norms: dict[str, list[Tensor]] = {name: [] for name in NORMS}

    def watch(module: nn.Module, attention: Attention, name: str, sign: int) -> RemovableHandle:
        def record(module: nn.Module, args: object, output: Tensor) -> None:
            heads = attention.split_heads(output.float())  # [B, N, S, D]
            norms[name].append(sign * heads.norm(dim=-1).mean(dim=1))

        return module.register_forward_hook(record)

    handles = []
    for block in network.blocks:
        assert isinstance(block, Block)
        attention = block.self_attn
        handles.append(watch(attention.norm_k, attention, "key_norm", -1))
        handles.append(watch(attention.v, attention, "value_norm", 1))
    try:
        yield norms
    finally:
        for handle in handles:
            handle.remove()


def score_baselines(
    head: SalienceHead,
    norms: Mapping[str, Sequence[Tensor]],
    targets: Sequence[Tensor],
    *,
    seeds: Tensor,
    budget_share: float,
) -> dict[str, Scores]:
    """Agreement of every baseline with the targets that the head is scored by.

    Args:
        head: For the mean target per place.
        norms: From `token_norms`, a tensor per layer.  [B, S]
        targets: Standardised, NaN where undefined, one tensor per layer.  [B, S, 3]
        seeds: Of the clips; which of equally ranked tokens comes first is drawn from them.  [B]
        budget_share: As in `models.salience.head_scores`.
    """
    rows, columns = head.place.shape[1:3]
    found: dict[str, Scores] = {
        name: {part: {"spearman": [], "recall": []} for part in PARTS} for name in BASELINES
    }
    for layer, (target, key, value) in enumerate(
        zip(targets, norms["key_norm"], norms["value_norm"], strict=True)
    ):
        frames = torch.arange(target.shape[1] // (rows * columns), device=target.device)
        places = head.place_means(layer, grid_positions(frames, rows, columns))  # [S, 3]
        predicted = {"position": places, "key_norm": key[..., None], "value_norm": value[..., None]}
        for name, values in predicted.items():
            ranks = break_ties(values.expand_as(target), seeds)
            scores = head_scores(ranks, target, budget_share)
            for part, score in zip(PARTS, scores, strict=True):
                found[name][part]["spearman"].append(score.spearman)
                found[name][part]["recall"].append(score.recall)
    return found


def break_ties(values: Tensor, seeds: Tensor) -> Tensor:
    """Ranks along the tokens, with equal values in an order drawn for each clip and part.

    A place has one value in all frames; in order of time its tokens would be ranked by age, which
    is another baseline. Among g groups of equals the draw costs a factor of sqrt(1 - 1 / g^2) of a
    rank correlation.

    Args:
        values: [B, S, 3]
        seeds: [B]
    """
    lot = sample_uniform(values.shape[1:], seeds.cpu(), "ties", device=values.device)
    order = lot.argsort(dim=1)
    ascending = order.gather(1, values.gather(1, order).argsort(dim=1, stable=True))
    return ascending.argsort(dim=1).float()
