"""Streamed salience targets against a dense softmax, their orientation, and the head."""

import pytest
import torch

from models.salience import (
    SalienceHead,
    head_scores,
    mask_short_future,
    salience_targets,
    standardise_blocks,
)


def dense_reference(queries, keys, block_len) -> torch.Tensor:
    """Three nested sets by a loop over keys, from the full softmax matrix."""
    probability = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)
    size = keys.shape[2]
    block = torch.arange(size) // block_len
    out = torch.full((keys.shape[0], size, 3), torch.nan)
    for j in range(size):
        for part, rows in enumerate((block > block[j], block == block[j], block < block[j])):
            if rows.any():
                out[:, j, part] = probability[:, :, rows, j].amax(-1).mean(1)
    return out


@pytest.mark.parametrize(
    ("size", "block_len", "tile"), [(21, 6, 1 << 20), (24, 6, 300), (5, 7, 64), (12, 1, 1)]
)
def test_streamed_targets_equal_a_dense_softmax(size, block_len, tile):
    torch.manual_seed(0)
    queries, keys = torch.randn(2, 2, 3, size, 8).mul(2).unbind(0)
    targets = salience_targets(queries, keys, block_len, max_tile_values=tile)
    expected = dense_reference(queries, keys, block_len)
    torch.testing.assert_close(targets, expected, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_orientation_later_means_read_by_queries_of_later_blocks():
    queries = torch.zeros(1, 1, 6, 4)
    keys = torch.zeros(1, 1, 6, 4)
    queries[0, 0, 4, 0] = keys[0, 0, 1, 0] = 20.0  # a query of block 2 reads a key of block 0
    targets = salience_targets(queries, keys, 2)[0]
    assert targets[1].tolist()[0] > 0.99
    assert targets[:, 0].nan_to_num(0).argmax() == 1
    assert targets[1, 1] == pytest.approx(1 / 6)
    assert targets[4:, 0].isnan().all(), "the last block has no later queries"
    assert targets[:2, 2].isnan().all(), "the first block has no earlier queries"


def test_keys_with_a_short_future_lose_only_their_later_target():
    targets = torch.ones(2, 1, 12, 3)
    masked = mask_short_future(targets, 3, 2)
    assert masked[..., 0].isnan().sum(-1).tolist() == [[6], [6]]
    assert not masked[..., 1:].isnan().any()
    assert not targets.isnan().any()


def test_statistics_standardise_every_layer_and_part():
    torch.manual_seed(0)
    targets = torch.rand(2, 5, 12, 3) * torch.tensor([1.0, 10.0, 100.0])
    targets[:, :, 9:, 0] = torch.nan
    head = SalienceHead(num_layers=2, width=8, hidden=4, grid=(1, 3))
    head.fit_statistics(targets)
    for layer in range(2):
        standard = head.standardise(layer, targets[layer])
        for part in range(3):
            values = standard[..., part][~standard[..., part].isnan()]
            assert values.mean().abs() < 1e-5
            assert (values.std(unbiased=False) - 1).abs() < 1e-4
    by_place = head.standardise(0, targets[0]).unflatten(1, (4, 1, 3)).nanmean(dim=(0, 1))
    torch.testing.assert_close(head.place[0], by_place)
    with pytest.raises(ValueError, match="defined targets"):
        head.fit_statistics(torch.full_like(targets, torch.nan))


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
    head.fit_statistics(targets)
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
