"""What 8 and 4 bits keep of keys and values; bounds are the steps that the parts themselves say."""

import pytest
import torch

from models.kv_storage import NARROWEST, STORAGES, Storage, storage_named

B, N, S, D = 2, 3, 7, 10
QUANTISED = [STORAGES["int8"], STORAGES["int4"]]
BITS = {"int8": 8, "int4": 4}
# float32 arithmetic: five operations of relative error 2^-24 each, on numbers of this size.
ROUNDING = 5 * 2.0**-24


def random_pair(seed=0, shape=(B, N, S, D), dtype=torch.float32, size=1.0):
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(shape, generator=generator) * size for _ in range(2))
    return keys.to(dtype), values.to(dtype)


def round_trip(storage: Storage, keys, values, *, first=None, dtype=torch.float32):
    """Decoded keys and values, with the steps that the parts say they were rounded to."""
    calibration = storage.calibrate(*(first or (keys, values)))
    parts = storage.encode(keys, values, calibration)
    gain, scale, _ = parts["ranges"].float().split(1, dim=-1)
    steps = (
        gain * calibration["reach"] / (2 ** (BITS[storage.name] - 1) - 1),
        scale * calibration["unit"],
    )
    return storage.decode(parts, calibration, dtype), steps


@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1.0, 1e30])
def test_an_error_is_at_most_half_a_step_whatever_the_size_of_the_numbers(storage, size):
    first = random_pair(1, size=size)
    later = random_pair(2, size=30 * size)  # far beyond what was calibrated
    for pair in (first, later):
        decoded, steps = round_trip(storage, *pair, first=first)
        for found, expected, step in zip(decoded, pair, steps, strict=True):
            slack = ROUNDING * 30 * 5 * size  # 5 standard deviations
            assert ((found - expected).abs() <= step / 2 + slack).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_step_is_no_wider_than_the_range_asks_for(storage):
    keys, values = random_pair()
    _, (key_step, value_step) = round_trip(storage, keys, values)
    bits = BITS[storage.name]
    half_float = 1 + 2.0**-9  # gain and scale are rounded up to a float16
    middle = (keys.amax(2, keepdim=True) + keys.amin(2, keepdim=True)) / 2
    reach = (keys - middle).abs().amax(2, keepdim=True)  # of a channel
    assert (key_step <= reach * half_float / (2 ** (bits - 1) - 1)).all()
    spread = values.amax(-1, keepdim=True) - values.amin(-1, keepdim=True)
    unit = values.abs().amax((2, 3), keepdim=True)
    # The zero lies up to one float16 distance below the smallest value.
    asked = (spread + 2.0**-10 * unit) / (2**bits - 1)
    assert (value_step <= asked * half_float + 2.0**-23 * unit).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_steps_of_keys_follow_their_channel_and_steps_of_values_their_token(storage):
    keys, values = random_pair()
    keys[..., 4] *= 100  # one channel
    values[:, :, 5] *= 100  # one token
    _, (plain_key_step, plain_value_step) = round_trip(storage, *random_pair())
    (found, _), (key_step, value_step) = round_trip(storage, keys, values)
    others = [d for d in range(D) if d != 4]
    # Relative to its reach each channel is as before, so the gain is, too, but for one rounding of
    # the middle; with one range for the whole head the step would be nearly 100 times as wide.
    torch.testing.assert_close(
        key_step[..., others], plain_key_step[..., others], rtol=2**-9, atol=0
    )
    torch.testing.assert_close(key_step[..., 4], 100 * plain_key_step[..., 4], rtol=2**-9, atol=0)
    error = (found - keys)[..., others].abs()
    assert (error <= plain_key_step[..., others] * (1 + 2**-9) / 2 + ROUNDING * 5).all()
    # The unit of the head grew, and with it the distances of float16, not the steps.
    tokens = [s for s in range(S) if s != 5]
    unit = values.abs().amax()
    widest = plain_value_step[:, :, tokens] * (1 + 2**-9) + 2.0**-23 * unit
    assert (value_step[:, :, tokens] <= widest).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_channels_and_tokens_that_do_not_vary_are_exact(storage):
    keys, values = random_pair(dtype=torch.bfloat16)
    keys[..., 3] = 1.7  # a channel that stays where it is
    values[:, :, 2] = -0.37  # tokens of one number; bfloat16 fits into float16
    values[:, :, 4] = 0
    (found_keys, found_values), _ = round_trip(storage, keys, values, dtype=torch.bfloat16)
    assert torch.equal(found_keys[..., 3], keys[..., 3])
    assert torch.equal(found_values[:, :, [2, 4]], values[:, :, [2, 4]])
    for constant in (0.0, 3.0, -1.25 * 2.0**-70):
        same = torch.full((B, N, S, D), constant)
        decoded, _ = round_trip(storage, same, same)
        for found in decoded:
            assert torch.equal(found, same)


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_row_of_one_float32_number_is_kept_to_a_step_of_float16s_own_step(storage):
    keys, values = random_pair()
    values[:, :, 2] = torch.pi
    (_, found), _ = round_trip(storage, keys, values)
    ulp = 2.0**-9  # of float16 between 2 and 4
    step = ulp / (2 ** BITS[storage.name] - 1)
    unit = values.abs().amax()
    assert (found[:, :, 2] - torch.pi).abs().max() <= step + 2.0**-24 * unit


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_channel_without_a_range_in_the_first_block_does_not_coarsen_later_tokens(storage):
    keys, values = random_pair(1)
    keys[..., 3] = 0.5
    later, later_values = random_pair(2)
    later[..., 3] = 0.5 + 0.1 * later[..., 3]
    _, (step, _) = round_trip(storage, later, later_values, first=(keys, values))
    reach = (keys.amax(2) - keys.amin(2)) / 2  # [B, N, D]
    narrowest = reach.median(-1).values * NARROWEST  # [B, N]
    needed = ((later[..., 3] - 0.5).abs() / narrowest[..., None]).amax()
    others = [d for d in range(D) if d != 3]
    middle = (keys.amax(2, keepdim=True) + keys.amin(2, keepdim=True)) / 2
    normal = ((later - middle) / reach[:, :, None])[..., others].abs().amax(-1, keepdim=True)
    widest = normal.clamp(min=float(needed)) * reach[:, :, None] * (1 + 2**-9)
    assert (step[..., others] <= (widest / (2 ** (BITS[storage.name] - 1) - 1))[..., others]).all()


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_is_stored_the_same_in_any_batch(storage, dtype):
    keys, values = random_pair(shape=(3, N, S, D), dtype=dtype)
    keys[1], values[1] = keys[1] * 50, values[1] * 50
    calibration = storage.calibrate(keys, values)
    parts = storage.encode(keys, values, calibration)
    decoded = storage.decode(parts, calibration, dtype)
    for i in range(3):
        own = storage.calibrate(keys[i : i + 1], values[i : i + 1])
        alone = storage.encode(keys[i : i + 1], values[i : i + 1], own)
        for name, part in parts.items():
            assert torch.equal(alone[name][0], part[i])
        for one, many in zip(storage.decode(alone, own, dtype), decoded, strict=True):
            assert one.dtype == dtype
            assert torch.equal(one[0], many[i])


@pytest.mark.parametrize("storage", QUANTISED)
def test_rows_far_from_zero_are_kept_to_half_a_step(storage):
    keys, values = random_pair(shape=(2, 3, 50, D))
    for offset in (100.0, -100.0):
        moved = values * torch.logspace(-6, 0, 50)[:, None] + offset
        (_, found), (_, step) = round_trip(storage, keys, moved)
        assert ((found - moved).abs() <= step / 2 + ROUNDING * 100).all()


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_a_token_is_stored_the_same_whatever_comes_with_it(storage):
    keys, values = random_pair()
    keys[:, :, 3], values[:, :, 3] = keys[:, :, 3] * 50, values[:, :, 3] * 50
    calibration = storage.calibrate(*random_pair(1))
    whole = storage.encode(keys, values, calibration)
    some = storage.encode(keys[:, :, 4:], values[:, :, 4:], calibration)
    for name, part in whole.items():
        assert torch.equal(part[:, :, 4:], some[name])


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
def test_tokens_may_be_gathered_and_joined_as_parts(storage):
    first, later = random_pair(1), random_pair(2, shape=(B, N, 4, D))
    calibration = storage.calibrate(*first)
    parts = [storage.encode(*pair, calibration) for pair in (first, later)]
    chosen = torch.tensor([0, 6, 8, 10])
    joined = {name: torch.cat([p[name] for p in parts], 2)[:, :, chosen] for name in parts[0]}
    found = storage.decode(joined, calibration, torch.float32)
    for i, decoded in enumerate(found):
        whole = torch.cat([storage.decode(p, calibration, torch.float32)[i] for p in parts], dim=2)
        assert torch.equal(decoded, whole[:, :, chosen])


@pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_bytes_of_a_token_are_those_of_its_tensors(storage, dtype):
    keys, values = random_pair(dtype=dtype)
    parts = storage.encode(keys, values, storage.calibrate(keys, values))
    assert all(part.shape[:3] == (B, N, S) for part in parts.values())
    held = sum(part.numel() * part.element_size() for part in parts.values())
    assert storage.token_bytes(N, D, dtype) * B * S == held


def test_the_published_shape_takes_a_little_over_half_and_a_quarter_of_bfloat16():
    sizes = [STORAGES[name].token_bytes(12, 128, torch.bfloat16) for name in STORAGES]
    assert sizes == [6144, 3072 + 72, 1536 + 72]  # 2 x 12 x 128 numbers, 12 x 3 float16


def test_model_precision_hands_out_the_tensors_themselves():
    keys, values = random_pair(dtype=torch.bfloat16)
    storage = storage_named("model")
    parts = storage.encode(keys, values, storage.calibrate(keys, values))
    found = storage.decode(parts, {}, torch.bfloat16)
    assert found[0].data_ptr() == keys.data_ptr()
    assert found[1].data_ptr() == values.data_ptr()


@pytest.mark.parametrize("storage", QUANTISED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_storing_what_was_read_moves_it_by_at_most_a_step(storage, dtype):
    keys, values = random_pair(dtype=dtype)
    calibration = storage.calibrate(keys, values)
    once, steps = round_trip(storage, keys, values, dtype=dtype)
    twice, _ = round_trip(storage, *once, first=(keys, values), dtype=dtype)
    assert calibration["reach"].shape == (B, N, 1, D)
    for a, b, step in zip(once, twice, steps, strict=True):
        rounding = torch.finfo(dtype).eps * a.abs()  # of the two results themselves
        assert ((a - b).float().abs() <= step + rounding).all()


@pytest.mark.parametrize("storage", QUANTISED)
def test_attention_over_stored_tokens_errs_as_rounding_to_these_steps_must(storage):
    shape = (1, 4, 512, 64)
    keys, values = random_pair(1, shape=shape)
    queries = random_pair(2, shape=shape)[0][:, :, :64]

    def read(keys, values):
        return torch.softmax(queries @ keys.mT / 8, dim=-1) @ values

    (found_keys, found_values), (key_step, value_step) = round_trip(storage, keys, values)
    exact = read(keys, values)
    error = (read(found_keys, found_values) - exact).norm() / exact.norm()
    # A rounding error is uniform within a step: variance step^2 / 12. Keys of unit variance shift a
    # score by |q| / sqrt(D) = 1 times theirs, and a probability by that share; values shift the
    # output as much as their own unit variance makes it up.
    expected = ((key_step.square().mean() + value_step.square().mean()) / 12).sqrt()
    # Within a fifth: the exponential is not linear, and heads, tokens and queries are finite.
    assert error == pytest.approx(float(expected), rel=0.2)


@pytest.mark.parametrize("storage", QUANTISED)
def test_a_token_beyond_any_range_shows(storage):
    first = random_pair()
    calibration = storage.calibrate(*first)
    parts = storage.encode(first[0] * 1e7, first[1] * 1e7, calibration)
    for decoded in storage.decode(parts, calibration, torch.float32):
        assert not decoded.isfinite().any(dim=-1).any()


def test_bad_input_is_refused():
    odd = random_pair(shape=(1, 1, 2, 5))
    for call in (
        lambda: STORAGES["int4"].calibrate(*odd),
        lambda: STORAGES["int4"].encode(*odd, STORAGES["int8"].calibrate(*odd)),
        lambda: STORAGES["int4"].token_bytes(1, 5, torch.float32),
    ):
        with pytest.raises(ValueError, match="even number of channels, got 5; use int8"):
            call()
    assert STORAGES["int8"].encode(*odd, STORAGES["int8"].calibrate(*odd))["keys"].shape[-1] == 5
    with pytest.raises(ValueError, match="at least one token"):
        STORAGES["int8"].calibrate(*random_pair(shape=(1, 1, 0, 4)))
    with pytest.raises(ValueError, match=r"must be one of .*int4.*, got 'int2'"):
        storage_named("int2")
