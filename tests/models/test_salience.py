"""The salience head: what it is standardised by, and how it is scored."""

import pytest
import torch

from models.salience import (
    SalienceHead,
    head_scores,
    standardise_blocks,
)


def test_statistics_standardise_every_layer_and_part():
    torch.manual_seed(0)
    targets = torch.rand(2, 5, 12, 3) * torch.tensor([1.0, 10.0, 100.0])
    targets[:, :, 9:, 0] = torch.nan
    head = SalienceHead(num_layers=2, width=8, hidden=4, grid=(1, 3))
    head.fit_statistics(head.sums(targets[:, :2]) + head.sums(targets[:, 2:]))
    for layer in range(2):
        standard = head.standardise(layer, targets[layer])
        for part in range(3):
            values = standard[..., part][~standard[..., part].isnan()]
            assert values.mean().abs() < 1e-5
            assert (values.std(unbiased=False) - 1).abs() < 1e-4
    by_place = head.standardise(0, targets[0]).unflatten(1, (4, 1, 3)).nanmean(dim=(0, 1))
    torch.testing.assert_close(head.place[0], by_place)
    with pytest.raises(ValueError, match="defined targets"):
        head.fit_statistics(head.sums(torch.full_like(targets, torch.nan)))


def test_targets_against_their_block_forget_where_the_block_stands():
    torch.manual_seed(0)
    targets = torch.rand(2, 5, 12, 3)
    targets[:, :, 9:, 0] = torch.nan
    standard = standardise_blocks(targets, 3)
    blocks = standard.unflatten(2, (4, 3))
    assert blocks[:, :, :3].mean(dim=3).abs().max() < 1e-5
    assert (blocks[:, :, :3].std(dim=3, unbiased=False) - 1).abs().max() < 1e-3
    assert standard[:, :, 9:, 0].isnan().all()
    drift = torch.arange(4.0).repeat_interleave(3)[:, None]
    torch.testing.assert_close(
        standardise_blocks(targets + drift, 3), standard, rtol=1e-3, atol=1e-3, equal_nan=True
    )
    head = SalienceHead(num_layers=2, width=8, hidden=4, grid=(1, 3), block_len=3)
    head.fit_statistics(head.sums(targets))
    shifted = head.standardise(0, targets[0] + drift)
    torch.testing.assert_close(
        shifted, head.standardise(0, targets[0]), rtol=1e-3, atol=1e-3, equal_nan=True
    )


def test_scores_of_a_perfect_and_an_inverted_head():
    target = torch.rand(3, 40, 3)
    target[:, 30:, 0] = torch.nan
    perfect, inverted = head_scores(target, target, 0.25), head_scores(-target, target, 0.25)
    for good, bad in zip(perfect, inverted, strict=True):
        assert good.spearman == pytest.approx(1)
        assert good.recall == 1
        assert bad.spearman == pytest.approx(-1)
        assert bad.recall == 0
