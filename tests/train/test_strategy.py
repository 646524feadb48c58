import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tests.train.toy import final_weights, toy_batch, toy_config, toy_network, toy_stage, train
from train.engine import NonFiniteGradientError, SingleEngine

STEPS = 6
CASES = {
    "zero2": ("--zero_stage", 2, "--clip", 0),
    "zero2_clip": ("--zero_stage", 2, "--clip", 0.2),
    "zero2_accumulate": ("--zero_stage", 2, "--clip", 0, "--accumulate", 2),
    "zero1_clip": ("--zero_stage", 1, "--clip", 0.2),
    "zero0_clip": ("--zero_stage", 0, "--clip", 0.2),
}


class PlainAdamW:
    """The toy stage written out: two AdamWs, and gradients averaged over two ranks."""

    def __init__(self, *, clip: float, accumulate: int):
        self.clip, self.accumulate, self.world = clip, accumulate, 2
        self.stage = toy_stage(toy_config(steps=STEPS, accumulate=accumulate))
        self.student, self.critic, self.teacher = toy_network(1), toy_network(2), toy_network(3)
        self.average = [p.detach().clone() for p in self.student.parameters()]
        self.optimizers = {
            "student": self.adamw(self.student, lr=1e-2),
            "critic": self.adamw(self.critic, lr=3e-2),
        }

    def adamw(self, network, *, lr):
        return torch.optim.AdamW(
            network.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, foreach=False
        )

    def step(self, name, network, loss_of, number):
        network.zero_grad()
        size = 4 * self.accumulate
        parts = [
            part
            for rank in range(self.world)
            for part in self.stage.micro_batches(
                toy_batch(number, size=size, rank=rank, world=self.world)
            )
        ]
        for part in parts:
            (loss_of(part) / len(parts)).backward()
        if self.clip:
            torch.nn.utils.clip_grad_norm_(network.parameters(), self.clip)
        self.optimizers[name].param_groups[0]["lr"] = self.stage.lr(name, number)
        self.optimizers[name].step()

    def student_loss(self, part):
        x = self.student(part.latents)
        with torch.no_grad():
            target = x - (self.critic(x) - self.teacher(x))
        return F.mse_loss(x, target)

    def critic_loss(self, part):
        noise = part.latents.flip(0)
        return F.mse_loss(self.critic(self.student(part.latents).detach() + 0.1 * noise), noise)

    def run(self):
        for number in range(STEPS):
            if number % 2 == 0:
                self.step("student", self.student, self.student_loss, number)
                for mean, own in zip(self.average, self.student.parameters(), strict=True):
                    mean.lerp_(own.detach(), 1 - 0.9)
            self.step("critic", self.critic, self.critic_loss, number)
        names = [name for name, _ in self.student.named_parameters()]
        return (
            {f"student.{key}": value for key, value in self.student.state_dict().items()}
            | {f"critic.{key}": value for key, value in self.critic.state_dict().items()}
            | {f"average.{key}": value for key, value in zip(names, self.average, strict=True)}
        )


@pytest.fixture(scope="module")
def two_ranks(run_toy, tmp_path_factory):
    """Every case, and one that is interrupted and continued, by the same two processes."""
    folder = tmp_path_factory.mktemp("ranks")
    common = ("--strategy", "deepspeed", "--devices", 2, "--steps", STEPS)
    words = []
    for name, case in CASES.items():
        words += [folder / name, *common, *case, "--no_noise", "--then"]
    words += [folder / "whole", *common, "--then"]
    words += [folder / "resumed", *common, "--event", "term:2", "--then"]
    words += [folder / "resumed", *common, "--then"]
    words += [folder / "bf16", *common, "--precision", "bf16", "--no_noise"]
    assert run_toy(*words, ranks=2) == [0, 0]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_deepspeed_ranks_take_the_steps_of_plain_adamw(two_ranks, name):
    options = dict(zip(CASES[name][::2], CASES[name][1::2], strict=True))
    reference = PlainAdamW(clip=options["--clip"], accumulate=options.get("--accumulate", 1)).run()
    found = load_file(two_ranks / name / "final.safetensors")
    # The norm is summed in another order, and so are more than two gradients; nothing else differs.
    exact = name == "zero2"
    for key, value in reference.items():
        torch.testing.assert_close(
            found[key], value, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6
        )


def test_deepspeed_continues_bit_for_bit_after_sigterm_on_one_rank(two_ranks):
    assert int((two_ranks / "resumed" / "interrupted").read_text()) == 3
    whole = load_file(two_ranks / "whole" / "final.safetensors")
    resumed = load_file(two_ranks / "resumed" / "final.safetensors")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_bfloat16_autocast_keeps_float32_weights_near_the_exact_ones(two_ranks):
    exact = load_file(two_ranks / "zero2_clip" / "final.safetensors")
    found = load_file(two_ranks / "bf16" / "final.safetensors")
    for key, value in exact.items():
        assert found[key].dtype == torch.float32
        # Six steps of at most the learning rate 0.03, of which rounding can turn a few around.
        torch.testing.assert_close(found[key], value, rtol=0, atol=0.1)
    assert any(not torch.equal(found[key], exact[key]) for key in exact)


def test_metrics_of_two_ranks_are_their_mean(two_ranks):
    rows = [json.loads(line) for line in (two_ranks / "zero2" / "metrics.jsonl").open()]
    assert [row["step"] for row in rows] == [3, 6]
    assert rows[0]["loss/critic"] > 0


def test_single_engine_equals_plain_adamw_on_the_same_samples(tmp_path):
    config = toy_config(steps=STEPS, clip=0.2, accumulate=2)
    stage = toy_stage(config)
    stage.uses_global_noise = False
    train(tmp_path, config, stage)
    reference = PlainAdamW(clip=0.2, accumulate=2)
    reference.world = 1
    found = final_weights(stage)
    for key, value in reference.run().items():
        # One division of the loss in place of two.
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)


def test_average_of_weights_is_an_error_where_none_is_kept():
    engine = SingleEngine(
        "critic", toy_network(1), toy_config(ema=0.0).stages["toy"].optimizers["critic"]
    )
    with pytest.raises(ValueError, match=r"optimizers\.critic\.ema must be above 0"):
        engine.weights(ema=True)


def test_asking_for_the_average_leaves_the_weights_alone():
    engine = SingleEngine(
        "student", toy_network(1), toy_config().stages["toy"].optimizers["student"]
    )
    engine.backward(engine(torch.ones(2, 6)).sum())
    engine.step(0.5)
    before = engine.weights()
    average = engine.weights(ema=True)
    assert all(torch.equal(before[key], value) for key, value in engine.weights().items())
    start = toy_network(1).state_dict()
    for key, value in average.items():
        torch.testing.assert_close(value, start[key].lerp(before[key], 0.1))


def test_gradient_that_is_not_finite_stops_before_the_update():
    engine = SingleEngine(
        "student", toy_network(1), toy_config().stages["toy"].optimizers["student"]
    )
    before = engine.weights()
    engine.backward(engine(torch.full((2, 6), float("inf"))).sum())
    with pytest.raises(NonFiniteGradientError, match="gradient of 'student' must be finite"):
        engine.step(0.5)
    assert all(torch.equal(before[key], value) for key, value in engine.weights().items())


def test_network_without_a_gradient_is_stepped_with_zero():
    settings = toy_config().stages["toy"].optimizers["student"]
    network = toy_network(1)
    engine = SingleEngine("student", network, settings)
    assert engine.step(0.5) == 0.0
    start = toy_network(1).state_dict()
    for key, value in network.state_dict().items():
        torch.testing.assert_close(value, start[key] * (1 - 0.5 * settings.weight_decay))


def test_single_strategy_never_imports_deepspeed(run_toy, tmp_path):
    code = (
        "import sys; from tests.train.toy import *; from pathlib import Path;"
        f"train(Path({str(tmp_path)!r}), toy_config(steps=1));"
        "sys.exit('deepspeed' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=120).returncode == 0
