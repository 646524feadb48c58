import copy
import math

import pytest
import torch
from torch import nn

from configs.errors import ConfigError
from tests.train.toy import ToyStage, ToyStream, toy_batch, toy_config, toy_network, toy_stage
from train.engine import SingleEngine, build_engines
from train.kind import rank_share
from train.stage import split_batch


@pytest.fixture
def stage():
    stage = toy_stage(toy_config(steps=10))
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    return stage


def test_learning_rate_rises_then_follows_a_cosine_to_its_floor(stage):
    settings = stage.config.optimizers["student"]
    settings.lr, settings.warmup, settings.floor = 1.0, 4, 0.1
    assert [stage.lr("student", step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert stage.lr("student", 4) == 1.0
    # Half way from step 4 to step 10, the cosine is 1/2: 0.1 + 0.9 / 2.
    assert math.isclose(stage.lr("student", 7), 0.55)
    assert math.isclose(stage.lr("student", 10), 0.1)
    assert math.isclose(stage.lr("student", 99), 0.1)
    settings.schedule = "constant"
    assert stage.lr("student", 9) == 1.0


def test_learning_rate_without_warm_up_starts_at_its_full_value(stage):
    stage.config.optimizers["student"].warmup = 0
    assert stage.lr("student", 0) == stage.config.optimizers["student"].lr


def test_optimizers_must_name_the_trainable_networks():
    config = toy_config().stages["toy"]
    with pytest.raises(
        ConfigError, match=r"trainable networks \['student'\], found \['critic', 's"
    ):
        ToyStage(config, seed=1, networks={"student": toy_network(1)})


def test_frozen_networks_have_no_engine_and_no_gradient(stage):
    specs = stage.engine_specs()
    assert list(stage.engines) == ["student", "critic"]
    assert specs["teacher"].optim is None
    assert not any(p.requires_grad for p in stage.frozen.parameters())
    assert not stage.frozen["teacher"].training


def test_optimise_reports_norm_and_rate_and_moves_only_its_network(stage):
    before = copy.deepcopy(stage.networks.state_dict())
    student = stage.engine("student")
    expected = student(torch.ones(2, 6)).square().mean()
    reported = stage.optimise("student", lambda x: student(x).square().mean(), [torch.ones(2, 6)])
    assert reported.keys() == {"loss/student", "grad_norm/student", "lr/student"}
    assert reported["loss/student"] == expected
    assert reported["lr/student"] == stage.lr("student", 0)
    moved = {
        key for key, value in stage.networks.state_dict().items() if not value.equal(before[key])
    }
    assert moved == {key for key in before if key.startswith("student")}


def test_accumulated_losses_are_computed_one_after_the_other():
    stage = toy_stage(toy_config())
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    engine, order = stage.engine("student"), []
    backward, around = engine.backward, engine.micro_batch
    engine.backward = lambda loss: (order.append("backward"), backward(loss))
    engine.micro_batch = lambda *, last: (order.append(f"last {last}"), around(last=last))[1]

    def loss(number):
        order.append(f"loss {number}")
        return number * engine(torch.ones(2, 6)).square().mean()

    alone = engine(torch.ones(2, 6)).square().mean()
    reported = stage.optimise("student", loss, [0, 1, 2])
    assert order[:3] == ["last False", "loss 0", "backward"]
    assert order[-3:] == ["last True", "loss 2", "backward"]
    assert reported["loss/student"].item() == pytest.approx(alone.item())  # mean of 0, 1, 2 times


def test_micro_batches_are_parts_of_the_batch_in_order():
    batch = toy_batch(0, size=6, rank=0, world=1)
    parts = list(split_batch(batch, 3))
    assert [len(part.seeds) for part in parts] == [2, 2, 2]
    assert torch.equal(torch.cat([part.latents for part in parts]), batch.latents)
    assert next(split_batch(batch, 1)) is batch
    with pytest.raises(ValueError, match="multiple of 4 samples, found 6"):
        list(split_batch(batch, 4))


def test_a_step_is_shared_out_in_whole_micro_batches():
    settings = toy_config(batch=12, micro_batch=3).stages["toy"]
    assert [rank_share(settings, world) for world in (1, 2, 4)] == [12, 6, 3]
    with pytest.raises(ConfigError, match=r"multiple of ranks x micro_batch = 8 x 3, found 12"):
        rank_share(settings, 8)


def test_snapshot_of_a_stream_is_the_state_before_its_first_step(stage):
    stream = toy_stage(toy_config(), ToyStream)
    stream.engines = build_engines(stream.engine_specs(), SingleEngine)
    start = copy.deepcopy(stream.engine("student").weights())
    for step in range(3):
        stream.update(toy_batch(step, size=4, rank=0, world=1), step)
        stream.completed += 1
    taken = stream.snapshot()
    assert taken.step == 0
    assert torch.equal(taken.tensors["engine.student.master.0"], start["0.weight"].flatten())
    stream.update(toy_batch(3, size=4, rank=0, world=1), 3)
    assert stream.snapshot().step == 3


def test_a_stage_without_update_says_so():
    from train.stage import Stage

    config = toy_config().stages["toy"]
    networks = {"student": nn.Linear(1, 1), "critic": nn.Linear(1, 1)}
    with pytest.raises(NotImplementedError, match=r"Stage must define update\(batch, step\)"):
        Stage(config, seed=0, networks=networks).update(None, 0)
