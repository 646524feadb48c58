"""What each policy ranks by, against closed forms and slow references."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.attention import Projected, grid_positions, rotary_angles, rotate
from models.kv_policies import POLICIES, build_policy
from models.kv_policies_merging import positions_of_windows
from models.kv_policy import nearest, pointed_at, standardised
from models.kv_spec import CacheSpec
from models.kv_storage import storage_named
from models.kv_tokens import Entering, Eviction, Tokens
from models.rollout import recache, refresh
from tests.models.rolling import BLOCK, PLACES, head, new_cache, roll
from tests.models.small import random_transformer

GRID = (2, 3)
THETA = 100.0


def projected(num_tokens: int, *, seed: int = 0) -> Projected:
    made = torch.randn(
        5, 2, 2, num_tokens, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return Projected(*made)


def entering(own: Projected, frames: range, **more) -> Entering:
    positions = grid_positions(torch.tensor([*frames]), *GRID).expand(2, -1, -1)
    values = {"match_prompt": lambda: torch.zeros(2, positions.shape[1])}
    values |= {"hidden": torch.randn(2, positions.shape[1], 24), "seeds": torch.tensor([1, 2])}
    return Entering(layer=1, positions=positions, projected=own, **{**values, **more})


def tokens_of(own: Projected, frames: range, features: torch.Tensor) -> Tokens:
    storage = storage_named("model")
    positions = grid_positions(torch.tensor([*frames]), *GRID).expand(2, -1, -1)
    parts = storage.encode(own.keys, own.values, {})
    return Tokens(parts, positions, features, storage, {}, torch.float64)


def eviction_of(tokens: Tokens, *, budget: int, memory=None, num_frames: int = 4) -> Eviction:
    spec = CacheSpec(budget, PLACES, BLOCK)
    frame = tokens.positions[..., 0]
    coming = grid_positions(torch.arange(num_frames, num_frames + BLOCK), *GRID)
    return Eviction(
        tokens=tokens,
        budget=budget,
        age=(num_frames - 1 - frame) // BLOCK,
        protected=(frame < 1) | (frame >= num_frames - BLOCK),
        num_frames=num_frames,
        new_frames=BLOCK,
        grid=GRID,
        spec=spec,
        memory=memory,
        key_angles=lambda: rotary_angles(tokens.positions, 12, THETA),
        query_angles=lambda: rotary_angles(coming, 12, THETA),
    )


def test_every_policy_says_what_it_is_and_where_it_is_from():
    for name, policy in POLICIES.items():
        assert policy.__doc__, name
        first, *rest = policy.__doc__.strip().split("\n\n")
        assert len(first.split()) >= 4, name
        if name not in ("full", "random"):
            text = "\n\n".join([first, *rest])
            assert "arXiv:" in text or "ur own" in text or "Ours" in text, f"{name}: no source"


def test_norm_ranks_large_values_under_small_keys():
    own = projected(24)
    policy = build_policy("norm", {"key_weight": 2.0, "age_weight": 0.0})
    features = policy.enter(entering(own, range(4)))
    scores = policy.rank(eviction_of(tokens_of(own, range(4), features), budget=18))
    raw = [
        sum(
            math.log(own.values[b, n, s].norm()) - 2 * math.log(own.keys[b, n, s].norm())
            for n in range(2)
        )
        for b in range(1)
        for s in range(24)
    ]
    assert torch.equal(scores[0].argsort(), torch.tensor(raw).argsort())
    assert scores.mean(1).abs().max() < 1e-5
    assert (scores.std(1) - 1).abs().max() < 1e-4


def test_prompt_similarity_is_the_cosine_of_cross_attention():
    network = random_transformer()
    block = network.blocks[1]
    x, text = torch.randn(2, 5, 24), torch.randn(2, 3, 24)
    queries, keys, _ = block.cross_attn.project(block.norm3(x), text)
    expected = torch.zeros(2, 5)
    for b in range(2):
        for s in range(5):
            for n in range(2):
                expected[b, s] += max(
                    F.cosine_similarity(queries[b, n, s], keys[b, n, t], dim=0) for t in range(3)
                ).detach()
    torch.testing.assert_close(block.match_prompt(x, text), expected / 2)
    cache = new_cache(network, "prompt_similarity")
    roll(network, cache, 2)
    assert cache.layers[0].features.abs().max() <= 1
    assert cache.layers[0].features.std() > 0


def test_participative_keeps_a_deep_sink_and_what_recent_queries_point_at():
    own, before = projected(24), projected(24, seed=1)
    policy = build_policy("participative", {"sink_share": 0.5, "query_blocks": 2})
    features = policy.enter(entering(before, range(4)))
    held = tokens_of(own, range(4), features)
    renewed = policy.renew(held, lambda: own.rotated_keys, entering(own, range(4)))
    expected = torch.einsum("bnqd,bnsd->bs", own.rotated_queries, own.rotated_keys)
    torch.testing.assert_close(renewed[..., 0].double(), expected / (24 * 2 * math.sqrt(12)))
    torch.testing.assert_close(renewed[..., 1], features[..., 0])
    held.features = renewed
    rank = policy.rank(eviction_of(held, budget=23))
    # Half of 23 tokens are one whole frame of 6; 23 less two protected frames have room for it.
    assert rank[:, :6].isinf().all()
    torch.testing.assert_close(rank[:, 6:], renewed.sum(-1)[:, 6:])
    tight = policy.rank(eviction_of(held, budget=17))
    assert not tight.isinf().any(), "the newest frames come before the deep sink"


def test_future_query_expects_what_sampled_queries_read():
    torch.manual_seed(0)
    own = projected(24)
    own.queries.mul_(torch.rand(12, dtype=torch.float64).repeat_interleave(1)).add_(0.5)
    # Pairs of channels vary alike, as the policy assumes.
    pairs = own.queries.unflatten(-1, (-1, 2))
    mean, spread = pairs.mean(2, keepdim=True), torch.rand(2, 2, 1, 6, 1, dtype=torch.float64)
    sampled = mean + spread * torch.randn(2, 2, 20_000, 6, 2, dtype=torch.float64)
    policy = build_policy("future_query", {"age_weight": 0.0})
    memory = None
    for part in sampled.flatten(3).split(5000, dim=2):
        past = Projected(part, part, part, part, part)
        memory = policy.remember(memory, entering(past, range(4)))
    held = tokens_of(own, range(4), torch.zeros(2, 24, 0))
    eviction = eviction_of(held, budget=18, memory=memory)
    found = policy.rank(eviction).double()
    keys = rotate(own.keys.float(), eviction.key_angles()).double()
    turn = eviction.query_angles().mean(0)
    mean_now = torch.view_as_real(
        torch.view_as_complex(mean.squeeze(2).float().contiguous()) * turn
    ).double()
    noise = spread * torch.randn(2, 2, 20_000, 6, 2, dtype=torch.float64)
    queries = (mean_now[:, :, None] + noise).flatten(3)
    weights = (queries @ keys.transpose(-1, -2) / math.sqrt(12)).exp().mean(2)
    weights = weights / weights.sum(-1, keepdim=True)
    expected = standardised((weights * own.values.norm(dim=-1)).mean(1))
    # 20,000 draws of an exponential: a few per cent.
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)


def test_key_merge_merges_the_most_similar_into_the_newer_and_counts():
    own = projected(24)
    own.keys[:, :, 7] = own.keys[:, :, 20]  # a copy in a later frame
    own.keys[:, :, 8] = own.keys[:, :, 7] * 1.5  # parallel to both, and older than 20
    policy = build_policy("key_merge")
    held = tokens_of(own, range(4), policy.enter(entering(own, range(4))))
    kept, gone = policy.evict(eviction_of(held, budget=22))
    assert gone.shape == (2, 0)
    assert kept.count == 22
    slots = (kept.positions * torch.tensor([6, 3, 1])).sum(-1)
    assert slots[0].tolist() == [s for s in range(24) if s not in (7, 8)]
    merged = slots[0].tolist().index(20)
    assert kept.features[:, merged, 0].tolist() == [3.0, 3.0]
    keys, values = kept.read()
    torch.testing.assert_close(keys[:, :, merged], own.keys[:, :, [7, 8, 20]].mean(2))
    torch.testing.assert_close(values[:, :, merged], own.values[:, :, [7, 8, 20]].mean(2))
    others = [s for s in range(22) if s != merged]
    torch.testing.assert_close(
        values[:, :, others], own.values[:, :, slots[0][others]], rtol=1e-6, atol=1e-6
    )
    assert kept.features[:, others].eq(1).all()
    torch.testing.assert_close(policy.logit_bias(kept)[:, merged], torch.full((2,), math.log(3)))


def test_merged_tokens_that_are_merged_again_carry_all_they_stand_for():
    network = random_transformer()
    cache = new_cache(network, "key_merge")
    roll(network, cache, 20)
    for layer in cache.layers:
        assert layer.features.sum(1).flatten().tolist() == [20 * PLACES] * 2


def test_compressed_mid_pools_frames_that_leave_and_keeps_the_best():
    network = random_transformer()
    cache = new_cache(network, "compressed_mid", budget=34, params={"pool": [2, 2]})
    raw, found = [], []
    for number in range(4):
        block = torch.randn(2, BLOCK, 16, 2, 3, generator=torch.Generator().manual_seed(number))
        refresh(network, torch.zeros(2, 3, 8), block, cache=cache)
        keys, _ = cache.layers[0].read()
        raw.append(keys[:, :, -12:])
        found.append(cache.layers[0].positions[0].tolist())
    # A frame of 2 x 3 tokens becomes windows of columns 0-1 and 2, centres (0, 0) and (0, 2).
    assert found[1][:8] == [[0, r, c] for r in (0, 1) for c in (0, 1, 2)] + [[1, 0, 0], [1, 0, 2]]
    assert len(found[3]) == 6 + 2 * 5 + 12
    keys, _ = cache.layers[0].read()
    frame = raw[0][:, :, 6:].unflatten(2, (2, 3))
    pooled = torch.stack([frame[..., :2, :].mean((2, 3)), frame[..., 2:, :].mean((2, 3))], 2)
    torch.testing.assert_close(keys[:, :, 6:8], pooled)
    for number in range(4, 9):
        block = torch.randn(2, BLOCK, 16, 2, 3, generator=torch.Generator().manual_seed(number))
        refresh(network, torch.zeros(2, 3, 8), block, cache=cache)
    assert cache.num_tokens == 34
    middle = cache.layers[0].positions[0, 6:22, 0]
    assert middle.unique().numel() < 16, "not simply the newest"


@pytest.mark.parametrize("change", ["recache", "flush", "short"])
def test_compressed_mid_pools_no_frame_twice_after(change):
    network = random_transformer()
    cache = new_cache(network, "compressed_mid", budget=60, recent_frames=4)
    roll(network, cache, 12)
    text, video = torch.zeros(2, 3, 8), torch.randn(2, 6, 16, 2, 3)
    if change == "recache":
        recache(network, text, video, cache=cache, sink=video[:, :2])
    elif change == "flush":
        cache.flush(2)
    else:
        refresh(network, text, video[:, :1], cache=cache)
    roll(network, cache, 8)
    for layer in cache.layers:
        frames = layer.positions[0, :, 0]
        counts = {int(f): int((frames == f).sum()) for f in frames.unique()}
        newest = cache.num_frames - 4
        whole = {f for f, count in counts.items() if count == PLACES}
        assert whole == {0, *range(newest, newest + 4)}
        assert all(count <= 2 for f, count in counts.items() if f not in whole)


def test_ranks_keep_all_digits_under_autocast():
    own, near = projected(24), projected(24)
    near.keys.add_(1e-3 * projected(24, seed=5).keys)
    # In bfloat16 a cosine of 1 - 1e-6 is 1.
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cosine, index = nearest(own.keys.float(), near.keys.float())
        pointed = pointed_at(own.queries.float(), own.keys.float())
    assert cosine.dtype == pointed.dtype == torch.float32
    assert cosine.unique().numel() > 10
    assert torch.equal(index, torch.arange(24).expand(2, -1))
    torch.testing.assert_close(pointed, pointed_at(own.queries.float(), own.keys.float()))


def test_redundancy_works_for_policies_without_features_of_their_own():
    network = random_transformer()
    cache = new_cache(network, "future_query", params={"redundancy_weight": 1.0})
    assert roll(network, cache, 12).isfinite().all()
    assert cache.layers[0].features.shape[-1] == 1


def test_observed_mass_does_not_depend_on_the_number_of_passes():
    network, text = random_transformer(), torch.zeros(2, 3, 8)
    mass = {}
    for passes in (0, 3):
        cache = new_cache(network, "attention_mass", budget=1000)
        for seed in range(2):
            block = torch.randn(2, BLOCK, 16, 2, 3, generator=torch.Generator().manual_seed(seed))
            for _ in range(passes):  # the same pass again reads the same
                network(block, torch.zeros(2, BLOCK), text, cache=cache)
            refresh(network, text, block, cache=cache)
        mass[passes] = cache.layers[0].features[:, :12]
    torch.testing.assert_close(mass[0], mass[3])


def test_windows_at_the_edge_have_their_own_centre():
    positions = grid_positions(torch.tensor([7]), 3, 5)[None]
    centres = positions_of_windows(positions, (3, 5), (2, 2))[0].tolist()
    assert centres == [[7, r, c] for r in (0, 2) for c in (0, 2, 4)]


def test_oracle_ranks_by_the_true_targets_of_each_token():
    network, targets = random_transformer(), head()
    cache = new_cache(network, "oracle", params={"age_weight": 0.0})
    roll(network, cache, 6)
    for number, layer in enumerate(cache.layers):
        slots = (layer.positions * torch.tensor([6, 3, 1])).sum(-1)
        true = targets.standardise(number, cache.targets[number])
        for sample in range(2):
            expected = true[sample, slots[sample]].nan_to_num(0.0)
            torch.testing.assert_close(layer.features[sample], expected)
            free = (slots[sample] >= 6) & (slots[sample] < 24)
            every = true[sample, 6:24, 0].nan_to_num(0.0)
            worst_kept = expected[free, 0].min()
            assert (every > worst_kept).sum() < free.sum()


def test_redundancy_is_the_largest_cosine_with_a_newer_key_and_is_charged():
    own, newer = projected(24), projected(12, seed=3)
    newer.keys[0, :, 4] = 3 * own.keys[0, :, 9]
    policy = build_policy("norm", {"redundancy_weight": 2.0, "age_weight": 0.0})
    plain = build_policy("norm", {"age_weight": 0.0})
    features = policy.enter(entering(own, range(4)))
    assert features[..., -1].eq(-1).all()
    held = tokens_of(own, range(4), features)
    held.features = policy.renew(held, lambda: own.rotated_keys, entering(newer, range(4, 6)))
    flat, others = (k.keys.transpose(1, 2).flatten(2) for k in (own, newer))
    for sample in range(2):
        cosine = F.cosine_similarity(flat[sample][:, None], others[sample][None], dim=-1)
        torch.testing.assert_close(held.features[sample, :, -1].double(), cosine.amax(1))
    assert held.features[0, 9, -1] == pytest.approx(1.0, abs=1e-5)
    charged = policy.rank(eviction_of(held, budget=18))
    redundancy = held.features[..., -1]
    held.features = held.features[..., :-1]
    free = plain.rank(eviction_of(held, budget=18))
    torch.testing.assert_close(charged, free - 2 * redundancy)


def test_nearest_and_pointed_at_do_not_depend_on_the_tile():
    own = projected(24)
    frames = grid_positions(torch.arange(4), *GRID)[:, 0].expand(2, -1)
    whole = nearest(own.keys, own.keys, frames=frames)
    tiled = nearest(own.keys, own.keys, frames=frames, max_tile_values=100)
    assert torch.equal(whole[1], tiled[1])
    assert whole[0][:, -6:].isinf().all(), "the newest frame has nothing newer"
    assert (frames.gather(1, whole[1])[:, :-6] > frames[:, :-6]).all()
    expected = torch.einsum("bnqd,bnsd->bs", own.queries, own.keys) / (24 * 2 * math.sqrt(12))
    torch.testing.assert_close(pointed_at(own.queries, own.keys).double(), expected)


def test_parameters_of_the_wrong_kind_are_refused():
    with pytest.raises(ValueError, match="redraw of policy 'random' must be true or false"):
        build_policy("random", {"redraw": 1})
    with pytest.raises(ValueError, match="pool of policy 'compressed_mid' must be 2 numbers"):
        build_policy("compressed_mid", {"pool": [2]})
    with pytest.raises(ValueError, match="weights of policy 'oracle' must be 3 numbers"):
        build_policy("oracle", {"weights": [1, 2, "x"]})
    with pytest.raises(ValueError, match="age_weight of policy 'norm' must be a number"):
        build_policy("norm", {"age_weight": True})
    assert build_policy("salience", {"weights": [1, 1, 1]}).weights == (1.0, 1.0, 1.0)
    cache = new_cache(random_transformer(), "oracle")
    with pytest.raises(ValueError, match="needs the teacher's targets"):
        type(cache)(
            num_layers=2, head_dim=12, rope_theta=100.0, spec=cache.spec, policy=cache.policy,
            seeds=cache.seeds, head=head(),
        )  # fmt: skip
