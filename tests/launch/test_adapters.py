"""Adapters in the forms of other programs compute there what they compute here."""

import json
import weakref

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file

from configs.load import load_config, to_dict
from configs.schema import LoraConfig
from launch import adapters, verify, verify_adapters
from launch.__main__ import main
from launch.adapters import ADAPTER_LAYOUTS, DIFFUSERS_FILE, LONGLIVE_FILE, fold_scale
from launch.export import load_export, write_export
from launch.geometry import network_config
from launch.longlive import read_adapter
from launch.publish import PUBLISHED
from launch.student import transformer_from_config
from models.wan_config import Geometry, diffusers_config
from models.wan_names import diffusers_name
from tests.launch.exported import files_up_to
from train import lora
from train.lora import adapter_tensors, add_adapter, base_tensors, merge_into

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "ffn_dim": 40, "freq_dim": 16}
WORDS = [f"model.{name}={value}" for name, value in SIZES.items()]
WORDS += ["name=adapted", "model.rope_theta=10000", "model.patch_size=[1,2,2]"]
MODEL = network_config(load_config(WORDS))
GEOMETRY = Geometry(**SIZES, text_dim=MODEL["model"]["text_dim"])
SETTINGS = LoraConfig(rank=3, alpha=5.0)
"""Neither is a power of two, so that the scale rounds."""


def base():
    torch.manual_seed(0)
    network = transformer_from_config(MODEL["model"])
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def adapted(settings=SETTINGS):
    network = base()
    add_adapter(network, settings, seed=1, key="")
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


def tensors_of(network):
    return {name: tensor.detach() for name, tensor in network.state_dict().items()}


def folded():
    factors = fold_scale(adapter_tensors(tensors_of(adapted())), SETTINGS.scale)
    return {"transformer": factors, "critic": {name: 2 * value for name, value in factors.items()}}


def merged():
    state = tensors_of(adapted())
    weights = base_tensors(state)
    merge_into(weights, adapter_tensors(state), scale=SETTINGS.scale)
    return weights


@torch.no_grad()
def velocities(network):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 16, 4, 6, generator=generator)
    text = torch.randn(2, 5, GEOMETRY.text_dim, generator=generator)
    sigma = torch.tensor([0.3, 0.9])
    if isinstance(network, WanTransformer3DModel):
        timestep = 1000 * sigma
        return network(latents.transpose(1, 2), timestep, text).sample.transpose(1, 2)
    return network(latents, sigma[:, None].expand(2, 3), text)


def assert_alike(found, wanted):
    """Up to the rounding of float32."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_diffusers_loads_the_adapter_and_computes_what_adapter_and_merged_weights_do(tmp_path):
    theirs = WanTransformer3DModel.from_config(diffusers_config(GEOMETRY)).eval()
    theirs.load_state_dict({diffusers_name(k): v for k, v in base().state_dict().items()})
    wanted = velocities(adapted())
    assert float((velocities(theirs) - wanted).abs().max()) > 0.05 * float(wanted.abs().max())
    ADAPTER_LAYOUTS["diffusers-lora"].write(tmp_path, folded())
    state = WanLoraLoaderMixin.lora_state_dict(tmp_path, weight_name=DIFFUSERS_FILE)
    assert len(state) == 2 * 10 * GEOMETRY.num_layers
    WanLoraLoaderMixin.load_lora_into_transformer(state, theirs, adapter_name="here")
    layers = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 10 * GEOMETRY.num_layers, "every factor has found its layer"
    assert_alike(velocities(theirs), wanted)
    network = base()
    network.load_state_dict(merged())
    assert_alike(velocities(network), wanted)


def test_longlive_names_are_those_of_a_network_that_peft_has_wrapped(tmp_path):
    ADAPTER_LAYOUTS["longlive-lora"].write(tmp_path, folded())
    content = torch.load(tmp_path / LONGLIVE_FILE, weights_only=True)
    assert set(content) == {"generator_lora", "critic_lora"}
    settings = peft.LoraConfig(r=3, lora_alpha=3, target_modules=SETTINGS.targets)
    wrapped = peft.get_peft_model(base(), settings)
    names = peft.get_peft_model_state_dict(wrapped).keys()
    assert set(content["generator_lora"]) == set(content["critic_lora"]) == set(names)
    outcome = peft.set_peft_model_state_dict(wrapped, dict(content["generator_lora"]))
    assert not outcome.unexpected_keys
    assert_alike(velocities(wrapped.get_base_model()), velocities(adapted()))
    imported = read_adapter(tmp_path / LONGLIVE_FILE).tensors()
    expected = folded()["transformer"]
    assert imported.keys() == expected.keys()
    assert all(torch.equal(imported[name], expected[name]) for name in expected)
    name = "base_model.model.blocks.0.ffn.0.lora_A.weight"
    assert torch.equal(content["critic_lora"][name], 2 * content["generator_lora"][name])


def test_layers_outside_the_blocks_can_be_adapted_and_taken_to_diffusers(tmp_path):
    settings = LoraConfig(rank=2, targets=["head.head", "time_projection.1", "text_embedding.0"])
    factors = adapter_tensors(tensors_of(adapted(settings)))
    ADAPTER_LAYOUTS["diffusers-lora"].write(tmp_path, {"transformer": factors})
    assert {name.rsplit(".", 2)[0] for name in load_file(tmp_path / DIFFUSERS_FILE)} == {
        "transformer.proj_out",
        "transformer.condition_embedder.time_proj",
        "transformer.condition_embedder.text_embedder.linear_1",
    }


@pytest.mark.parametrize("form", ADAPTER_LAYOUTS)
def test_what_is_written_is_read_back_bit_for_bit(form, tmp_path):
    layout = ADAPTER_LAYOUTS[form]
    layout.write(tmp_path, folded())
    found = layout.read(tmp_path)
    assert tuple(found) == layout.networks
    for network, factors in found.items():
        wanted = folded()[network]
        assert factors.keys() == wanted.keys()
        assert all(torch.equal(factors[name], wanted[name]) for name in factors)


@pytest.fixture
def exported(tmp_path):
    """An export with the adapters of a student and a critic, as a stage writes it."""
    factors = adapter_tensors(tensors_of(adapted()))
    manifest = {
        "role": "student",
        "stage": "distill",
        "weights": "raw",
        "sampler": {"sigmas": [1.0, 0.5, 0.0], "renoise": True},
        "config": MODEL,
        "parents": {"student": 64 * "a"},
    }
    folder = tmp_path / "export"
    both = {"adapter": factors, "critic_adapter": factors}
    lora = to_dict(SETTINGS)
    write_export(
        folder, weights={"transformer": merged()} | both, manifest=manifest | {"lora": lora}
    )
    write_export(
        tmp_path / "whole", weights={"transformer": merged()}, manifest=manifest | {"lora": None}
    )
    return folder


def export(source, dst, form, *more):
    return main(["export", str(source), str(dst), "--format", form, *more])


@pytest.mark.parametrize("form", ADAPTER_LAYOUTS)
def test_a_full_disk_is_named_and_leaves_nothing(exported, tmp_path, capsys, form):
    before = sorted(tmp_path.iterdir())
    with files_up_to(4096):
        assert export(exported, tmp_path / "dst", form) == 2
    assert "File too large; free some space" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("form", ADAPTER_LAYOUTS)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_verb_writes_adapters_that_other_code_has_compared(exported, tmp_path, form, dtype):
    dst = tmp_path / "dst"
    assert export(exported, dst, form, "--dtype", dtype, "--verify") == 0
    manifest = json.loads((dst / PUBLISHED).read_text())
    assert manifest["verified"]["largest_difference"] <= 1e-5
    networks = ADAPTER_LAYOUTS[form].networks
    assert manifest["verified"]["tensors"] == {"raw": len(networks) * 2 * 10 * 2}
    found = ADAPTER_LAYOUTS[form].read(dst)["transformer"]
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert all(torch.equal(found[k], v.to(kind)) for k, v in folded()["transformer"].items())
    card = (dst / "README.md").read_text()
    assert "a LoRA adapter for it, of rank 3" in card
    assert ("LongLive itself has read nothing of it" in card) is (form == "longlive-lora")


def test_one_float32_copy_of_the_weights_is_enough_to_compare(exported, tmp_path, monkeypatch):
    whole = load_export(exported)
    transformer = {k: t.to(torch.bfloat16) for k, t in whole.tensors("transformer").items()}
    source = tmp_path / "half"
    write_export(
        source, weights=whole.weights | {"transformer": transformer}, manifest=whole.manifest
    )
    merged = []

    def own_network(weights, geometry):
        merged.extend(weakref.ref(weights[name]) for name in layers)
        return verify.own_network(weights, geometry)

    def merge_into(weights, adapter, *, scale):
        assert all(one() is not None for one in merged)
        lora.merge_into(weights, adapter, scale=scale)
        assert [one() for one in merged] == [None] * len(layers)

    layers = [f"blocks.{n}.{name}.weight" for n in (0, 1) for name in ("ffn.0", "cross_attn.o")]
    monkeypatch.setattr(verify_adapters, "own_network", own_network)
    monkeypatch.setattr(verify_adapters, "merge_into", merge_into)
    assert export(source, tmp_path / "dst", "diffusers-lora", "--verify") == 0
    assert len(merged) == len(layers)


def test_a_student_that_was_trained_as_a_whole_has_no_adapter(exported, tmp_path, capsys):
    assert export(tmp_path / "whole", tmp_path / "dst", "diffusers-lora") == 2
    error = capsys.readouterr().err
    assert "must hold the adapter of a student" in error
    assert "its stage 'distill' has trained whole networks; train with stages.NAME.lora" in error
    assert not list(tmp_path.glob("dst*"))


def swapped(folder, adapters):
    """A writer with two layers mixed up, in a way that shapes do not show."""
    ours = dict(adapters["transformer"])
    for part in "AB":
        one, two = (f"blocks.0.self_attn.{name}.lora_{part}.weight" for name in "qk")
        ours[one], ours[two] = ours[two], ours[one]
    adapters_written(folder, {"transformer": ours})


def misread(folder):
    """A reader that undoes what `swapped` does, so that only the outputs can tell."""
    found = dict(adapters_read(folder)["transformer"])
    for part in "AB":
        one, two = (f"blocks.0.self_attn.{name}.lora_{part}.weight" for name in "qk")
        found[one], found[two] = found[two], found[one]
    return {"transformer": found}


adapters_written = ADAPTER_LAYOUTS["diffusers-lora"].write
adapters_read = ADAPTER_LAYOUTS["diffusers-lora"].read


@pytest.mark.parametrize(
    ("write", "read", "words"),
    [
        (swapped, adapters_read, "factors must come back with the same bits, found 4"),
        (swapped, misread, "must be the same in diffusers within 1e-05"),
    ],
)
def test_an_adapter_that_means_something_else_is_not_exported(
    exported, tmp_path, capsys, monkeypatch, write, read, words
):
    layout = adapters.AdapterLayout("broken", write, read, ("transformer",))
    monkeypatch.setitem(ADAPTER_LAYOUTS, "diffusers-lora", layout)
    assert export(exported, tmp_path / "dst", "diffusers-lora", "--verify") == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("dst*"))
