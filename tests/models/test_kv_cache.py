"""Contract of the cache over every policy in the registry, and the visible sets of known ones."""

import pytest
import torch

from models.kv_policies import POLICIES, build_policy
from models.kv_policy import hash_uniform
from models.kv_spec import CacheSpec
from models.rollout import make_cache, recache, refresh
from tests.models.rolling import BLOCK, PLACES, RECENT, SINK, new_cache, roll
from tests.models.small import random_transformer


@pytest.mark.parametrize("policy", POLICIES)
def test_budget_order_in_time_and_protection_hold_for_every_policy(policy):
    network, previous = random_transformer(), None
    cache = new_cache(network, policy)
    for block in range(12):
        refresh(network, torch.zeros(2, 3, 8), torch.randn(2, BLOCK, 16, 2, 3), cache=cache)
        newest = (block + 1) * BLOCK - 1
        for layer in cache.layers:
            positions = layer.positions
            written = (newest + 1) * PLACES
            if not cache.policy.changes_tokens:
                assert layer.count == (min(36, written) if cache.policy.is_bounded else written)
            assert layer.count <= 36 or not cache.policy.is_bounded
            slot = positions[..., 0] * PLACES + positions[..., 1] * 3 + positions[..., 2]
            assert (slot.diff(dim=1) > 0).all(), "tokens must stay in order of time, none twice"
            for sample in positions[..., 0]:
                assert (sample > newest - RECENT).sum() == RECENT * PLACES
                if cache.policy.protects_sink:
                    assert (sample < SINK).sum() == SINK * PLACES
        if previous is not None:
            for before, now in zip(previous, cache.layers, strict=True):
                old = {tuple(p) for p in before.positions[0].tolist()}
                kept = {tuple(p) for p in now.positions[0].tolist() if p[0] <= newest - BLOCK}
                assert kept <= old, "an evicted token must not come back"
        previous = list(cache.layers)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_batch_of_two_gives_what_two_batches_of_one_give(policy):
    network = random_transformer().double()
    both = roll(network, cache := new_cache(network, policy), 16)
    for index, seed in enumerate((5, 6)):
        alone = new_cache(network, policy, seeds=(seed,))
        video = roll(network, alone, 16)
        torch.testing.assert_close(video[0], both[index], rtol=1e-5, atol=1e-5)
        for one, two in zip(alone.layers, cache.layers, strict=True):
            assert torch.equal(one.positions[0], two.positions[index])


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seeds_give_the_same_video_and_bf16_stays_finite(policy):
    network = random_transformer()
    first = roll(network, new_cache(network, policy), 12)
    assert torch.equal(first, roll(network, new_cache(network, policy), 12))
    half = random_transformer().bfloat16()
    assert roll(half, new_cache(half, policy), 12).isfinite().all()


def test_under_autocast_keys_are_cached_in_the_precision_of_values():
    network = random_transformer()
    cache = new_cache(network, "sink_window")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        roll(network, cache, 4)
    for layer in cache.layers:
        parts = layer.parts
        assert {name: part.dtype for name, part in parts.items()} == {
            "keys": torch.bfloat16,
            "values": torch.bfloat16,
        }


@pytest.mark.parametrize("time", ["absolute", "relative"])
@pytest.mark.parametrize("policy", POLICIES)
def test_more_than_1024_frames(policy, time):
    network = random_transformer()
    cache = new_cache(network, policy, time=time, max_lag=11)
    roll(network, cache, 4)
    cache.targets = cache.targets.repeat(1, 1, 3, 1)  # made for 400 frames
    cache.skip_to(1020)
    assert roll(network, cache, 14).isfinite().all()
    assert cache.num_frames == 1034
    for layer in cache.layers:
        assert layer.positions[..., 0].max() == 1033


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_resident_bytes_never_exceed_the_budget(policy, precision):
    network = random_transformer()
    cache = new_cache(network, policy, precision=precision)
    text = torch.zeros(2, 3, 8)
    allowed = 2 * 2 * 36 * cache._layers[0].storage.token_bytes(2, 12, torch.float32)
    for _ in range(8):
        refresh(network, text, torch.randn(2, BLOCK, 16, 2, 3), cache=cache)
        held = sum(
            part.numel() * part.element_size()
            for layer in cache.layers
            for part in layer.parts.values()
        )
        assert cache.num_bytes == held
        assert held <= allowed or not cache.policy.is_bounded


def test_fifo_and_sink_window_keep_what_their_names_say():
    network = random_transformer()
    for policy, expected in (
        ("fifo", {14, 15, 16, 17, 18, 19}),
        ("sink_window", {0, 15, 16, 17, 18, 19}),
    ):
        cache = new_cache(network, policy)
        roll(network, cache, 20)
        assert set(cache.layers[0].positions[0, :, 0].tolist()) == expected


def test_sink_window_reads_what_longlive_reads_for_twenty_blocks():
    # LongLive at window 12 and sink 3 reads slots [0, s) and [max(s, E' - (A - s)), E') of a
    # buffer of A = 12 frames that ends with the current block of 3: 3 sink and 9 newest frames.
    network = random_transformer()
    spec = {"sink_frames": 3, "recent_frames": 3, "frames_per_block": 3}
    cache = new_cache(network, "sink_window", budget=9 * PLACES, **spec)
    for number in range(20):
        cache.begin(3)
        end = 3 * (number + 1)
        longlive = sorted({*range(min(3, end)), *range(max(3, end - 9), end)})
        past = [] if number == 0 else cache.layers[1].positions[0, ::PLACES, 0].tolist()
        assert past + list(range(end - 3, end)) == longlive
        refresh(network, torch.zeros(2, 3, 8), torch.randn(2, 3, 16, 2, 3), cache=cache)


def test_random_lots_for_life_and_redrawn_differ_but_both_follow_the_seed():
    network = random_transformer()
    kept = {}
    for redraw in (True, False):
        cache = new_cache(network, "random", params={"redraw": redraw})
        roll(network, cache, 30)
        kept[redraw] = cache.layers[0].positions
    assert not torch.equal(kept[True], kept[False])
    assert not torch.equal(kept[True][0], kept[True][1])


def test_hashed_lots_are_uniform():
    lots = hash_uniform(torch.arange(8)[:, None], torch.arange(20_000)[None], 3)
    assert lots.min() >= 0
    assert lots.max() < 1
    # Standard error of the mean of 20,000 uniforms is 0.002; five of them.
    assert (lots.mean(1) - 0.5).abs().max() < 0.01
    assert (lots.var(1) - 1 / 12).abs().max() < 0.005
    assert len(lots.unique()) > 0.99 * lots.numel()


def test_attention_mass_counts_what_a_dense_softmax_counts():
    network = random_transformer()
    cache = new_cache(network, "attention_mass", budget=1000)
    text = torch.zeros(2, 3, 8)
    first, second = torch.randn(2, 2, BLOCK, 16, 2, 3).unbind(0)
    refresh(network, text, first, cache=cache)
    read: list[torch.Tensor] = []
    everything = torch.cat([first, second], dim=1)
    block = torch.arange(24) // 12
    network(
        everything,
        torch.zeros(2, 4),
        text,
        mask=block[:, None] >= block[None],
        capture=lambda layer, hidden, q, k: read.append(
            (q[:, :, 12:] @ k.transpose(-1, -2) * 12**-0.5).softmax(-1)[..., :12]
        ),
    )
    refresh(network, text, second, cache=cache)
    for layer, probabilities in enumerate(read):
        expected = probabilities.sum(2).mean(1)
        got = cache.layers[layer].features[:, :12, 0]
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


def test_attention_mass_decays_once_per_block():
    network, blocks = random_transformer(), torch.randn(2, 6, 16, 2, 3).split(BLOCK, dim=1)
    mass = {}
    for decay in (1.0, 0.5):
        cache = new_cache(network, "attention_mass", budget=1000, params={"decay": decay})
        for number, block in enumerate(blocks):
            for _ in range(2):  # denoising passes also read the cache
                network(block, torch.ones(2, BLOCK), torch.zeros(2, 3, 8), cache=cache)
            refresh(network, torch.zeros(2, 3, 8), block, cache=cache)
            mass[decay, number] = cache.layers[0].features[:, :12, 0]
    second = mass[1.0, 1]
    third = mass[1.0, 2] - second
    torch.testing.assert_close(mass[0.5, 2], 0.5 * second + third)


def test_relative_time_equals_absolute_within_the_trained_range_and_saturates_beyond():
    network = random_transformer()
    absolute = roll(network, new_cache(network), 12)
    relative = roll(network, new_cache(network, time="relative", max_lag=11), 12)
    assert torch.equal(absolute, relative)
    cache = new_cache(network, time="relative", max_lag=11)
    roll(network, cache, 40)
    cache.begin(2)
    assert cache.clock.shown(torch.tensor([0, 3, 32, 41])).tolist() == [0, 0, 2, 11]
    assert cache.positions((1, 1))[1].tolist() == [[10, 0, 0], [11, 0, 0]]


def test_no_gradient_crosses_a_block_through_the_cache():
    network = random_transformer()
    cache = new_cache(network, "full")
    first = torch.randn(2, BLOCK, 16, 2, 3, requires_grad=True)
    network(first, torch.zeros(2, 2), torch.zeros(2, 3, 8), cache=cache, write=True)
    second = torch.randn(2, BLOCK, 16, 2, 3, requires_grad=True)
    network(second, torch.zeros(2, 2), torch.zeros(2, 3, 8), cache=cache).sum().backward()
    assert second.grad.abs().sum() > 0
    assert first.grad is None


def test_recache_forgets_the_old_prompt():
    network = random_transformer()
    video = torch.randn(2, 12, 16, 2, 3)
    old, new = torch.randn(2, 2, 3, 8).unbind(0)
    caches = []
    for before in (old, new):  # the prompt under which the frames were first read
        cache = new_cache(network)
        for block in video.split(BLOCK, dim=1):
            refresh(network, before, block, cache=cache)
        recache(network, new, video[:, -4:], cache=cache, sink=video[:, :2])
        caches.append(cache)
    assert caches[0].num_frames == 12
    assert set(caches[0].layers[0].positions[0, :, 0].tolist()) == {0, 1, 8, 9, 10, 11}
    for a, b in zip(caches[0].layers, caches[1].layers, strict=True):
        assert torch.equal(a.read()[1], b.read()[1])


def test_bad_settings_are_refused_with_what_to_do():
    network = random_transformer()
    with pytest.raises(ValueError, match="must hold sink and recent frames"):
        new_cache(network, budget=10)
    with pytest.raises(ValueError, match="choose one of"):
        build_policy("salient")
    with pytest.raises(ValueError, match="did you mean 'age_weight'"):
        build_policy("salience", {"age_weigth": 1})
    with pytest.raises(ValueError, match="needs a salience head"):
        make_cache(
            network,
            spec=CacheSpec(36, PLACES, BLOCK),
            policy=build_policy("salience"),
            seeds=torch.arange(2),
        )
    cache = new_cache(network)
    refresh(network, torch.zeros(2, 3, 8), torch.randn(2, BLOCK, 16, 2, 3), cache=cache)
    with pytest.raises(ValueError, match="cannot go back"):
        cache.skip_to(1)
    with pytest.raises(ValueError, match="must be announced"):
        cache.past(0)
    with pytest.raises(ValueError, match="must not be given with one"):
        network(
            torch.randn(2, 2, 16, 2, 3), torch.zeros(2, 2), torch.zeros(2, 3, 8),
            cache=cache, frames=torch.arange(2),
        )  # fmt: skip
    with pytest.raises(ValueError, match="whole blocks"):
        roll(network, cache, 8, prefix=torch.randn(2, 3, 16, 2, 3))
