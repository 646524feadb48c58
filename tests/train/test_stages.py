"""Where gradients flow in the real stages, and what distillation needs to change anything."""

import copy

import pytest
import torch

import train.distill
from configs.errors import ConfigError
from configs.schema import StageConfig
from data.batches import SwitchBatch
from tests.train.small_stages import FRAMES, batch, build
from train import checkpoint
from train.causal import random_visibility
from train.distill import Distill
from train.kinds import DistillParams
from train.restore import restore
from train.streaming import Streaming


def distill(lr: float = 1e-3, **params) -> Distill:
    return build("distill", {"student_every": 1} | params, lr=lr)


def weights_of(module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(module.state_dict())


def changed(module, before) -> bool:
    return any(not torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_in_causal_the_loss_of_a_block_reaches_the_clean_tokens_before_it():
    stage = build("causal", {"evict": False})
    student = stage.engine("student").module
    seen = []
    student.patch_embedding.register_forward_hook(lambda module, args, out: seen.append(out))
    (gradient,) = torch.autograd.grad(stage.loss(batch()), seen[-1])
    clean = gradient[:, :, :FRAMES]  # [B, E, F, h, w]
    assert clean[:, :, : FRAMES - 2].abs().sum() > 0
    assert (clean[:, :, FRAMES - 2 :] == 0).all(), "no noisy block reads the last clean block"


def test_in_rollouts_no_gradient_crosses_a_block():
    stage = distill()
    velocities = []
    stage.engine("student").module.register_forward_hook(
        lambda module, args, out: velocities.append(out) if out.requires_grad else None
    )
    window, mask = stage.rollout(batch(), 0, grad=True)
    assert mask.tolist() == [False] * 4 + [True] * 8
    assert len(velocities) == 4, "one pass with gradient per generated block"
    for number in range(4):
        block = window[:, 4 + 2 * number : 6 + 2 * number].sum()
        found = torch.autograd.grad(block, velocities, retain_graph=True)
        assert [bool(gradient.any()) for gradient in found] == [i == number for i in range(4)]


def test_distillation_moves_student_and_critic_and_nothing_at_rate_zero():
    for lr, moves in ((1e-3, True), (0.0, False)):
        stage = distill(lr=lr)
        before = {name: weights_of(stage.networks[name]) for name in ("student", "critic")}
        teacher = weights_of(stage.frozen["teacher"])
        metrics = stage.update(batch(), 0)
        assert metrics["loss/student"] > 0
        assert metrics["grad_norm/student"] > 0
        for name, state in before.items():
            assert changed(stage.networks[name], state) is moves, name
        assert not changed(stage.frozen["teacher"], teacher)


def test_updates_of_each_network_are_counted():
    stage = build("distill", {"student_every": 2})
    for step in range(3):
        stage.update(batch(first_seed=10 + step), step)
    assert stage.counters == {"updates/student": 2, "updates/critic": 3}


def test_the_student_waits_while_only_the_critic_learns():
    stage = distill()
    stage.params.student_every = 3
    student = weights_of(stage.networks["student"])
    assert "loss/student" not in stage.update(batch(), 1)
    assert not changed(stage.networks["student"], student)


def test_ranks_draw_the_same_choices_from_seed_and_step_without_a_word(monkeypatch):
    """Exit step, prefix and budget; the ranks have other samples and other global generators."""

    def draws(first_seed: int) -> list:
        torch.manual_seed(first_seed)
        stage = distill(prefix_frames=[2, 4, 8], budgets=[30, 36, 60])
        seen = []
        blocks, caches = train.distill.denoise_block, train.distill.make_cache

        def block(*args, grad_step, **rest):
            seen.append(("exit", grad_step))
            return blocks(*args, grad_step=grad_step, **rest)

        def cache(*args, spec, **rest):
            seen.append(("budget", spec.budget_tokens))
            return caches(*args, spec=spec, **rest)

        with monkeypatch.context() as patch:
            patch.setattr(train.distill, "denoise_block", block)
            patch.setattr(train.distill, "make_cache", cache)
            for step in range(8):
                _, judged = stage.rollout(batch(first_seed=first_seed), step, grad=False)
                seen.append(("judged", judged.shape, int(judged.sum())))
        return seen

    one = draws(10)
    assert one == draws(500)
    assert all(len({draw for draw in one if draw[0] == name}) > 1 for name in ("exit", "budget"))


def test_with_clean_context_the_judged_window_keeps_its_prefix():
    window, mask = torch.randn(2, 6, 16, 2, 3), torch.arange(6) >= 4
    seeds = torch.tensor([1, 2])
    for clean_context in (True, False):
        stage = distill(clean_context=clean_context)
        noisy, sigma, _ = stage.noised(window, seeds, mask, "test")
        assert torch.equal(noisy[:, :4], window[:, :4]) is clean_context
        assert (sigma[:, 4:] > 0).all()


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"score_range": [0.1]}, "lowest, highest"),
        ({"score_range": [0.6, 0.2]}, "score_range"),
        ({"prefix_frames": []}, "at least one number"),
        ({"budgets": []}, "at least one number"),
        ({"student_shift": 0.0}, "student_shift must be above 0"),
    ],
)
def test_settings_of_distillation_that_cannot_be_meant_are_refused(params, message):
    config = StageConfig(kind="test", steps=100, batch=2, frames=FRAMES)
    settings = DistillParams(**{"prefix_frames": [4]} | params)
    with pytest.raises(ConfigError, match=message):
        Distill.check(config, settings, key="stages.x", block=2)


def test_a_stream_grows_by_chunks_and_gives_way_to_a_new_one():
    stage = build("streaming")
    lengths = [
        stage.update(batch(first_seed=10 + step), step)["stream_frames"] for step in range(5)
    ]
    assert lengths == [8, 12, 16, 8, 12]
    assert stage.streams[0].cache.num_tokens == 30
    assert stage.streams[0].cache.policy.name == "salience"


def test_a_prompt_switch_rebuilds_the_past_under_the_next_prompt():
    stage = build("streaming", {"switch_chance": 1.0})
    first = batch()
    first = SwitchBatch(**vars(first), next_text=first.text + 1)
    stage.update(first, 0)
    stream = stage.streams[0]
    assert stream.switch_frame in (8, 12)
    while stage.streams and stream.cache.num_frames < stream.switch_frame:
        stage.update(batch(), 1)
    stage.update(batch(), 2)
    assert torch.equal(stream.text, first.next_text)


def test_a_stream_with_a_prompt_switch_is_repeated_bit_for_bit_from_its_snapshot(tmp_path):
    def run(stage: Streaming, first: int) -> None:
        for step in range(first, 5):
            stage.update(batch(first_seed=10 + step), step)
            stage.completed = step + 1

    whole, resumed = (build("streaming", {"switch_chance": 1.0}) for _ in range(2))
    run(whole, 0)  # streams of three chunks: the second chunk of the second one is done
    folder = checkpoint.write(whole.snapshot(), checkpoint.Shelf(tmp_path))
    done = restore(resumed, folder)
    assert done == 3, "a checkpoint within a stream holds the stream's start"
    resumed.completed = done
    run(resumed, done)
    assert not changed(resumed.networks, weights_of(whole.networks))
    assert torch.equal(resumed.streams[0].history, whole.streams[0].history)
    switched = [torch.equal(s.text, s.next_text) for s in (whole.streams[0], resumed.streams[0])]
    assert switched == [True, True], "the prompt changed at frame 8 of 16"


def test_the_head_learns_and_the_student_does_not_move():
    stage = build("salience", {"horizon": 2}, lr=1e-2)
    head = stage.engine("head").module
    before = weights_of(stage.frozen)
    losses = []
    for step in range(30):
        metrics = stage.update(batch(first_seed=10), step)
        stage.completed += 1
        losses += [float(metrics["loss/head"])] if metrics else []
        if step == 1:
            assert (head.std != 1).all(), "statistics are there after the steps that gather them"
    assert len(losses) == 28
    assert losses[-1] < 0.9 * losses[0]
    assert not changed(stage.frozen, before)
    assert {"spearman/later/0", "recall/earlier/1"} <= stage.scores(*stage.predict(batch())).keys()


@pytest.mark.parametrize(("kind", "name"), [("teacher", "teacher"), ("causal", "student")])
def test_accumulated_micro_batches_give_the_gradient_of_the_whole_batch(kind, name):
    norms = []
    for micro_batch in (0, 2):
        stage = build(kind, batch=4, micro_batch=micro_batch)
        norms.append(stage.update(batch(size=4), 0)[f"grad_norm/{name}"])
    # The same mean in another order of summation.
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_a_clean_prefix_is_whole_blocks_and_never_the_whole_video():
    stage = build("teacher", {"clean_prefix": 1.0})
    sigma = stage.sigma(torch.arange(300), FRAMES)
    lengths = (sigma == 0).sum(dim=1)
    assert set(lengths.tolist()) == {0, 2, 4, 6, 8, 10}
    for row, length in zip(sigma, lengths.tolist(), strict=True):
        assert (row[:length] == 0).all()
        assert (row[length:] == row[-1]).all()
    uniform = build("teacher").sigma(torch.arange(5), FRAMES)
    assert (uniform == uniform[:, :1]).all()
    assert (uniform > 0).all()


def test_blocks_with_noise_levels_of_their_own_are_clean_by_half():
    stage = build("teacher", {"block_noise": 1.0})
    sigma = stage.sigma(torch.arange(300), FRAMES)
    blocks = sigma.unflatten(1, (-1, 2))
    assert (blocks[..., 0] == blocks[..., 1]).all()
    assert (blocks[:, -1] > 0).all()  # there is always something to learn
    assert 0.45 < (blocks[:, :-1, 0] == 0).float().mean() < 0.55
    assert sigma[sigma > 0].unique().numel() > 300


def test_shares_of_the_teachers_samples_are_exclusive():
    stage = build("teacher", {"clean_prefix": 0.4, "block_noise": 0.4})
    sigma = stage.sigma(torch.arange(2000), FRAMES)
    levels = torch.tensor([row[row > 0].unique().numel() for row in sigma])
    assert 0.3 < (levels > 1).float().mean() < 0.4  # by block, unless one noisy block is left
    assert (sigma == sigma[:, :1]).all(dim=1).float().mean() > 0.2


def test_random_visibility_protects_the_sink_and_the_newest_blocks():
    visible = random_visibility(
        torch.arange(50), num_tokens=48, block_len=4, sink_tokens=2, max_recent_blocks=3
    )
    assert visible[:, :, :2].all()
    block = torch.arange(48) // 4
    near = (block[:, None] - block[None]).abs() <= 1
    assert visible[:, near].all()
    assert 0.2 < visible[:, 40:44, 4:24].float().mean() < 0.8
