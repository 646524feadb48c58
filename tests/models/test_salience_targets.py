"""Targets against a dense softmax in both back ends, their orientation, and their capture."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from launch.benchmark import peak_allocated
from models import salience_targets
from models.salience_targets import (
    SalienceCapture,
    attend_with_lse,
    attend_with_targets,
    mask_short_future,
    query_tiles,
    strongest_reads,
)
from tests.models.small import random_transformer

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="needs triton")


def dense_reference(queries, keys, block_len) -> torch.Tensor:
    """Every block of keys against the queries after, in and before it, from the full softmax."""
    queries, keys = queries.float(), keys.float()
    probability = (queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5).softmax(-1)
    size = keys.shape[2]
    out = torch.full((keys.shape[0], size, 3), torch.nan)
    for start in range(0, size, block_len):
        stop = min(start + block_len, size)
        for part, rows in enumerate((slice(stop, size), slice(start, stop), slice(0, start))):
            read = probability[:, :, rows, start:stop]
            if read.shape[2]:
                out[:, start:stop, part] = read.amax(dim=2).mean(dim=1)
    return out


def tensors(size, *, batch=2, heads=3, head_dim=12, spread=2.0, dtype=torch.float32):
    torch.manual_seed(0)
    made = torch.randn(3, batch, size, heads, head_dim) * spread
    # As the network makes them: heads are a stride within the width of a token.
    return made.to(dtype).transpose(2, 3).unbind(0)


SIZES = [
    (21, 6),  # a shorter last block
    (24, 6),
    (5, 7),  # one block, shorter than its length
    (13, 1),  # every token a block
    (2300, 1560),  # blocks above the tile, cut in uneven pieces
    (1100, 16),  # many blocks in a tile, keys of several tiles
]


@pytest.mark.parametrize(("size", "block_len"), SIZES)
def test_targets_equal_a_dense_softmax(size, block_len):
    queries, keys, values = tensors(size, batch=1 if size > 1000 else 2)
    attended, targets = attend_with_targets(queries, keys, values, block_len)
    expected = dense_reference(queries, keys, block_len)
    # Probabilities are exact up to the rounding of scores around 30 in float32.
    torch.testing.assert_close(targets, expected, rtol=2e-5, atol=1e-7, equal_nan=True)
    torch.testing.assert_close(attended, F.scaled_dot_product_attention(queries, keys, values))


@pytest.mark.parametrize("tile", [4, 7, 30])
@pytest.mark.parametrize("block_len", [1, 3, 6, 11, 40])
def test_no_tile_size_changes_the_targets(tile, block_len):
    queries, keys, values = tensors(37)
    _, lse = attend_with_lse(queries, keys, values)
    best = strongest_reads(queries, keys, lse, block_len, tile=tile)
    expected = dense_reference(queries, keys, block_len)
    targets = best.exp().mean(dim=2).permute(1, 2, 0)
    torch.testing.assert_close(
        targets, expected.nan_to_num(0), rtol=2e-5, atol=1e-7
    )  # exp(-inf) where a set is empty


@pytest.mark.parametrize(("block_len", "tile"), [(7, 3), (3, 7), (1, 200), (50, 9), (100, 7)])
def test_tiles_of_queries_cover_every_query_once_and_never_part_of_a_second_block(block_len, tile):
    seen = []
    for start, stop, num_blocks in query_tiles(100, block_len, tile):
        seen += range(start, stop)
        assert stop - start <= tile
        assert len({token // block_len for token in range(start, stop)}) == num_blocks
        assert (stop - start) % num_blocks == 0
    assert seen == list(range(100))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_exact_for_the_values_given(dtype):
    queries, keys, values = tensors(1100, dtype=dtype)
    attended, targets = attend_with_targets(queries, keys, values, 300)
    assert attended.dtype == dtype
    assert targets.dtype == torch.float32
    expected = dense_reference(queries, keys, 300)
    # Scores are float32 sums of exact products; the half-precision attention's log-sum-exp is good
    # to 6e-5, which is the whole error: 1 % of the rounding of the inputs themselves.
    torch.testing.assert_close(targets, expected, rtol=2e-4, atol=1e-7, equal_nan=True)


def test_autocast_changes_nothing():
    queries, keys, values = tensors(45)
    expected = attend_with_targets(queries, keys, values, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = attend_with_targets(queries, keys, values, 8)
        mixed, targets = attend_with_targets(queries, keys, values.bfloat16(), 8)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(targets, expected[1], rtol=0, atol=0, equal_nan=True)


def test_gradients_reach_what_attention_read_and_the_targets_carry_none():
    given = [x.clone().requires_grad_() for x in tensors(19)]
    attended, targets = attend_with_targets(*given, 8)
    assert not targets.requires_grad
    found = torch.autograd.grad(attended.square().sum(), given)
    expected = torch.autograd.grad(F.scaled_dot_product_attention(*given).square().sum(), given)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_orientation_later_means_read_by_queries_of_later_blocks():
    queries, keys = torch.zeros(2, 1, 1, 6, 4).unbind(0)
    queries[0, 0, 4, 0] = keys[0, 0, 1, 0] = 20.0  # a query of block 2 reads a key of block 0
    targets = attend_with_targets(queries, keys, keys, 2)[1][0]
    assert targets[1].tolist()[0] > 0.99
    assert targets[:, 0].nan_to_num(0).argmax() == 1
    assert targets[1, 1] == pytest.approx(1 / 6)
    assert targets[4:, 0].isnan().all(), "the last block has no later queries"
    assert targets[:2, 2].isnan().all(), "the first block has no earlier queries"
    assert int(targets.isnan().sum()) == 4


def test_memory_beside_the_output_grows_with_the_tokens_and_not_with_their_square():
    def beside_attention(size):
        given = tensors(size, batch=1, heads=2, head_dim=8)
        _, lse = attend_with_lse(*given)
        return peak_allocated(lambda: strongest_reads(given[0], given[1], lse, 512))

    tile = 4 * salience_targets.TILE**2
    one, two = beside_attention(2048) - tile, beside_attention(4096) - tile
    assert 0 < one < two < 2.2 * one  # twice, but for what does not grow


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"keys": torch.zeros(1, 2, 9, 4)}, "one shape"),
        ({"keys": torch.zeros(1, 2, 8, 4).half()}, "one floating dtype"),
        ({"block_len": 0}, "block_len must be at least 1"),
        ({"backend": "cuda"}, "backend must be one of"),
    ],
)
def test_bad_input_is_named(change, named):
    plain = torch.zeros(1, 2, 8, 4)
    given = {"queries": plain, "keys": plain, "values": plain, "block_len": 3} | change
    with pytest.raises(ValueError, match=named):
        attend_with_targets(**given)


def test_a_missing_triton_is_named_and_auto_does_without(monkeypatch):
    monkeypatch.setattr(salience_targets, "find_spec", lambda name: None)
    given = tensors(9)
    with pytest.raises(ValueError, match="needs the package triton"):
        attend_with_targets(*given, 4, backend="triton")
    torch.testing.assert_close(
        attend_with_targets(*given, 4, backend="auto"),
        attend_with_targets(*given, 4, backend="torch"),
        equal_nan=True,
    )


COMPARE = """
import torch
from models.salience_targets import attend_with_targets
from tests.models.test_salience_targets import dense_reference, tensors

for size, block_len, dtype in [(70, 47, "bfloat16"), (37, 3, "float32"), (5, 7, "float16")]:
    given = tensors(size, heads=2, dtype=getattr(torch, dtype))
    attended, targets = attend_with_targets(*given, block_len, backend="triton")
    expected = dense_reference(*given[:2], block_len)
    torch.testing.assert_close(targets, expected, rtol=2e-4, atol=1e-7, equal_nan=True)
    print(size, block_len, dtype)
"""


@needs_triton
def test_the_kernel_equals_a_dense_softmax_in_the_interpreter():
    root = Path(__file__).parents[2]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    found = subprocess.run(
        [sys.executable, "-c", COMPARE], env=environment, capture_output=True, text=True, cwd=root
    )
    assert found.returncode == 0, found.stderr
    assert len(found.stdout.splitlines()) == 3


@needs_triton
def test_the_kernel_refuses_cpu_tensors_outside_the_interpreter():
    with pytest.raises(ValueError, match="must be on a CUDA device"):
        attend_with_targets(*tensors(9), 4, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize(("size", "block_len"), [*SIZES, (3000, 1171)])
def test_targets_equal_a_dense_softmax_on_a_gpu(size, block_len, backend, dtype):
    queries, keys, values = (x.cuda() for x in tensors(size, dtype=dtype))
    attended, targets = attend_with_targets(queries, keys, values, block_len, backend=backend)
    expected = dense_reference(queries.cpu(), keys.cpu(), block_len)
    # The attention kernels round their log-sum-exp a little more than the CPU's.
    torch.testing.assert_close(targets.cpu(), expected, rtol=2e-3, atol=1e-6, equal_nan=True)
    plain = F.scaled_dot_product_attention(queries, keys, values)
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(attended, plain, **tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_whole_clip_of_the_largest_teacher_fits_on_a_gpu_with_linear_memory(backend):
    size, heads, head_dim = 32760, 12, 128
    given = torch.randn(3, 1, heads, size, head_dim, device="cuda", dtype=torch.bfloat16).unbind(0)
    attend_with_targets(*given, 4680, backend=backend)  # tuning of the kernel allocates
    plain = peak_allocated(lambda: F.scaled_dot_product_attention(*given))
    peak = peak_allocated(lambda: attend_with_targets(*given, 4680, backend=backend))
    assert peak - plain < 200e6  # one head's scores alone would be 4 GB


def test_keys_with_a_short_future_lose_only_their_later_target():
    targets = torch.ones(2, 1, 12, 3)
    masked = mask_short_future(targets, 3, 2)
    assert masked[..., 0].isnan().sum(-1).tolist() == [[6], [6]]
    assert not masked[..., 1:].isnan().any()
    assert not targets.isnan().any()


def teacher_pass(network, **options):
    torch.manual_seed(1)
    latents, sigma = torch.randn(2, 4, 16, 2, 3), torch.full((2, 4), 0.5)
    return network(latents, sigma, torch.randn(2, 3, 8), **options)


def test_capture_sees_the_teachers_own_pass_and_leaves_it_as_it_was():
    network = random_transformer()
    seen = []
    plain = teacher_pass(network, capture=lambda layer, hidden, q, k: seen.append((q, k)))
    with SalienceCapture(network, 10) as captured:
        probed = teacher_pass(network)
    torch.testing.assert_close(probed, plain)
    assert network.probe is None
    expected = torch.stack([dense_reference(queries, keys, 10) for queries, keys in seen])
    assert expected.shape == (2, 2, 24, 3)
    torch.testing.assert_close(captured.targets, expected, rtol=2e-5, atol=1e-7, equal_nan=True)


def test_capture_needs_no_velocity_of_any_frame():
    network = random_transformer()
    with SalienceCapture(network, 10) as every:
        teacher_pass(network)
    with SalienceCapture(network, 10) as none:
        assert teacher_pass(network, wanted=0).shape[1] == 0
    torch.testing.assert_close(none.targets, every.targets, equal_nan=True)


def test_capture_ends_with_an_error_and_does_not_nest():
    network = random_transformer()
    with pytest.raises(KeyError, match="in between"), SalienceCapture(network, 10):
        raise KeyError("in between")
    assert network.probe is None
    with SalienceCapture(network, 10) as outer:
        with pytest.raises(ValueError, match="one probe at a time"), SalienceCapture(network, 10):
            pass
        assert network.probe is outer
        with pytest.raises(ValueError, match="found none"):
            outer.targets  # noqa: B018
        teacher_pass(network)
        with pytest.raises(ValueError, match="one forward pass"):
            teacher_pass(network)
