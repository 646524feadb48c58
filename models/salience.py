"""Salience: the head that predicts how strongly tokens are read, and its standardised targets.

Three parts per key token, in this order everywhere: `later` (queries in later blocks: what keeping
the token is worth), `within` (its own block), `earlier` (earlier blocks; only a bidirectional
teacher has them). Each is the mean over heads of the maximum over queries of the attention
probability; `models/salience_targets.py` computes them.

Source: PaFu-KV, arXiv:2601.21896 (s_low, s_diag, s_up). Standardisation and the shape of the head
are ours.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PARTS = ("later", "within", "earlier")


def standardise_blocks(targets: Tensor, block_len: int) -> Tensor:
    """Targets less the mean of their block, over its standard deviation, for each part.

    What remains tells the tokens of a block apart and no longer depends on where the block stands.

    Args:
        targets: NaN where undefined.  [..., S, 3]
        block_len: Tokens of a block; S is a multiple of it.
    """
    blocks = targets.unflatten(-2, (-1, block_len))
    centred = blocks - blocks.nanmean(dim=-2, keepdim=True)
    std = centred.square().nanmean(dim=-2, keepdim=True).sqrt()
    return (centred / std.clamp(min=1e-8)).flatten(-3, -2)


class SalienceMLP(nn.Module):
    """RMSNorm, Linear, SiLU, Linear: hidden state of one layer to three standardised parts."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width, eps=1e-6)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, len(PARTS))

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, E] to [B, S, 3], float32."""
        with torch.autocast(x.device.type, enabled=False):
            return self.down(F.silu(self.up(self.norm(x.float()))))


class SalienceHead(nn.Module):
    """S-MLP of every layer, with the statistics that its targets were standardised by.

    Args:
        num_layers: Layers of the transformer.
        width: Of its hidden states.
        hidden: Hidden width of each S-MLP.
        grid: Token (rows, columns) of a frame, for the mean target per place.
        log: Whether targets are log probabilities (else raw probabilities).
        block_len: Tokens of the blocks within which targets are standardised before that is done
            per layer; 0 = only per layer.
    """

    mean: Tensor
    std: Tensor
    place: Tensor

    def __init__(
        self,
        *,
        num_layers: int,
        width: int,
        hidden: int,
        grid: tuple[int, int],
        log: bool = False,
        block_len: int = 0,
    ) -> None:
        super().__init__()
        self.log = log
        self.block_len = block_len
        self.layers = nn.ModuleList(SalienceMLP(width, hidden) for _ in range(num_layers))
        self.register_buffer("mean", torch.zeros(num_layers, len(PARTS)))
        self.register_buffer("std", torch.ones(num_layers, len(PARTS)))
        self.register_buffer("place", torch.zeros(num_layers, *grid, len(PARTS)))

    def scaled(self, targets: Tensor) -> Tensor:
        """Raw or log probability, as it is or against its block, as configured."""
        scaled = (targets + 1e-6).log() if self.log else targets
        return standardise_blocks(scaled, self.block_len) if self.block_len else scaled

    def sums(self, targets: Tensor) -> Tensor:
        """What `fit_statistics` needs of some clips; sums of several clips add up.

        Args:
            targets: From `attend_with_targets`, NaN where undefined.  [L, B, F * rows * columns, 3]

        Returns:
            Number, sum and sum of squares of the defined targets at each place, scaled.
            float64 [3, L, rows, columns, 3]
        """
        rows, columns = self.place.shape[1:3]
        x = self.scaled(targets).double().unflatten(2, (-1, rows, columns))
        moments = torch.stack([(~x.isnan()).double(), x, x.square()])
        return moments.nansum(dim=(2, 3))

    def fit_statistics(self, sums: Tensor) -> None:
        """Set mean, spread and place means from `sums` over many clips.

        Raises:
            ValueError: If a layer has a part without a single defined target.
        """
        count, total, squares = sums.sum(dim=(2, 3))  # [L, 3] each
        if (count == 0).any():
            raise ValueError(
                "every part needs defined targets to standardise by; use clips of more blocks "
                "than the future horizon"
            )
        mean = total / count
        variance = squares / count - mean.square()
        std = variance.clamp(min=0).sqrt().clamp(min=1e-8)
        self.mean.copy_(mean)
        self.std.copy_(std)
        by_place = sums[1] / sums[0]  # [L, rows, columns, 3]
        self.place.copy_((by_place - mean[:, None, None]) / std[:, None, None])

    def standardise(self, layer: int, targets: Tensor) -> Tensor:
        """What the S-MLP of a layer should predict; NaN stays NaN.  [B, S, 3]."""
        return (self.scaled(targets) - self.mean[layer]) / self.std[layer]

    def predict(self, layer: int, hidden: Tensor) -> Tensor:
        """Standardised parts from the layer's input in the clean pass.  [B, S, E] to [B, S, 3]."""
        return self.layers[layer](hidden)

    def place_means(self, layer: int, positions: Tensor) -> Tensor:
        """Mean standardised target of each token's place.  [B, S, 3] to [B, S, 3]."""
        return self.place[layer, positions[..., 1], positions[..., 2]]

    def forward(self, hidden: list[Tensor]) -> list[Tensor]:
        """Predictions of all layers."""
        return [self.predict(layer, x) for layer, x in enumerate(hidden)]


@dataclass
class HeadScore:
    """Agreement of a head with its targets for one part, means over samples.

    Attributes:
        spearman: Rank correlation over the tokens of a video, in [-1, 1].
        recall: Share of the truly most salient tokens that are among as many predicted ones.
    """

    spearman: float
    recall: float


def head_scores(predicted: Tensor, target: Tensor, budget_share: float) -> list[HeadScore]:
    """Spearman and recall@budget of one layer for each part, over its defined tokens.

    Args:
        predicted: [B, S, 3]
        target: NaN where undefined, alike in all samples.  [B, S, 3]
        budget_share: Share of the defined tokens that a cache could keep.
    """
    scores = []
    for part in range(target.shape[-1]):
        defined = ~target[..., part].isnan().any(dim=0)
        p, t = predicted[:, defined, part].float(), target[:, defined, part].float()
        ranks = [x.argsort(dim=1).argsort(dim=1).double() for x in (p, t)]
        a, b = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
        spearman = (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)
        count = max(1, round(budget_share * p.shape[1]))
        chosen = [torch.zeros_like(x).scatter(1, x.topk(count).indices, 1.0) for x in (p, t)]
        recall = (chosen[0] * chosen[1]).sum(1) / count
        scores.append(HeadScore(float(spearman.mean()), float(recall.mean())))
    return scores
