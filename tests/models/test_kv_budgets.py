"""Budgets of layers: exact sums, floors, closed forms, and the attention statistics behind them."""

import math

import pytest
import torch

from models.kv_budgets import (
    BUDGETS,
    NEED_STATISTICS,
    LayerStatistics,
    apportion,
    entropy,
    prefix,
    pyramid,
    uniform,
)

L = 5


def random_mass(seed, num_keys=40, samples=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(samples, num_keys, generator=generator).pow(4)


def observed(*passes) -> LayerStatistics:
    statistics = LayerStatistics()
    for mass in passes:
        statistics.update(mass)
    return statistics


def five_layers():
    return [
        observed(*(random_mass(10 * layer + p, 30 + 5 * p) for p in range(3))) for layer in range(L)
    ]


@pytest.mark.parametrize("name", BUDGETS)
@pytest.mark.parametrize("total", [35, 36, 101, 139, 1000])
@pytest.mark.parametrize("least", [0, 1, 7])
def test_budgets_add_up_and_hold_the_least(name, total, least):
    found = BUDGETS[name](total, L, least, five_layers() if name in NEED_STATISTICS else None)
    assert len(found) == L
    assert sum(found) == total
    assert min(found) >= least
    assert all(type(count) is int for count in found)


@pytest.mark.parametrize("name", BUDGETS)
def test_a_total_below_the_least_of_all_layers_is_refused(name):
    statistics = five_layers() if name in NEED_STATISTICS else None
    assert BUDGETS[name](35, L, 7, statistics) == [7] * L
    with pytest.raises(ValueError, match="5 layers of 7 tokens = 35, got 34; raise the total"):
        BUDGETS[name](34, L, 7, statistics)
    with pytest.raises(ValueError, match="at least one layer"):
        BUDGETS[name](34, 0, 7, [] if name in NEED_STATISTICS else None)


def test_the_largest_remainders_win_and_ties_go_to_the_first_layers():
    assert apportion(10, [5.4, 3.3, 1.3], least=0) == [6, 3, 1]  # of 10: 5.4, 3.3, 1.3
    assert apportion(10, [1.3, 3.3, 5.4], least=0) == [1, 3, 6]
    assert apportion(11, [1.0, 1.0, 1.0, 1.0], least=2) == [3, 3, 3, 2]
    assert apportion(16, [3.0, 0.0, 1.0], least=4) == [7, 4, 5]
    assert uniform(13, 4, 1) == [4, 3, 3, 3]


@pytest.mark.parametrize(
    ("bad", "match"),
    [([0.0, 0.0], "all are 0"), ([1.0, -1.0], ">= 0"), ([1.0, math.nan], "finite")],
)
def test_preferences_that_say_nothing_are_refused(bad, match):
    with pytest.raises(ValueError, match=match):
        apportion(10, bad, least=1)


@pytest.mark.parametrize("slope", [0.0, 0.3, 0.95, 1.0])
@pytest.mark.parametrize("total", [30 * 11, 30 * 11 + 17, 9999])
def test_a_pyramid_falls_on_a_line(slope, total):
    least, num_layers = 6, 30
    found = pyramid(total, num_layers, least, slope)
    mean = total / num_layers - least
    for layer, count in enumerate(found):
        line = least + mean * (1 + slope) - layer * 2 * slope * mean / (num_layers - 1)
        assert abs(count - line) < 1, "largest remainders are less than a token off"
    assert found == sorted(found, reverse=True)
    assert pyramid(total, 1, least, slope) == [total]


def test_a_pyramid_without_slope_is_uniform_and_a_slope_beyond_1_is_refused():
    assert pyramid(103, 4, 5, 0.0) == uniform(103, 4, 5)
    assert pyramid(4 * 5 + 100, 4, 5, 1.0)[-1] == 5
    assert pyramid(40 * 4, 4, 0) == [78, 53, 27, 2]  # beta = 20: last 40 / 20, first 80 - 2
    for slope in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"slope of a pyramid must be in \[0, 1\]"):
            pyramid(103, 4, 5, slope)


def test_budgets_follow_the_preference_of_cake():
    found = entropy(
        3 * 2 + 91,
        2,
        spatial=[4.0, 1.0, 2.0],
        temporal=[8.0, 8.0, 1.0],
        spatial_temperature=2.0,
        temporal_temperature=3.0,
    )
    # sqrt(4) cbrt(8) = 4, 1 cbrt(8) = 2, sqrt(2): of 91 tokens 49.1, 24.6, 17.4.
    assert found == [2 + 49, 2 + 25, 2 + 17]


def test_large_temperatures_even_out_and_small_ones_do_not_overflow():
    sharing = {"spatial": [400.0, 1.0], "temporal": [1e5, 1.0]}
    even = entropy(100, 0, **sharing, spatial_temperature=1e9, temporal_temperature=1e9)
    assert even == [50, 50]
    assert entropy(100, 0, **sharing, spatial_temperature=1e-3, temporal_temperature=1e-3) == [
        100,
        0,
    ]


def test_what_cake_cannot_work_with_is_refused():
    for bad in (
        {"spatial": [1.0, -1.0], "temporal": [1.0, 1.0]},
        {"spatial": [1.0], "temporal": [math.nan]},
    ):
        with pytest.raises(ValueError, match="entropy and variance must be finite and >= 0"):
            entropy(100, 1, **bad)
    with pytest.raises(ValueError, match="temperatures must be greater than 0, got 0"):
        entropy(100, 1, spatial=[1.0], temporal=[1.0], spatial_temperature=0)
    with pytest.raises(ValueError, match="observe more passes or share evenly"):
        entropy(100, 1, spatial=[1.0, 2.0], temporal=[0.0, 0.0])


def bisected(total, least, mass):
    """Lengths of the shortest prefixes that reach a share, the share found by bisection."""
    sums = [m.double().sort(descending=True).values.cumsum(0) for m in mass]
    held = [(x / x[-1]).tolist() for x in sums]

    def lengths(share):
        return [max(least, next(n for n, h in enumerate(hs, 1) if h >= share)) for hs in held]

    low, high = 0.0, 1.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(lengths(middle)) <= total else (low, middle)
    return lengths(low)


@pytest.mark.parametrize("total", [25, 26, 60, 113, 180])
@pytest.mark.parametrize("least", [1, 5])
def test_one_share_of_importance_for_all_layers_spends_the_total(total, least):
    mass = [random_mass(layer, 40, 1)[0] ** (layer + 1) for layer in range(L)]  # ever more peaked
    found = prefix(total, least, mass)
    assert found == bisected(total, least, mass)
    assert found == prefix(total, least, [7 * m.flip(0) for m in mass])


def test_layers_whose_importance_is_peaked_need_less_and_more_total_takes_from_none():
    flat, peaked = torch.ones(50), 0.7 ** torch.arange(50)
    previous = [3, 3]
    for total in range(6, 100):
        found = prefix(total, 3, [flat, peaked])
        assert all(now >= before for now, before in zip(found, previous, strict=True))
        assert found[0] >= found[1] or total > 80
        previous = found
    # A share of 0.7: 35 of 50 even tokens, and 1 - 0.7^n >= 0.7 from n = 4 on.
    assert prefix(35 + 4, 0, [flat, peaked]) == [35, 4]


def test_equal_layers_share_evenly_and_what_nobody_reads_is_shared_evenly():
    assert prefix(11, 0, [torch.ones(8)] * 3) == [4, 4, 3]
    one = torch.tensor([0.0, 5.0, 0.0])
    assert prefix(9, 0, [one, torch.tensor([1.0, 1.0, 1.0])]) == [1 + 3, 3 + 2]
    for bad in (
        torch.zeros(3),
        torch.tensor([1.0, -0.5]),
        torch.tensor([1.0, math.nan]),
        torch.ones(0),
    ):
        with pytest.raises(ValueError, match="not so in layer 1"):
            prefix(9, 1, [one, bad])


def test_statistics_of_passes_equal_their_definition():
    passes = [random_mass(seed, 9) for seed in range(4)]
    statistics = observed(*passes)
    scaled = torch.stack(passes).double()
    scaled = scaled / scaled.mean(dim=2, keepdim=True)  # [passes, B, S]
    torch.testing.assert_close(statistics.variance, float(scaled.var(dim=0, correction=0).mean()))
    share = scaled.mean(0) / 9
    torch.testing.assert_close(statistics.shares, share)
    spread = torch.distributions.Categorical(probs=share).entropy().mean()
    assert statistics.entropy == pytest.approx(float(spread), rel=1e-6)
    expected = share.sort(dim=1, descending=True).values.mean(0)
    torch.testing.assert_close(statistics.sorted_shares, expected)


def test_entropy_is_the_logarithm_of_the_keys_read_evenly_and_0_for_one():
    mass = torch.zeros(3, 10)
    mass[:, 2:6] = 0.3
    assert observed(mass).entropy == pytest.approx(math.log(4))
    assert observed(torch.eye(3)).entropy == 0


def test_steady_attention_has_no_variance_however_many_queries_read_and_keys_come():
    steady = random_mass(0, 8).double()
    assert observed(steady, 4 * steady, 0.5 * steady).variance == 0  # powers of two: exact
    growing = observed(torch.ones(2, 4), torch.ones(2, 6), torch.ones(2, 13))
    assert growing.variance == 0
    assert growing.entropy == pytest.approx(math.log(13))


def test_a_key_counts_from_the_pass_it_came_with():
    statistics = observed(torch.ones(1, 2), torch.tensor([[1.0, 1.0, 4.0]]))
    # Scaled to a mean of 1: (1, 1), then (0.5, 0.5, 2); the mean of the new key is 2 over one pass.
    means = torch.tensor([[0.75, 0.75, 2.0]], dtype=torch.float64)
    torch.testing.assert_close(statistics.shares, means / 3.5)
    assert statistics.variance == pytest.approx((0.25**2 + 0.25**2 + 0) / 3)


def test_selected_keys_keep_their_own_statistics():
    passes = [random_mass(seed, 9) for seed in range(3)]
    statistics = observed(*passes)
    kept = torch.tensor([[0, 3, 8], [1, 2, 5]])
    before = statistics.shares.gather(1, kept)
    statistics.select(kept)
    torch.testing.assert_close(statistics.shares, before / before.sum(1, keepdim=True))
    statistics.update(torch.ones(2, 5))
    assert statistics.shares.shape == (2, 5)


def test_a_sample_has_the_same_statistics_in_any_batch():
    passes = [random_mass(seed, 9) for seed in range(3)]
    both = observed(*passes)
    for i in range(2):
        alone = observed(*(mass[i : i + 1] for mass in passes))
        assert torch.equal(alone.shares[0], both.shares[i])


def test_statistics_that_are_missing_or_wrong_are_refused():
    with pytest.raises(ValueError, match="at least one pass, got none"):
        _ = LayerStatistics().entropy
    with pytest.raises(ValueError, match="at least one pass, got none"):
        _ = LayerStatistics().variance
    for bad in (torch.tensor([[1.0, -1.0, 2.0]]), torch.zeros(1, 3), torch.full((1, 3), math.nan)):
        with pytest.raises(ValueError, match="nowhere negative and positive"):
            _ = observed(bad).entropy
    statistics = observed(torch.ones(2, 5))
    for shape in ((2, 4), (1, 5)):
        with pytest.raises(ValueError, match=r"2 samples and of the 5 keys.*call select"):
            statistics.update(torch.ones(shape))
    for name in NEED_STATISTICS:
        with pytest.raises(ValueError, match="of all 5 layers, got none"):
            BUDGETS[name](100, L, 1, None)
        with pytest.raises(ValueError, match="of all 5 layers, got those of 4"):
            BUDGETS[name](100, L, 1, five_layers()[1:])


def test_parameters_reach_their_rule():
    assert BUDGETS["pyramid"](100, 4, 1, None, slope=0.5) == pyramid(100, 4, 1, 0.5)
    even = {"spatial_temperature": 1e9, "temporal_temperature": 1e9}
    assert BUDGETS["entropy"](100, L, 1, five_layers(), **even) == uniform(100, L, 1)
