"""Adapters in the forms of other programs compute there what they compute here."""

import copy

import peft
import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from safetensors.torch import load_file

from configs.schema import LoraConfig
from launch.adapters import (
    DIFFUSERS_FILE,
    LONGLIVE_FILE,
    read_adapters,
    write_diffusers_adapter,
    write_longlive_adapter,
)
from launch.export import ExportError, load_export, write_export
from models.transformer import VideoTransformer
from models.wan_config import Geometry, diffusers_config
from models.wan_names import diffusers_name
from train.lora import adapter_tensors, add_adapter, merge

SIZES = {"num_layers": 2, "num_heads": 2, "head_dim": 12, "ffn_dim": 40, "freq_dim": 16}
GEOMETRY = Geometry(**SIZES, text_dim=20)
SETTINGS = LoraConfig(rank=3, alpha=5.0)
"""Neither a power of two, so that a wrong scale shows, and the rounding of a right one."""


def base() -> VideoTransformer:
    torch.manual_seed(0)
    network = VideoTransformer(**vars(GEOMETRY))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return network.eval()


def adapted() -> VideoTransformer:
    network = base()
    add_adapter(network, SETTINGS, seed=1, key="")
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export with the adapters of a student and a critic, as a stage writes it."""
    folder = tmp_path_factory.mktemp("adapted") / "export"
    state = {name: tensor.detach() for name, tensor in adapted().state_dict().items()}
    factors = adapter_tensors(state)
    write_export(
        folder,
        weights={
            "transformer": merge(state, SETTINGS),
            "adapter": factors,
            "critic_adapter": {name: 2 * tensor for name, tensor in factors.items()},
        },
        manifest={"role": "student", "stage": "distill", "config": {}, "lora": vars(SETTINGS)},
    )
    return load_export(folder)


@torch.no_grad()
def velocities(network):
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(2, 3, 16, 4, 6, generator=generator)
    text = torch.randn(2, 5, 20, generator=generator)
    sigma = torch.tensor([0.3, 0.9])
    if isinstance(network, WanTransformer3DModel):
        timestep = 1000 * sigma
        return network(latents.transpose(1, 2), timestep, text).sample.transpose(1, 2)
    return network(latents, sigma[:, None].expand(2, 3), text)


def assert_alike(found, wanted):
    """Up to the rounding of float32."""
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_diffusers_loads_the_adapter_and_computes_what_adapter_and_merged_weights_do(
    exported, tmp_path
):
    theirs = WanTransformer3DModel.from_config(diffusers_config(GEOMETRY)).eval()
    theirs.load_state_dict({diffusers_name(k): v for k, v in base().state_dict().items()})
    wanted = velocities(adapted())
    assert float((velocities(theirs) - wanted).abs().max()) > 0.05 * float(wanted.abs().max())
    write_diffusers_adapter(tmp_path, read_adapters(exported))
    state = WanLoraLoaderMixin.lora_state_dict(tmp_path, weight_name=DIFFUSERS_FILE)
    assert len(state) == 2 * 10 * GEOMETRY.num_layers
    WanLoraLoaderMixin.load_lora_into_transformer(state, theirs, adapter_name="here")
    layers = [layer for layer in theirs.modules() if hasattr(layer, "lora_A")]
    assert len(layers) == 10 * GEOMETRY.num_layers, "every factor has found its layer"
    assert_alike(velocities(theirs), wanted)
    merged = base()
    merged.load_state_dict(exported.tensors("transformer"))
    assert_alike(velocities(merged), wanted)


def test_longlive_names_are_those_of_a_network_that_peft_has_wrapped(exported, tmp_path):
    write_longlive_adapter(tmp_path, read_adapters(exported))
    content = torch.load(tmp_path / LONGLIVE_FILE, weights_only=True)
    assert set(content) == {"generator_lora", "critic_lora"}
    settings = peft.LoraConfig(r=3, lora_alpha=3, target_modules=SETTINGS.targets)
    wrapped = peft.get_peft_model(base(), settings)
    names = peft.get_peft_model_state_dict(wrapped).keys()
    assert set(content["generator_lora"]) == set(content["critic_lora"]) == set(names)
    outcome = peft.set_peft_model_state_dict(wrapped, copy.copy(content["generator_lora"]))
    assert not outcome.unexpected_keys
    assert_alike(velocities(wrapped.get_base_model()), velocities(adapted()))
    first = content["critic_lora"]["base_model.model.blocks.0.ffn.0.lora_A.weight"]
    assert torch.equal(first, 2 * exported.tensors("adapter")["blocks.0.ffn.0.lora_A.weight"])


def test_layers_outside_the_blocks_can_be_adapted_and_taken_to_diffusers(tmp_path):
    network = base()
    settings = LoraConfig(rank=2, targets=["head.head", "time_projection.1", "text_embedding.0"])
    add_adapter(network, settings, seed=0, key="")
    tensors = adapter_tensors(dict(network.named_parameters()))
    write_diffusers_adapter(tmp_path, {"transformer": tensors})
    assert {name.rsplit(".", 2)[0] for name in load_file(tmp_path / DIFFUSERS_FILE)} == {
        "transformer.proj_out",
        "transformer.condition_embedder.time_proj",
        "transformer.condition_embedder.text_embedder.linear_1",
    }


def test_a_student_that_was_trained_as_a_whole_has_no_adapter(tmp_path):
    manifest = {"role": "student", "stage": "causal", "config": {}, "lora": None}
    write_export(tmp_path / "x", weights={"transformer": base().state_dict()}, manifest=manifest)
    with pytest.raises(ExportError, match=r"must hold the adapter .* stage 'causal'; train with"):
        read_adapters(load_export(tmp_path / "x"))
