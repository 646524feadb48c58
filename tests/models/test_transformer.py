"""The transformer against diffusers' Wan, and its masks and caches against each other."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel

from models.attention import (
    block_causal_mask,
    group_teacher_forcing,
    rotary_angles,
    rotary_axis_sizes,
    rotate,
    teacher_forcing_spans,
)
from models.kv_policies import build_policy
from models.kv_spec import CacheSpec
from models.rollout import make_cache, refresh
from models.transformer import VideoTransformer
from models.wan_names import diffusers_name
from tests.models.small import random_transformer

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "ffn_dim": 48, "freq_dim": 32}


def make(**changes) -> VideoTransformer:
    return random_transformer(**(SIZES | {"text_dim": 20} | changes))


def diffusers_pair() -> tuple[WanTransformer3DModel, VideoTransformer]:
    """Diffusers' network and ours with the same random weights."""
    torch.manual_seed(1)
    reference = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=20,
        freq_dim=32,
        ffn_dim=48,
        num_layers=2,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    network = make(patch_size=(1, 2, 2), rope_theta=10000.0)
    weights = reference.state_dict()
    assert len(weights) == len(network.state_dict())
    network.load_state_dict({k: weights[diffusers_name(k)] for k in network.state_dict()})
    return reference, network


def both(reference, network, frames, height, width, dtype=torch.float32):
    """What the two say of the same batch of two videos.  [2, F, C, H, W]."""
    generator = torch.Generator().manual_seed(7)
    latents = torch.randn(2, frames, 16, height, width, generator=generator).to(dtype)
    text = torch.randn(2, 7, 20, generator=generator).to(dtype)
    sigma = torch.tensor([0.13, 0.87])
    ours = network(latents, sigma[:, None].expand(2, frames), text)
    theirs = reference(
        hidden_states=latents.transpose(1, 2),
        timestep=1000 * sigma,
        encoder_hidden_states=text,
        return_dict=False,
    )[0].transpose(1, 2)
    return ours, theirs


SHAPES = [(1, 4, 6), (5, 8, 12), (3, 2, 2), (7, 6, 10)]


@pytest.mark.parametrize(("frames", "height", "width"), SHAPES)
def test_equals_diffusers_on_the_same_weights_with_gradients(frames, height, width):
    reference, network = diffusers_pair()
    ours, theirs = both(reference, network, frames, height, width)
    # Same float32 sums in another order: 1e-5 of the largest value.
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    ours.square().mean().backward()
    theirs.square().mean().backward()
    theirs_grad = dict(reference.named_parameters())
    for name, parameter in network.named_parameters():
        other = theirs_grad[diffusers_name(name)].grad
        assert (parameter.grad - other).abs().max() <= 1e-4 * other.abs().max() + 1e-7, name


@pytest.mark.parametrize(("frames", "height", "width"), SHAPES)
@torch.no_grad()
def test_in_bfloat16_differs_from_diffusers_by_no_more_than_rounding(frames, height, width):
    exact = both(*diffusers_pair(), frames, height, width)[1]
    pair = (network.to(torch.bfloat16) for network in diffusers_pair())
    ours, theirs = both(*pair, frames, height, width, torch.bfloat16)
    rounding = (theirs.float() - exact).square().mean().sqrt()
    assert rounding > 0
    # Both round at every layer, at other places: neither is further from the exact values.
    assert (ours.float() - exact).square().mean().sqrt() <= 1.25 * rounding
    assert (ours.float() - theirs.float()).square().mean().sqrt() <= 2 * rounding


def test_axes_of_the_heads_are_wans():
    assert rotary_axis_sizes(128) == (44, 42, 42)


def test_rotation_depends_on_lag_only_and_has_no_longest_video():
    torch.manual_seed(0)
    query, key = torch.randn(1, 1, 1, 24), torch.randn(1, 1, 1, 24)

    def score(frame: int, other: int) -> torch.Tensor:
        places = torch.tensor([[frame, 1, 2]]), torch.tensor([[other, 0, 1]])
        angles = [rotary_angles(place, 24, 1e4) for place in places]
        return (rotate(query, angles[0]) * rotate(key, angles[1])).sum()

    torch.testing.assert_close(score(3, 1), score(100_003, 100_001), rtol=1e-4, atol=1e-4)
    assert abs(score(3, 1) - score(3, 0)) > 1e-3


def nested_loops(num_blocks: int, block_len: int, visible: torch.Tensor) -> torch.Tensor:
    size = num_blocks * block_len
    mask = torch.zeros(2 * size, 2 * size, dtype=torch.bool)
    for q in range(size):
        for k in range(size):
            bq, bk = q // block_len, k // block_len
            mask[q, k] = bk == bq or (bk < bq and visible[q, k])
            mask[size + q, k] = bk < bq and visible[q, k]
            mask[size + q, size + k] = bk == bq
    return mask


@pytest.mark.parametrize("spans", [[4], [1, 3], [2, 1, 1]])
def test_groups_hold_what_two_nested_loops_find(spans):
    visible = torch.rand(12, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    dense = nested_loops(4, 3, visible)
    found, read = torch.zeros_like(dense), torch.zeros_like(dense)
    start = 0
    for group in group_teacher_forcing(visible[None], 3, spans):
        stop = start + group.size
        span = torch.arange(start, stop)
        rows = torch.cat([span, 12 + span])[:, None]
        keys = torch.cat([torch.arange(stop), 12 + span])
        found[rows, keys], read[rows, keys] = group.mask[0, 0], True
        start = stop
    assert torch.equal(found, dense)
    assert not (dense & ~read).any()


@pytest.mark.parametrize(
    ("num_blocks", "block_len", "spans"),
    [
        (7, 4680, [1] * 7),  # Wan at 480 x 832
        (12, 16, [4, 4, 4]),
        (7, 16, [3, 4]),
        (7, 200, [1, 2, 2, 2]),
        (1, 16, [1]),
    ],
)
def test_spans_have_at_most_four_blocks_and_few_tokens(num_blocks, block_len, spans):
    assert teacher_forcing_spans(num_blocks, block_len) == spans


@pytest.mark.parametrize("spans", [[5], [2, 3], [1, 2, 2], [1] * 5])
def test_grouped_mask_equals_the_dense_one(spans):
    network = make()
    latents, text = torch.randn(2, 20, 16, 2, 3), torch.randn(2, 4, 20)
    sigma = torch.rand(2, 20)
    visible = torch.rand(2, 60, 60) < 0.5
    mask = torch.stack([nested_loops(5, 12, one) for one in visible])[:, None]
    frames = torch.arange(10).repeat(2)
    dense = network(latents, sigma, text, frames=frames, mask=mask)
    groups = group_teacher_forcing(visible, 12, spans)
    grouped = network(latents, sigma, text, frames=frames, mask=groups)
    torch.testing.assert_close(grouped, dense, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_added_in_the_precision_of_the_products(dtype, monkeypatch):
    network, attend, masks = make(), F.scaled_dot_product_attention, []

    def noted(*args, attn_mask=None, **rest):
        masks.extend([] if attn_mask is None else [attn_mask])
        return attend(*args, attn_mask=attn_mask, **rest)

    monkeypatch.setattr(F, "scaled_dot_product_attention", noted)
    given = torch.randn(1, 4, 16, 2, 3), torch.rand(1, 4), torch.randn(1, 4, 20)
    groups = group_teacher_forcing(torch.ones(1, 12, 12, dtype=torch.bool), 6, [1, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        network(*given, frames=torch.arange(2).repeat(2), mask=groups)
    assert {mask.dtype for mask in masks} == {dtype}


def full_cache(network, num_samples):
    """An empty cache that keeps everything, for frames of six tokens and blocks of two frames."""
    return make_cache(
        network,
        spec=CacheSpec(budget_tokens=1, tokens_per_frame=6, frames_per_block=2),
        policy=build_policy("full"),
        seeds=torch.arange(num_samples),
    )


@pytest.mark.parametrize("num_frames", [2, 6, 14])
def test_block_by_block_with_unbounded_cache_equals_one_causal_pass(num_frames):
    network = make()
    latents, text = torch.randn(2, num_frames, 16, 2, 3), torch.randn(2, 4, 20)
    sigma = torch.rand(2, num_frames)
    mask = block_causal_mask(num_frames // 2, 12)
    cache = full_cache(network, 2)
    with torch.no_grad():
        blocks = [
            network(
                latents[:, f : f + 2],
                sigma[:, f : f + 2],
                text,
                cache=cache,
                write=True,
            )
            for f in range(0, num_frames, 2)
        ]
        whole = network(latents, sigma, text, mask=mask)
    torch.testing.assert_close(torch.cat(blocks, dim=1), whole, rtol=1e-5, atol=1e-5)
    if num_frames == 2:  # one block: the student is the bidirectional model
        torch.testing.assert_close(whole, network(latents, sigma, text), rtol=1e-5, atol=1e-5)


def test_noisy_half_equals_cached_denoising_of_every_block():
    network = make()
    clean, noisy = torch.randn(1, 6, 16, 2, 3), torch.randn(1, 6, 16, 2, 3)
    text, sigma = torch.randn(1, 4, 20), torch.rand(1, 6)
    everything = torch.ones(1, 36, 36, dtype=torch.bool)
    cache = full_cache(network, 1)
    with torch.no_grad():
        trained = network(
            torch.cat([clean, noisy], dim=1),
            torch.cat([torch.zeros_like(sigma), sigma], dim=1),
            text,
            frames=torch.arange(6).repeat(2),
            mask=group_teacher_forcing(everything, 12, [1, 2]),
            wanted=6,
        )
        for f in range(0, 6, 2):
            span = slice(f, f + 2)
            got = network(noisy[:, span], sigma[:, span], text, cache=cache)
            torch.testing.assert_close(got, trained[:, span], rtol=1e-5, atol=1e-5)
            zero = torch.zeros(1, 2)
            network(clean[:, span], zero, text, cache=cache, write=True)


def test_a_patch_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="multiples of the patch"):
        make(patch_size=(1, 2, 2))(
            torch.randn(1, 1, 16, 3, 4), torch.zeros(1, 1), torch.zeros(1, 1, 20)
        )


@pytest.mark.parametrize("kind", ["bidirectional", "dense", "grouped", "cached"])
def test_wanted_frames_are_the_last_of_all_with_the_same_gradients(kind):
    network, wanted = make(), 4
    latents, text = torch.randn(2, 8, 16, 2, 3), torch.randn(2, 4, 20)
    sigma = torch.rand(2, 8)
    given: dict = {"frames": torch.arange(4).repeat(2)} if kind == "grouped" else {}
    if kind == "dense":
        given["mask"] = block_causal_mask(4, 12)[None, None]
    if kind == "grouped":
        everything = torch.ones(1, 24, 24, dtype=torch.bool)
        given["mask"] = group_teacher_forcing(everything, 12, [1, 1])

    def answers(**more):
        if kind == "cached":
            more |= {"cache": one_block_cache(network)}
        network.zero_grad()
        velocity = network(latents, sigma, text, **(given | more))[:, -wanted:]
        velocity.square().mean().backward()
        return velocity, [parameter.grad.clone() for parameter in network.parameters()]

    for found, expected in zip(answers(wanted=wanted), answers(), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def one_block_cache(network):
    """A cache that holds one block of two frames."""
    cache = full_cache(network, 2)
    block = torch.randn(2, 2, 16, 2, 3, generator=torch.Generator().manual_seed(1))
    refresh(network, torch.zeros(2, 4, 20), block, cache=cache)
    return cache


def test_a_pass_without_wanted_frames_writes_and_captures_the_same():
    network = make()
    latents, sigma, text = torch.randn(2, 2, 16, 2, 3), torch.zeros(2, 2), torch.randn(2, 4, 20)
    seen = {}
    for wanted in (None, 0):
        cache, captured = one_block_cache(network), []
        velocity = network(
            latents,
            sigma,
            text,
            cache=cache,
            write=True,
            capture=lambda *found, to=captured: to.extend(found[1:]),
            wanted=wanted,
        )
        assert velocity.shape == (2, 2 if wanted is None else 0, 16, 2, 3)
        held = [part for layer in cache.layers for part in layer.read()]
        seen[wanted] = [*held, *captured]
    for found, expected in zip(seen[0], seen[None], strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
