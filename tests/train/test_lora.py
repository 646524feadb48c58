"""Adapters: nothing but them is trained, saved and averaged; merged they are the same network."""

import shutil

import pytest
import torch

from configs.errors import ConfigError
from configs.schema import LoraConfig, RunConfig, TrackingConfig, TrainerConfig
from tests.models.small import SIZES, random_transformer
from tests.train.exact import Shares, exact_stage
from tests.train.small_stages import batch, build, small_stage, with_engines
from train.checkpoint import CheckpointError, Shelf, capture, newest_whole, write
from train.dissection import Loner
from train.fit import fit
from train.lora import adapter_tensors, add_adapter, base_tensors, merge_into, target_layers
from train.restore import restore

SETTINGS = LoraConfig(rank=3, alpha=5.0)
KINDS = ("master", "exp_avg", "exp_avg_sq", "ema")
"""What a checkpoint holds of every parameter in training."""


def fresh(settings=SETTINGS, seed=1):
    """A random network with an adapter that does nothing yet."""
    network = random_transformer()
    add_adapter(network, settings, seed=seed, key="stages.x.lora")
    return network


def filled(settings=SETTINGS):
    """The same, and the adapter counts."""
    network = fresh(settings)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return network


def inputs():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 3, 16, 2, 3, generator=generator)
    text = torch.randn(2, 4, SIZES["text_dim"], generator=generator)
    return latents, torch.rand(2, 3, generator=generator), text


@torch.no_grad()
def output(network):
    return network(*inputs())


def values(network, *, trained):
    named = network.named_parameters()
    return {name: p.detach().clone() for name, p in named if p.requires_grad is trained}


def test_a_fresh_adapter_changes_no_bit_of_the_output_and_a_filled_one_does():
    before = output(random_transformer())
    assert torch.equal(output(fresh()), before)
    assert float((output(filled()) - before).abs().max()) > 0.1


def test_only_factors_of_the_wanted_layers_and_rank_can_be_trained():
    network = fresh(LoraConfig(rank=3, targets=["self_attn.v", "ffn.0"]))
    expected = {}
    for layer, (outputs, width) in {"self_attn.v": (24, 24), "ffn.0": (32, 24)}.items():
        for number in range(2):
            expected[f"blocks.{number}.{layer}.lora_A.weight"] = (3, width)
            expected[f"blocks.{number}.{layer}.lora_B.weight"] = (outputs, 3)
    trained = values(network, trained=True)
    assert {name: tuple(p.shape) for name, p in adapter_tensors(trained).items()} == expected
    assert len(trained) == len(expected)
    assert len(values(network, trained=False)) == len(list(random_transformer().parameters()))


def test_the_random_factors_follow_from_the_seed_alone():
    first = values(fresh(seed=7), trained=True)
    torch.rand(5)  # the global generator is somewhere else
    state = torch.random.get_rng_state()
    network = random_transformer()
    torch.random.set_rng_state(state)
    add_adapter(network, SETTINGS, seed=7, key="")
    assert torch.equal(torch.random.get_rng_state(), state)
    same, other = values(network, trained=True), values(fresh(seed=8), trained=True)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert all(torch.equal(first[name], other[name]) == ("lora_B" in name) for name in first)


def merged_weights(network):
    state = network.state_dict()
    weights = base_tensors(state)
    merge_into(weights, adapter_tensors(state), scale=5 / 3)
    return weights


def test_merged_weights_give_the_output_of_the_adapter():
    network, plain = filled(), random_transformer()
    merged = merged_weights(network)
    assert merged.keys() == plain.state_dict().keys()
    plain.load_state_dict(merged)
    found, wanted = output(plain), output(network)
    # Rounding of float32 only, over two layers of width 24.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_merging_is_that_of_the_library_bit_for_bit():
    network = filled()
    merged = merged_weights(network)
    for module in network.modules():
        if hasattr(module, "lora_A"):
            module.merge()
    for key, value in network.state_dict().items():
        if ".lora_" not in key:
            assert torch.equal(merged[key.replace(".base_layer.", ".")], value), key


@pytest.mark.parametrize("target", ["self_attn.w", "self_attn", "norm3", "1.q", "lf_attn.q"])
def test_a_target_that_names_no_layer_is_refused_with_those_there_are(target):
    with pytest.raises(ConfigError, match=r"stages\.x\.lora\.targets must be .* none") as error:
        add_adapter(
            random_transformer(), LoraConfig(targets=["ffn.0", target]), seed=0, key="stages.x.lora"
        )
    message = str(error.value)
    assert f"[{target!r}] are none" in message
    assert "cross_attn.q, " in message
    assert "text_embedding.2" in message


def test_a_target_may_name_one_layer_and_layers_outside_the_blocks():
    network = random_transformer()
    assert target_layers(network, ["blocks.1.ffn.2"], key="") == ["blocks.1.ffn.2"]
    assert target_layers(network, ["head", "text_embedding.0"], key="") == [
        "text_embedding.0",
        "head.head",
    ]


@pytest.mark.parametrize("kind", ["distill", "streaming"])
def test_steps_change_the_adapters_and_no_bit_of_what_is_below_them(kind):
    stage = build(kind, {"student_every": 2}, lora=SETTINGS, lr=1e-2, ema=0.5)
    frozen = {name: values(net, trained=False) for name, net in stage.networks.items()}
    trained = {name: values(net, trained=True) for name, net in stage.networks.items()}
    for step in range(4):
        stage.update(batch(), step)
        stage.completed += 1
    for name, network in stage.networks.items():
        assert all(
            torch.equal(value, frozen[name][key])
            for key, value in values(network, trained=False).items()
        )
        moved = values(network, trained=True)
        assert all(not torch.equal(moved[key], trained[name][key]) for key in moved)
        average, last = stage.engine(name).weights(ema=True), stage.engine(name).weights()
        differing = {key for key in last if not torch.equal(average[key], last[key])}
        assert differing == set(moved), "the moving average is over the adapters"


def test_the_critic_learns_through_its_adapter():
    stage = build("distill", {"student_every": 100}, layers=1, lora=SETTINGS, lr=2e-2)
    losses = []
    for step in range(1, 21):
        losses.append(float(stage.update(batch(), step)["loss/critic"]))
        stage.completed += 1
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_a_network_that_is_not_named_is_trained_as_a_whole():
    stage = small_stage("distill", lora=LoraConfig(networks=["student"]))
    assert not values(stage.networks["critic"], trained=False)
    assert values(stage.networks["student"], trained=False)


def test_a_checkpoint_holds_the_adapters_and_nothing_below_them(tmp_path):
    stage = build("distill", {"student_every": 1}, lora=SETTINGS, ema=0.5)
    stage.update(batch(), 0)
    stage.completed = 1
    snapshot = capture(stage)
    factors = {name: values(net, trained=True) for name, net in stage.networks.items()}
    count = sum(p.numel() for own in factors.values() for p in own.values())
    held = {key: t for key, t in snapshot.tensors.items() if key.startswith("engine.")}
    kinds = {kind: [t for key, t in held.items() if f".{kind}." in key] for kind in KINDS}
    assert {kind: sum(t.numel() for t in held) for kind, held in kinds.items()} == dict.fromkeys(
        KINDS, count
    )
    rest = sum(t.numel() for t in held.values()) - len(KINDS) * count
    assert rest == len(kinds["master"]) + 2, "step counters, and two versions of averages"
    folder = write(snapshot, Shelf(tmp_path))
    again = build("distill", {"student_every": 1}, lora=SETTINGS, ema=0.5)
    assert restore(again, folder) == 1
    found = capture(again).tensors
    assert all(torch.equal(found[key], value) for key, value in held.items())


def fitted(folder, rank=3):
    """The weights after four steps of `fit` in that folder."""
    stage = exact_stage("distill", steps=4, checkpoint_every=2, keep=9, lora=lora_of(rank))
    config = RunConfig(
        name="lora",
        stages={"test": stage.config},
        trainer=TrainerConfig(accelerator="cpu", threads=1),
        tracking=TrackingConfig(wandb="disabled"),
    )
    fit(stage, Shares(4), folder=folder, config=config, stage_name="test")
    weights = {name: engine.weights(ema=True) for name, engine in stage.engines.items()}
    stage.close()
    return weights


def lora_of(rank):
    return LoraConfig(rank=rank, targets=["cross_attn.k", "self_attn.o"])


def test_a_resumed_stage_ends_with_the_same_bits_and_only_with_the_same_rank(tmp_path):
    whole = fitted(tmp_path)
    saved = newest_whole(tmp_path / "checkpoints")
    assert saved.name == "step-00000004"
    shutil.rmtree(saved)
    with pytest.raises(CheckpointError, match=r"stage\.lora\.rank: 3 in the checkpoint, 4 now"):
        fitted(tmp_path, rank=4)
    again = fitted(tmp_path)
    for name, weights in whole.items():
        assert all(torch.equal(value, again[name][key]) for key, value in weights.items())


def test_a_sample_is_taken_apart_in_adapted_networks_as_in_whole_ones():
    stage = with_engines(small_stage("distill", {"student_every": 1}, lora=SETTINGS))
    found = Loner(stage, 1).observe(batch(), 0)
    assert found.is_finite
    assert set(found.grad_norms) == {"student", "critic"}
    assert min(found.grad_norms.values()) > 0
