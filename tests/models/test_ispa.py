"""The modulation of ISPA against constructed gaps and least squares by another route."""

import pytest
import torch

from models.ispa import GapStatistics, modulate, modulation_bytes

B, N, Q, D = 2, 3, 50, 4
E = N * D


def outputs(seed=0, num_queries=Q, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    full, local = torch.randn(2, B, N, num_queries, D, generator=generator, dtype=torch.float64)
    return full.to(dtype), local.to(dtype)


def merged(attended):
    return attended.transpose(1, 2).flatten(2)  # [B, Q, E]


def split(x):
    return x.unflatten(-1, (N, D)).transpose(1, 2)


def recorded(*pairs) -> GapStatistics:
    statistics = GapStatistics(pairs[0][0].shape[0], E)
    for full, local in pairs:
        statistics.update(full, local)
    return statistics


def test_a_gap_that_is_linear_in_the_local_output_is_found_and_absorbed():
    _, local = outputs()
    linear = torch.randn(B, E, E, dtype=torch.float64)
    full = split(merged(local) + merged(local) @ linear.mT)
    found = recorded((full, local)).solve(1e-10)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), linear, rtol=1e-6, atol=1e-6)  # float32 result
    torch.testing.assert_close(modulate(local, found), full, rtol=1e-5, atol=1e-5)  # 12 of them


def test_it_is_the_least_squares_change_of_the_projection_for_any_projection():
    (full, local), ridge = outputs(), 0.3
    modulation = recorded((full, local)).solve(ridge).double()
    for sample in range(B):
        x, y = merged(local)[sample], merged(full)[sample]
        projection = torch.randn(7, E, dtype=torch.float64)
        weight = ridge * x.square().sum(0).mean()
        left = torch.cat([x, weight.sqrt() * torch.eye(E, dtype=torch.float64)])
        right = torch.cat([(y - x) @ projection.T, torch.zeros(E, 7, dtype=torch.float64)])
        change = torch.linalg.lstsq(left, right).solution.T
        # The modulation is returned in float32.
        torch.testing.assert_close(projection @ modulation[sample], change, rtol=1e-5, atol=1e-6)


def test_no_gap_and_no_output_give_no_modulation():
    _, local = outputs()
    assert not recorded((local, local)).solve(1e-3).any()
    silent = torch.zeros_like(local)
    assert not recorded((silent, silent)).solve(1e-3).any()


def test_a_modulation_means_the_same_whatever_the_unit_of_the_outputs():
    full, local = outputs()
    one = recorded((full, local)).solve(0.1)
    torch.testing.assert_close(recorded((1e4 * full, 1e4 * local)).solve(0.1), one)


def test_a_sample_gets_the_same_modulation_in_any_batch():
    full, local = outputs(dtype=torch.float32)
    local[0] *= 100
    both = recorded((full, local)).solve(0.01)
    for sample in range(B):
        alone = slice(sample, sample + 1)
        assert torch.equal(recorded((full[alone], local[alone])).solve(0.01)[0], both[sample])


def test_passes_add_up():
    first, later = outputs(1), outputs(2, num_queries=7)
    joined = tuple(torch.cat(pair, dim=2) for pair in zip(first, later, strict=True))
    step_by_step, at_once = recorded(first, later), recorded(joined)
    assert step_by_step.num_queries == at_once.num_queries == Q + 7
    torch.testing.assert_close(step_by_step.solve(0.1), at_once.solve(0.1))


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
@pytest.mark.parametrize("num_queries", [3, Q])
def test_no_modulation_is_worse_than_none_on_what_it_was_made_from(ridge, num_queries):
    full, local = outputs(num_queries=num_queries)
    modulation = recorded((full, local)).solve(ridge)
    before = (full - local).square().sum(dim=(1, 2, 3))
    after = (full - modulate(local, modulation)).square().sum(dim=(1, 2, 3))
    assert (after < before).all()


def test_a_larger_ridge_gives_a_smaller_modulation():
    statistics = recorded(outputs())
    norms = [float(statistics.solve(ridge).norm()) for ridge in (0.01, 0.1, 1.0, 10.0)]
    assert norms == sorted(norms, reverse=True)
    assert norms[0] > 5 * norms[-1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modulated_outputs_keep_their_dtype(dtype):
    full, local = outputs(dtype=dtype)
    modulation = recorded((full, local)).solve(0.1)
    found = modulate(local, modulation)
    assert found.dtype == dtype
    expected = local.double() + split(merged(local.double()) @ modulation.double().mT)
    # Products of 12 numbers, each rounded once, and the sum.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=20 * torch.finfo(dtype).eps)


def test_statistics_hold_no_graph_but_modulated_outputs_do():
    full, local = (x.requires_grad_() for x in outputs(dtype=torch.float32))
    statistics = recorded((full, local))
    modulation = statistics.solve(0.1)
    assert not statistics.local.requires_grad
    assert not modulation.requires_grad
    modulate(local, modulation).sum().backward()
    assert local.grad.abs().sum() > 0


def test_bytes_are_those_of_the_tensor():
    modulation = recorded(outputs()).solve(0.1)
    assert modulation_bytes(E) * B == modulation.numel() * modulation.element_size()
    assert modulation_bytes(E, torch.bfloat16) == modulation[0].bfloat16().nbytes


def test_bad_input_is_refused():
    statistics = GapStatistics(B, E)
    full, local = outputs()
    with pytest.raises(ValueError, match="none was recorded"):
        statistics.solve(0.1)
    for full_bad, local_bad in ((full[:, :, 1:], local), (full[0], local[0])):
        with pytest.raises(ValueError, match="of the same queries"):
            statistics.update(full_bad, local_bad)
    with pytest.raises(ValueError, match="of 2 samples and width 12"):
        statistics.update(full[:, 1:], local[:, 1:])
    statistics.update(full, local)
    for ridge in (0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="ridge must be greater than 0"):
            statistics.solve(ridge)
