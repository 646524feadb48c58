"""Local attention that has absorbed what full attention added: ISPA (arXiv:2607.00712).

Some layers go from full to local attention and drop their old tokens. During a warm-up they
compute both, and what the local outputs lack is absorbed into a modulation of the output
projection W, one per sample and layer, by least squares in closed form.

    min_dW  sum_t |(W + dW) o_local - W o_full|^2 + r |dW|^2     over the queries t of the warm-up

The abstract names warm-up, gap, least squares and modulation; the formula with its ridge is our
reading. With A = sum o_local o_local^T and C = sum (o_full - o_local) o_local^T its solution is

    dW = W M,    M = C (A + r I)^-1

so M does not depend on W and is applied in front of it, o_local + M o_local: the weights stay
shared by all samples. The same M minimises |o_local + M o_local - o_full|^2 + r |M|^2.
"""

from __future__ import annotations

import torch
from torch import Tensor


class GapStatistics:
    """A and C of one layer, summed over a warm-up, per sample.

    They are float64: squaring the outputs squares their condition number, and the sums run over
    10^5 queries, so float32 would lose the directions that a small ridge still uses. With width E
    that is 16 E^2 bytes per sample and layer (38 MB at E = 1536), only until `solve`.

    Args:
        num_samples: Videos of the batch.
        width: Heads times head dim, E.
        device: Where the attention outputs are.
    """

    def __init__(self, num_samples: int, width: int, *, device: torch.device | str = "cpu") -> None:
        shape = (num_samples, width, width)
        self.local = torch.zeros(shape, dtype=torch.float64, device=device)  # A
        self.gap = torch.zeros(shape, dtype=torch.float64, device=device)  # C
        self.lost = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self.whole = torch.zeros(num_samples, dtype=torch.float64, device=device)
        self.num_queries = 0

    @property
    def relative_gap(self) -> float:
        """Share of the squared length of full outputs that local ones lack, mean over samples.

        Layers in which it is small are the ones to make local.
        """
        return float((self.lost / self.whole).mean())

    @torch.no_grad()
    def update(self, full: Tensor, local: Tensor) -> None:
        """Add the queries of one pass.

        Args:
            full: Output of attention over all tokens, before the projection.  [B, N, Q, D]
            local: Of the same queries over what the layer will keep.  [B, N, Q, D]

        Raises:
            ValueError: If the two differ in shape, or are not of the samples and width announced.
        """
        num_samples, width = self.local.shape[:2]
        if full.shape != local.shape or local.dim() != 4:
            raise ValueError(
                f"full and local outputs must be of the same queries, [B, N, Q, D], got "
                f"{list(full.shape)} and {list(local.shape)}; attend twice with one set of queries"
            )
        if (local.shape[0], local.shape[1] * local.shape[3]) != (num_samples, width):
            raise ValueError(
                f"attention outputs must be of {num_samples} samples and width {width}, got "
                f"{list(local.shape)}; make the statistics with the sizes of this batch"
            )
        # One sample at a time: a batched product may round differently in another batch.
        for index in range(num_samples):
            read = _merge_heads(local[index]).double()  # [Q, E]
            missing = _merge_heads(full[index]).double() - read
            self.lost[index] += missing.square().sum()
            self.whole[index] += (missing + read).square().sum()
            self.local[index].addmm_(read.T, read)
            self.gap[index].addmm_(missing.T, read)
        self.num_queries += local.shape[2]

    @torch.no_grad()
    def solve(self, ridge: float) -> Tensor:
        """The modulation M that makes up best for the gap seen so far.

        Args:
            ridge: r in units of the mean square of the local outputs' channels (the mean of A's
                diagonal), so that it means the same in every layer; greater than 0, and larger
                when there are few queries.

        Returns:
            float32.  [B, E, E]

        Raises:
            ValueError: If the ridge is not positive, or nothing was recorded.
        """
        if not ridge > 0:
            raise ValueError(
                f"ridge must be greater than 0, got {ridge}; without it, directions that no "
                "local output had would be free"
            )
        if not self.num_queries:
            raise ValueError(
                "a modulation needs the outputs of at least one pass, none was recorded; call "
                "update during the warm-up"
            )
        width = self.local.shape[-1]
        unit = torch.eye(width, dtype=torch.float64, device=self.local.device)
        solutions = []
        for local, gap in zip(self.local, self.gap, strict=True):  # as above, for the same reason
            # Outputs that are all zero have no unit; with any r their modulation is zero.
            weight = (ridge * local.diagonal().mean()).clamp(min=torch.finfo(torch.float64).tiny)
            factor = torch.linalg.cholesky(local + weight * unit)
            solutions.append(torch.cholesky_solve(gap.T, factor).T)  # A and r I are symmetric
        return torch.stack(solutions).float()


def modulate(attended: Tensor, modulation: Tensor) -> Tensor:
    """O + M o for every query, to be projected as always; the product is in the dtype of o.

    Args:
        attended: Output of local attention, before the projection.  [B, N, Q, D]
        modulation: From `GapStatistics.solve`.  [B, E, E]

    Returns:
        Shape and dtype of `attended`.
    """
    merged = _merge_heads(attended)  # [B, Q, E]
    absorbed = merged @ modulation.to(attended.dtype).mT
    return attended + absorbed.unflatten(-1, (attended.shape[1], -1)).transpose(1, 2)


def modulation_bytes(width: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of M per sample and layer: in float32 those of E tokens of keys and values in bfloat16.

    Hence a layer must drop more than E tokens (1536 with the 1.3B model, a frame) to gain anything.
    """
    return width * width * dtype.itemsize


def _merge_heads(attended: Tensor) -> Tensor:
    return attended.transpose(-3, -2).flatten(-2)  # [..., Q, E]
