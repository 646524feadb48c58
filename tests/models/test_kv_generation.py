"""The cache in memory that is taken once, in fewer bits, in two places, and cut or flushed."""

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from models.kv_memory import Attending, Past
from models.kv_policies import POLICIES
from models.kv_storage import storage_named
from models.kv_tokens import Tokens
from models.rollout import denoise_block, refresh
from tests.models.rolling import BLOCK, PLACES, SAMPLER, TypedNoise, new_cache, roll
from tests.models.small import random_transformer

STORAGES = {
    "plain": {},
    "int8": {"precision": "int8"},
    "int4": {"precision": "int4"},
    "low": {"evicted": "low", "evicted_tokens": 18},
    "offload": {"evicted": "offload", "evicted_tokens": 18},
}
TEXT = torch.zeros(2, 3, 8)


def block(seed: int) -> torch.Tensor:
    return torch.randn(2, BLOCK, 16, 2, 3, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("policy", POLICIES)
def test_memory_taken_once_gives_the_same_video_and_never_moves(policy):
    network = random_transformer().double()
    growing = new_cache(network, policy)
    fixed = new_cache(network, policy, preallocate=True, max_frames=24)
    places = []
    for _ in range(2):  # the second call continues
        # Attention sums in another order where keys lie apart in memory.
        expected, found = roll(network, growing, 12), roll(network, fixed, 12)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        places.append([layer.parts["keys"].data_ptr() for layer in fixed.layers])
    assert places[0] == places[1]
    for one, two in zip(growing.layers, fixed.layers, strict=True):
        assert torch.equal(one.positions, two.positions)
        torch.testing.assert_close(one.features, two.features, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_storage_gives_the_same_in_memory_taken_once(storage):
    network = random_transformer().double()
    growing = new_cache(network, **STORAGES[storage])
    fixed = new_cache(network, preallocate=True, **STORAGES[storage])
    expected, found = roll(network, growing, 16), roll(network, fixed, 16)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert growing.num_bytes == fixed.num_bytes


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_on_the_host_waits_for_a_value_on_the_device(policy):
    # Fake tensors have no values: reading one on the host raises.
    noise = TypedNoise(torch.tensor([1, 2]), torch.float32)
    with FakeTensorMode(), torch.no_grad():
        network = random_transformer()
        cache = new_cache(network, policy, preallocate=True, max_frames=16)
        for _ in range(6):
            text = torch.zeros(2, 3, 8)
            made = denoise_block(
                network, text, cache=cache, noise=noise, shape=(BLOCK, 16, 2, 3), sampler=SAMPLER
            )
            refresh(network, text, made, cache=cache)
        with pytest.raises(DataDependentOutputException):
            cache.layers[0].features.sum().item()
    assert cache.num_frames == 12


def test_a_preallocated_cache_refuses_gradients_and_videos_that_are_too_long():
    network = random_transformer()
    cache = new_cache(network, preallocate=True)
    refresh(network, TEXT, block(0), cache=cache)
    with pytest.raises(ValueError, match="must be read without gradients"):
        network(block(1), torch.zeros(2, BLOCK), TEXT, cache=cache)
    with pytest.raises(ValueError, match="set max_frames"):
        new_cache(network, "full", preallocate=True)
    short = new_cache(network, "full", preallocate=True, max_frames=4)
    with pytest.raises(ValueError, match="must hold the video"):
        roll(network, short, 6)


@pytest.mark.parametrize("precision", ["model", "int8", "int4"])
def test_bytes_are_those_of_the_tokens_as_they_are_stored(precision):
    network = random_transformer()
    cache = new_cache(network, precision=precision)
    roll(network, cache, 16)
    per_token = storage_named(precision).token_bytes(2, 12, torch.float32)
    assert cache.num_bytes == 2 * 2 * 36 * per_token  # layers, samples, tokens
    assert cache.host_bytes == 0


def test_fewer_bits_change_the_video_little():
    network = random_transformer()
    exact = roll(network, new_cache(network, "sink_window"), 8)
    distance = {
        precision: (
            roll(network, new_cache(network, "sink_window", precision=precision), 8) - exact
        )
        .norm()
        .item()
        for precision in ("int8", "int4")
    }
    # A step of 4 bits is 17 times one of 8 bits; both leave the first block, which reads nothing.
    assert 0 < distance["int8"] < distance["int4"] / 4
    assert distance["int8"] < 0.02 * exact.norm().item()


def test_all_tokens_fetched_from_the_host_are_the_unbounded_cache():
    network = random_transformer().double()
    everything = roll(network, new_cache(network, "full"), 16)
    for policy in ("sink_window", "random"):
        cache = new_cache(network, policy, evicted="offload", evicted_tokens=1000)
        # Only the order of summation differs, in float64.
        torch.testing.assert_close(roll(network, cache, 16), everything, rtol=1e-6, atol=1e-6)
        assert cache.host_bytes == 2 * 2 * (16 * PLACES - 36) * 2 * 2 * 12 * 8


def test_the_host_gives_back_what_the_last_queries_point_at():
    network = random_transformer()
    cache = new_cache(network, "fifo", evicted="offload", evicted_tokens=5)
    roll(network, cache, 12)
    layer = cache._layers[0]
    host, query = layer.host.tokens, layer._mean_query
    similar = (host.read()[0] * query[:, :, None]).sum(-1).mean(1)
    cache.begin(BLOCK)
    fetched = layer._fetched
    for sample in range(2):
        best = similar[sample].topk(5).indices.sort().values
        assert torch.equal(fetched.positions[sample], host.positions[sample, best])
    assert cache.num_bytes == 2 * 2 * (36 + 5) * 2 * 2 * 12 * 4  # fetched ones where they live


def test_evicted_tokens_in_four_bits_are_read_and_bounded():
    network = random_transformer()
    roomy = new_cache(network, "sink_window", evicted="low", evicted_tokens=1000)
    everything = roll(network, new_cache(network, "full"), 12)
    nothing = roll(network, new_cache(network, "sink_window"), 12)
    kept = roll(network, roomy, 12)
    assert (kept - everything).norm() < 0.5 * (nothing - everything).norm()
    tight = new_cache(network, "sink_window", evicted="low", evicted_tokens=10)
    roll(network, tight, 20)
    low = storage_named("int4").token_bytes(2, 12, torch.float32)
    assert tight.num_bytes == 2 * 2 * (36 * 2 * 2 * 12 * 4 + 10 * low)
    frames = tight._layers[0].low.tokens.positions[0, :, 0]
    assert frames.tolist() == [13] * 4 + [14] * 6, "the newest of the evicted ones"


def test_observed_attention_reaches_tokens_in_four_bits():
    network = random_transformer()
    cache = new_cache(network, "attention_mass", evicted="low", evicted_tokens=12)
    roll(network, cache, 12)
    before = cache._layers[0].low.tokens.features.clone()
    positions = cache._layers[0].low.tokens.positions.clone()
    roll(network, cache, 2)
    low = cache._layers[0].low.tokens
    same = (low.positions[:, :, None] == positions[:, None]).all(-1)  # [B, now, before]
    stayed = same.any(2)
    assert stayed.any()
    grown = low.features[..., 0] - (same.float() @ before)[..., 0]
    assert (grown[stayed] > 0).all()


def test_layers_may_have_budgets_of_their_own():
    network = random_transformer()
    cache = new_cache(network, "random", layer_budgets=(30, 54))
    roll(network, cache, 20)
    assert [layer.count for layer in cache.layers] == [30, 54]
    with pytest.raises(ValueError, match="one budget per layer, 2, got 3"):
        new_cache(network, layer_budgets=(30, 30, 30))
    with pytest.raises(ValueError, match="must hold sink and recent frames"):
        new_cache(network, layer_budgets=(12, 60))


def test_a_flush_leaves_sink_and_newest_frames():
    network = random_transformer()
    for preallocate in (False, True):
        cache = new_cache(network, "random", preallocate=preallocate)
        roll(network, cache, 20)
        cache.flush(1)
        for layer in cache.layers:
            assert set(layer.positions[0, :, 0].tolist()) == {0, 19}
            assert layer.count == 2 * PLACES
        assert roll(network, cache, 6).isfinite().all()
        assert cache.num_tokens == 36
    with pytest.raises(ValueError, match="at most the 2 newest frames"):
        cache.flush(3)


def test_a_cut_shows_one_block_later_and_only_that():
    network = random_transformer()
    cache = new_cache(network, time="relative", max_lag=11)
    roll(network, cache, 8)
    cache.cut(30)
    cache.begin(BLOCK)
    own, shown = cache.positions((1, 1))
    assert own[:, 0].tolist() == [8, 9]
    assert shown[:, 0].tolist() == [38, 39]
    assert cache.clock.shown(torch.tensor([7])).tolist() == [7], "the past stands where it stood"
    refresh(network, TEXT, block(1), cache=cache)
    cache.begin(BLOCK)
    assert cache.positions((1, 1))[1][:, 0].tolist() == [10, 11]
    plain = new_cache(network, time="relative", max_lag=11)
    roll(network, plain, 8)
    cut = new_cache(network, time="relative", max_lag=11)
    roll(network, cut, 8)
    cut.cut(30)
    assert not torch.allclose(roll(network, cut, 2), roll(network, plain, 2))


@pytest.mark.parametrize("policy", ["salience", "attention_mass", "key_merge"])
def test_recomputed_activations_give_the_same_gradients_with_the_cache_in_the_loop(policy):
    gradients = {}
    for recomputes in (False, True):
        network = random_transformer().double()
        network.recomputes_activations = recomputes
        cache = new_cache(network, policy)
        text, noise = TEXT.double(), TypedNoise(cache.seeds, torch.float64)
        blocks = []
        for _ in range(6):  # evicts from the third block on
            made = denoise_block(
                network, text, cache=cache, noise=noise, shape=(BLOCK, 16, 2, 3), sampler=SAMPLER,
                grad_step=1,
            )  # fmt: skip
            refresh(network, text, made, cache=cache)
            blocks.append(made)
        torch.cat(blocks, 1).square().mean().backward()
        gradients[recomputes] = [parameter.grad for parameter in network.parameters()]
        gradients[recomputes].append(cache.layers[0].features)
    for plain, again in zip(gradients[False], gradients[True], strict=True):
        torch.testing.assert_close(plain, again, rtol=1e-9, atol=1e-12)


def test_ispa_drops_the_past_of_local_layers_and_absorbs_it():
    network = random_transformer()
    spec = {"local_layers": (1,), "warmup_blocks": 4, "layer_budgets": (1000, 24)}
    errors = {}
    everything = new_cache(network, "full")
    blocks = roll(network, everything, 8).split(BLOCK, dim=1)
    for ridge in (1e-3, 1e6):  # so large a ridge leaves the local output as it is
        cache = new_cache(network, "full", ridge=ridge, **spec)
        for made in blocks:
            refresh(network, torch.zeros(2, 3, 8), made, cache=cache)
        assert [layer.count for layer in cache.layers] == [8 * PLACES, 24]
        assert cache.num_bytes == 2 * (2 * 2 * 12 * 4 * (48 + 24)) + 2 * 24 * 24 * 4
        full = new_cache(network, "full")
        for made in blocks:
            refresh(network, torch.zeros(2, 3, 8), made, cache=full)
        next_block = block(3)
        with torch.no_grad():
            outputs = [
                network(next_block, torch.zeros(2, BLOCK), TEXT, cache=c) for c in (cache, full)
            ]
        errors[ridge] = (outputs[0] - outputs[1]).norm().item()
    assert errors[1e-3] < errors[1e6]
    with pytest.raises(ValueError, match="at least two blocks"):
        new_cache(network, local_layers=(0,), warmup_blocks=1)
    with pytest.raises(ValueError, match="local_layers must be below 2"):
        new_cache(network, local_layers=(2,), warmup_blocks=2)


def test_merging_exact_copies_at_one_place_leaves_attention_as_it_was():
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 3, 4, dtype=torch.float64).unbind(0)
    copies = torch.tensor([0, 1, 1, 1, 2, 0])
    query, own = torch.randn(2, 1, 2, 2, 4, dtype=torch.float64).unbind(0)
    whole = Past(keys[:, :, copies], values[:, :, copies], None, Attending())
    bias = torch.tensor([[2.0, 3.0, 1.0]], dtype=torch.float64).log()
    merged = Past(keys, values, bias, Attending())
    torch.testing.assert_close(
        merged.attend(query, own, own), whole.attend(query, own, own), rtol=1e-12, atol=1e-12
    )


def test_tokens_in_another_storage_keep_their_places():
    keys, values = torch.randn(2, 2, 2, 5, 4).unbind(0)
    plain, low = storage_named("model"), storage_named("int4")
    tokens = Tokens(
        plain.encode(keys, values, {}), torch.zeros(2, 5, 3, dtype=torch.int64),
        torch.rand(2, 5, 1), plain, {}, torch.float32,
    )  # fmt: skip
    moved = tokens.stored_as(low, low.calibrate(keys, values))
    assert moved.num_bytes == 2 * 5 * low.token_bytes(2, 4, torch.float32)
    assert F.cosine_similarity(moved.read()[1], values, dim=-1).min() > 0.9
    assert torch.equal(moved.features, tokens.features)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("preallocate", [False, True])
def test_a_cleared_cache_is_measured_anew(precision, preallocate):
    network = random_transformer()
    cache = new_cache(network, precision=precision, preallocate=preallocate)
    refresh(network, TEXT, 40 * block(0), cache=cache)
    cache.clear()
    fresh = new_cache(network, precision=precision, preallocate=preallocate)
    for some in (cache, fresh):
        refresh(network, TEXT, block(1), cache=some)
    for one, two in zip(cache.layers, fresh.layers, strict=True):
        assert torch.equal(one.read()[0], two.read()[0])
        assert torch.equal(one.read()[1], two.read()[1])


def test_ispa_counts_the_blocks_it_has_seen_not_the_frames_of_the_video():
    network = random_transformer()
    spec = {"local_layers": (1,), "warmup_blocks": 3, "layer_budgets": (1000, 24)}
    cache = new_cache(network, "full", **spec)
    refresh(network, TEXT, block(0), cache=cache)
    cache.skip_to(20)
    refresh(network, TEXT, block(1), cache=cache)
    assert cache.layers[1].count == 24, "still warming up"
    assert cache.num_bytes == 2 * 2 * 2 * 2 * 12 * 4 * 24
    refresh(network, TEXT, block(2), cache=cache)
    assert cache.num_bytes == 2 * 2 * 2 * 12 * 4 * (36 + 24) + 2 * 24 * 24 * 4
    cache.flush(2)
    assert cache.num_bytes == 2 * 2 * 2 * 2 * 12 * 4 * 18, "nothing is left of the old scene"


def test_ispa_may_warm_up_while_activations_are_recomputed():
    network = random_transformer()
    network.recomputes_activations = True
    spec = {"local_layers": (0,), "warmup_blocks": 3, "layer_budgets": (24, 1000)}
    cache = new_cache(network, "full", **spec)
    for number in range(2):
        refresh(network, TEXT, block(number), cache=cache)
    network(block(2), torch.ones(2, BLOCK), TEXT, cache=cache).square().mean().backward()
    assert cache._layers[0]._gap.num_queries == 2 * BLOCK * PLACES  # one refresh, one pass


def test_contradictory_settings_are_refused():
    network = random_transformer()
    for spec, message in (
        ({"policy": "full", "evicted": "low", "evicted_tokens": 4}, "evicts nothing"),
        ({"evicted": "offload", "evicted_tokens": -5}, "evicted_tokens must say"),
        (
            {"local_layers": (0,), "warmup_blocks": 2, "layer_budgets": (6, 99), "policy": "full"},
            "a local layer must hold sink and recent frames",
        ),
        ({"policy": "participative", "params": {"query_blocks": 0}}, "query_blocks at least 1"),
        ({"policy": "participative", "params": {"query_blocks": 1.5}}, "must be a whole number"),
        ({"policy": "compressed_mid", "params": {"pool": [0, 2]}}, "at least 1 x 1"),
        ({"policy": "norm", "params": {"age_weight": float("nan")}}, "must be a number"),
        ({"policy": "attention_mass", "params": {"decay": -1}}, r"must be in \[0, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            new_cache(network, **spec)
    with pytest.raises(ValueError, match="`write` needs one"):
        network(block(0), torch.zeros(2, BLOCK), TEXT, write=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_denoising_pass_can_be_captured_and_replayed_for_later_blocks():
    network = random_transformer().cuda()
    cache = new_cache(network, "salience", preallocate=True)
    cache.seeds, text = cache.seeds.cuda(), TEXT.cuda()
    cache.head.cuda()
    with torch.no_grad():
        for number in range(6):
            refresh(network, text, block(number).cuda(), cache=cache)
        latents, sigma = block(9).cuda(), torch.ones(2, BLOCK, device="cuda")
        cache.begin(BLOCK)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            network(latents, sigma, text, cache=cache)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            replayed = network(latents, sigma, text, cache=cache)
        for number in range(10, 13):
            refresh(network, text, block(number).cuda(), cache=cache)
            cache.begin(BLOCK)
            latents.copy_(block(20 + number).cuda())
            expected = network(latents, sigma, text, cache=cache)
            graph.replay()
            torch.testing.assert_close(replayed, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_makes_no_synchronisation(policy):
    network = random_transformer().cuda()
    cache = new_cache(network, policy, preallocate=True, max_frames=30)
    cache.seeds, text = cache.seeds.cuda(), TEXT.cuda()
    cache.head.cuda()
    cache.targets = cache.targets.cuda()
    noise = TypedNoise(cache.seeds, torch.float32)
    sigma_free = {"cache": cache, "noise": noise, "shape": (BLOCK, 16, 2, 3), "sampler": SAMPLER}
    with torch.no_grad():
        for number in range(6):
            if number == 4:
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            try:
                made = denoise_block(network, text, **sigma_free)
                refresh(network, text, made, cache=cache)
            finally:
                torch.cuda.set_sync_debug_mode("default")
