"""What ranks tokens without training is measured on what the network really computes."""

import pytest
import torch

from launch.baselines import BASELINES, break_ties, score_baselines, token_norms
from launch.notes import beside_baselines
from models.attention import block_causal_mask
from models.salience import PARTS, SalienceHead, head_scores
from tests.models.small import random_transformer

FRAMES, ROWS, COLUMNS = 6, 2, 3
PLACES = ROWS * COLUMNS
TOKENS = FRAMES * PLACES


def clean_pass(network, **watched) -> None:
    generator = torch.Generator().manual_seed(4)
    latents = torch.randn(2, FRAMES, 16, ROWS, COLUMNS, generator=generator)
    mask = block_causal_mask(FRAMES // 2, 2 * PLACES)
    network(
        latents, latents.new_zeros(2, FRAMES), torch.zeros(2, 3, 8), mask=mask, wanted=0, **watched
    )


def hooks_of(network) -> int:
    return sum(len(module._forward_hooks) for module in network.modules())


def test_norms_are_those_of_keys_and_values_of_every_layer():
    network, keys = random_transformer(), []
    with torch.no_grad():
        for layer, block in enumerate(network.blocks):
            block.self_attn.v.weight.zero_()
            block.self_attn.v.bias.copy_((layer + 1) * torch.arange(24.0))
        with token_norms(network) as norms:
            clean_pass(network, capture=lambda layer, hidden, q, k: keys.append(k))
    assert set(norms) == {"key_norm", "value_norm"}
    for layer in (0, 1):
        # Rotation keeps norms, so the rotated keys that the network hands out have the same.
        expected = -keys[layer].norm(dim=-1).mean(dim=1)
        torch.testing.assert_close(norms["key_norm"][layer], expected)
        heads = (layer + 1) * torch.arange(24.0).view(2, 12).norm(dim=1)  # 2 heads of 12 channels
        torch.testing.assert_close(
            norms["value_norm"][layer], heads.mean().expand(2, TOKENS), rtol=1e-6, atol=0
        )


def test_nothing_stays_on_the_network_even_after_an_error():
    network = random_transformer()
    with token_norms(network):
        assert hooks_of(network) == 4
    assert hooks_of(network) == 0
    with pytest.raises(RuntimeError, match="stop"), token_norms(network):
        raise RuntimeError("stop")
    assert hooks_of(network) == 0


def test_each_baseline_finds_the_part_that_is_made_for_it():
    generator = torch.Generator().manual_seed(0)
    head = SalienceHead(num_layers=2, width=24, hidden=8, grid=(ROWS, COLUMNS))
    head.place.copy_(torch.arange(PLACES).view(1, ROWS, COLUMNS, 1).expand_as(head.place) % 5)
    norms = {
        name: [torch.randn(2, TOKENS, generator=generator) for _ in range(2)]
        for name in ("key_norm", "value_norm")
    }
    targets = []
    for layer in range(2):
        place = (torch.arange(TOKENS) % PLACES % 5).expand(2, TOKENS)
        parts = [place, norms["key_norm"][layer].exp(), norms["value_norm"][layer] ** 3]
        targets.append(torch.stack(parts, dim=-1))
        targets[-1][:, -2 * PLACES :, 0] = torch.nan
    found = score_baselines(
        head, norms, targets, seeds=torch.tensor([5, 6]), budget_share=2 / PLACES
    )
    assert tuple(found) == BASELINES
    for layer in range(2):
        for name, part in zip(BASELINES, PARTS, strict=True):
            for other in BASELINES:
                score = found[other][part]["spearman"][layer]
                recall = found[other][part]["recall"][layer]
                if other != name:
                    assert abs(score) < 0.6
                    assert recall < 0.8
                elif name == "position":
                    # Ties between tokens of one place are broken by chance, on either side.
                    assert 0.85 < score < 1
                    assert 0.5 < recall <= 1
                else:
                    assert score == pytest.approx(1)
                    assert recall == 1


def test_breaking_ties_changes_no_order_that_is_there():
    generator = torch.Generator().manual_seed(1)
    values, targets = (torch.randn(2, TOKENS, 3, generator=generator) for _ in range(2))
    seeds = torch.tensor([1, 2])
    ranks = break_ties(values, seeds)
    assert torch.equal(
        ranks.sort(dim=1).values, torch.arange(TOKENS).view(1, -1, 1).expand(2, -1, 3)
    )
    assert head_scores(ranks, targets, 0.3) == head_scores(values, targets, 0.3)


def test_equal_values_come_in_an_order_of_the_clips_own():
    values = (torch.arange(300) % 3).float()[None, :, None].expand(2, 300, 3)
    ranks = break_ties(values, torch.tensor([1, 2]))
    assert torch.equal(values.gather(1, ranks.argsort(dim=1)), values.sort(dim=1).values)
    assert not torch.equal(ranks[0], ranks[1])
    assert torch.equal(break_ties(values[:1], torch.tensor([2]))[0], ranks[1])
    time = torch.arange(300.0)[None, :, None].expand(2, 300, 3)
    # 300 tokens: the correlation with age is 0 within three deviations of 1 / sqrt(300).
    assert all(abs(score.spearman) < 0.17 for score in head_scores(ranks, time, 0.3))


def test_the_sentence_counts_where_the_head_is_better_and_where_not():
    def scores(later: list[float], within: list[float]) -> dict:
        return {
            part: {"spearman": values, "recall": [1 - value for value in values]}
            for part, values in (("later", later), ("within", within))
        }

    own = scores([0.1, 0.5, 0.5], [0.2, 0.2, 0.2])
    others = {
        "position": scores([0.3, 0.4, 0.4], [0.2, 0.3, 0.3]),
        "value_norm": scores([0.0, 0.0, 0.0], [0.0, 0.0, 0.0]),
    }
    assert beside_baselines(own, others) == (
        "Of 6 pairs of layer and part, the head ranks better than the mean salience of the place "
        "in 2 (3) and the size of the value in 6 (0); in brackets, where its recall is better."
    )
