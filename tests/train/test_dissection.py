"""A sample alone in a step does what it does among others, and says where it breaks."""

import copy

import pytest
import torch

from tests.train.small_stages import batch, build
from tests.train.toy import toy_batch, toy_config, toy_stage
from train.dissection import Loner
from train.engine import SingleEngine, build_engines
from train.stage import NonFiniteError


def loners_of(stage, size=2):
    return [Loner(stage, index) for index in range(size)]


@pytest.mark.parametrize("kind", ["distill", "streaming"])
def test_the_losses_of_samples_alone_have_the_loss_of_the_batch_as_their_mean(kind):
    stage, compared = build(kind, {"student_every": 1}), 0
    loners = loners_of(stage)
    for step in range(4):
        given = batch(first_seed=10 + step)
        found = [loner.observe(given, step) for loner in loners]
        metrics = stage.update(given, step)
        stage.completed += 1
        for name in found[0].losses:
            mean = sum(finding.losses[name] for finding in found) / len(found)
            # Other shapes, another order of summation.
            assert mean == pytest.approx(float(metrics[f"loss/{name}"]), rel=1e-4)
            compared += 1
        assert all(finding.is_finite for finding in found)
    assert compared >= 6


def test_looking_changes_neither_weights_nor_gradients_nor_generators():
    stage = toy_stage(toy_config())  # its noise comes from the global generator
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    before = copy.deepcopy(stage.state_dict())
    torch.manual_seed(5)
    assert Loner(stage, 1).observe(toy_batch(0, size=4, rank=0, world=1), 0).is_finite
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3))
    assert all(torch.equal(value, before[key]) for key, value in stage.state_dict().items())
    assert all(parameter.grad is None for parameter in stage.parameters())
    assert stage.completed == 0
    assert stage.mean.abs().sum() == 0


def test_a_sample_alone_begins_without_the_streams_that_its_stage_is_in():
    stage = build("streaming")
    stage.update(batch(), 0)
    lonely = Loner(stage, 1)
    assert not lonely.stage.streams
    lonely.observe(batch(first_seed=20), 1)
    assert lonely.stage.streams[0].history.shape[0] == 1
    assert stage.streams[0].history.shape[0] == 2


def test_a_poisoned_sample_is_the_only_one_that_is_not_finite():
    stage = build("teacher")
    given = batch(size=3)
    given.latents[1, 4, 0, 0, 0] = torch.inf
    found = [loner.observe(given, 0) for loner in loners_of(stage, 3)]
    assert [finding.is_finite for finding in found] == [True, False, True]
    assert found[1].inputs == ["latents"]
    assert found[1].module == "teacher.patch_embedding"
    assert found[1].parameters[0] == "teacher.head.head.bias", "as the backward pass comes by"
    with pytest.raises(NonFiniteError, match="loss of 'teacher' is nan"):
        stage.update(given, 0)


def test_a_gradient_that_breaks_where_every_output_is_finite_is_found_by_its_parameter():
    stage = build("distill")
    weight = stage.networks["critic"].blocks[1].ffn[0].weight
    weight.register_hook(lambda gradient: gradient * torch.inf)
    found = Loner(stage, 0).observe(batch(), 0)
    assert (found.is_finite, found.module) == (False, None)
    assert found.parameters == ["critic.blocks.1.ffn.0.weight"]


def test_a_broken_weight_is_found_in_its_module():
    stage = build("distill")
    layer = stage.networks["critic"].blocks[1].ffn[2]
    with torch.no_grad():
        layer.bias[3] = torch.nan
    found = Loner(stage, 0).observe(batch(), 0)
    assert found.module == "critic.blocks.1.ffn.2"
    assert not found.is_finite
    assert found.inputs == []


def test_the_samples_at_work_in_a_stream_are_those_that_it_began_with():
    stage = build("streaming")
    first, later = batch(first_seed=10), batch(first_seed=20)
    assert stage.batch_at_work(first) is first
    stage.update(first, 0)
    assert stage.batch_at_work(later) is first
    stage.update(later, 1)
    stage.update(later, 2)
    assert not stage.streams, "three chunks fill it"
    assert stage.batch_at_work(later) is later
