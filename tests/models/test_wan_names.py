"""Names and configs of Wan checkpoints against the networks that have them."""

import dataclasses
import re

import pytest
import torch
from diffusers import WanTransformer3DModel

from models.transformer import VideoTransformer
from models.wan_config import (
    Geometry,
    diffusers_config,
    geometry_of_shapes,
    is_diffusers_config,
    native_config,
    read_diffusers_config,
    read_native_config,
)
from models.wan_names import (
    bare_name,
    diffusers_name,
    names_of_diffusers,
    native_name,
    native_names,
)
from tests.models.small import WAN_1_3B, WAN_14B

SMALL = Geometry(
    num_layers=3,
    num_heads=2,
    head_dim=12,
    ffn_dim=32,
    freq_dim=16,
    text_dim=8,
    in_channels=5,
    out_channels=7,
    patch_size=(1, 2, 3),
)


def shapes(network) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def on_meta(geometry: Geometry) -> VideoTransformer:
    with torch.device("meta"):
        return VideoTransformer(**dataclasses.asdict(geometry))


@pytest.mark.parametrize(("geometry", "count"), [(WAN_1_3B, 825), (WAN_14B, 1095), (SMALL, 96)])
def test_every_tensor_has_one_name_in_diffusers_with_the_same_shape(geometry, count):
    ours = shapes(on_meta(geometry))
    config = diffusers_config(geometry)
    with torch.device("meta"):
        theirs = shapes(WanTransformer3DModel.from_config(config))
    assert len(ours) == count
    assert sorted(native_names(geometry.num_layers)) == sorted(ours)
    assert {diffusers_name(name): shape for name, shape in ours.items()} == theirs
    assert {native_name(name): shape for name, shape in theirs.items()} == ours
    assert geometry_of_shapes(ours, num_heads=geometry.num_heads) == geometry


@pytest.mark.parametrize("geometry", [WAN_1_3B, WAN_14B, SMALL])
def test_configs_of_both_kinds_say_the_whole_geometry(geometry):
    native, theirs = native_config(geometry), diffusers_config(geometry)
    assert (is_diffusers_config(native), is_diffusers_config(theirs)) == (False, True)
    assert read_native_config(native) == geometry
    assert read_diffusers_config(theirs) == geometry


def test_diffusers_itself_reads_the_config_and_says_the_same():
    config = diffusers_config(SMALL)
    with torch.device("meta"):
        said = WanTransformer3DModel.from_config(config).config
    assert {key: said[key] for key in config if key != "_class_name"} == {
        key: value for key, value in config.items() if key != "_class_name"
    }
    assert {key for key in said if not key.startswith("_")} <= set(config)


def test_a_native_config_of_wan_has_the_keys_of_the_published_ones():
    assert native_config(WAN_14B) == {
        "_class_name": "WanModel",
        "dim": 5120,
        "eps": 1e-6,
        "ffn_dim": 13824,
        "freq_dim": 256,
        "in_dim": 16,
        "model_type": "t2v",
        "num_heads": 40,
        "num_layers": 40,
        "out_dim": 16,
        "text_len": 512,
    }


def test_modules_have_names_too():
    assert diffusers_name("blocks.11.cross_attn.o") == "blocks.11.attn2.to_out.0"
    assert native_name("blocks.11.ffn.net.0.proj") == "blocks.11.ffn.0"


@pytest.mark.parametrize(
    "wrapped",
    [
        "blocks.0.norm3.weight",
        "model.blocks.0.norm3.weight",
        "model._fsdp_wrapped_module.blocks.0._fsdp_wrapped_module.norm3.weight",
        "module.model._orig_mod.blocks.0._checkpoint_wrapped_module.norm3.weight",
        "model.diffusion_model.blocks.0.norm3.weight",
        "generator.transformer.module._fsdp_wrapped_module.module.blocks.0.norm3.weight",
    ],
)
def test_wrappers_leave_the_bare_name(wrapped):
    assert bare_name(wrapped) == "blocks.0.norm3.weight"


def test_a_name_that_no_text_to_video_network_has_is_refused():
    for translate in (diffusers_name, native_name):
        for name in ("blocks.0.norm1.weight", "blocks.0.unknown", "vae.weight", "blocks.0"):
            with pytest.raises(ValueError, match="has no tensor or module"):
                translate(name)


@pytest.mark.parametrize("alien", ["blocks.0.cross_attn.k_img.weight", "img_emb.proj.0.weight"])
def test_an_image_to_video_model_is_called_so(alien):
    names = native_names(2)
    assert not names_of_diffusers(names)
    assert names_of_diffusers(map(diffusers_name, names))
    with pytest.raises(ValueError, match="an image-to-video model"):
        names_of_diffusers([*names, alien])
    with pytest.raises(ValueError, match="found 1 names"):
        names_of_diffusers(["encoder.conv1.weight"])


@pytest.mark.parametrize(
    ("read", "config", "message"),
    [
        (read_native_config, native_config(SMALL) | {"model_type": "i2v"}, "found 'i2v'"),
        (read_native_config, native_config(SMALL) | {"num_heads": 7}, "multiple of num_heads=7"),
        (read_diffusers_config, diffusers_config(SMALL) | {"image_dim": 1280}, "found 1280"),
        (read_diffusers_config, {"attention_head_dim": 12}, "patch_size must be there"),
        (read_diffusers_config, {"_class_name": "UNet"}, "found 'UNet'"),
        (read_native_config, {"dim": 12}, "num_layers, .* must be there"),
    ],
)
def test_a_config_of_something_else_is_refused(read, config, message):
    with pytest.raises(ValueError, match=message):
        read(config)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("dim", value) for value in ("128", 128.0, 0, -128, True, None, [128])),
        *(("num_heads", 0), ("num_layers", -2), ("text_dim", "8"), ("in_dim", False)),
        *(("patch_size", value) for value in (2, "122", [1, 2], [1, 2, 0], [1, 2.0, 2], None)),
        *(("eps", value) for value in ("1e-6", 0, -1e-6, True, float("nan"), float("inf"))),
    ],
)
def test_a_size_that_is_none_is_named_with_what_was_found(key, value):
    found = f"{key} must be .*, found {re.escape(repr(value))}; repair the config"
    with pytest.raises(ValueError, match=found):
        read_native_config(native_config(SMALL) | {key: value})
    theirs = {"dim": "attention_head_dim", "num_heads": "num_attention_heads"}
    key = (theirs | {"in_dim": "in_channels"}).get(key, key)
    found = f"{key} must be .*, found {re.escape(repr(value))}; repair the config"
    with pytest.raises(ValueError, match=found):
        read_diffusers_config(diffusers_config(SMALL) | {key: value})


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("blocks.3.foo", (1,), None),
        ("blocks.x.foo", (1,), None),
        ("blocks.0012.foo", (1,), None),
        (f"blocks.{'9' * 5000}.foo", (1,), None),
        ("blocks.5.foo", (1,), "without gaps, found 4 of them and blocks.5"),
        ("blocks.999999.foo", (1,), "without gaps, found 4 of them and blocks.999999"),
        ("patch_embedding.weight", (16, 4, 1, 0, 2), "none of them empty"),
    ],
)
def test_names_of_no_block_do_not_count_and_gaps_are_refused(name, shape, message):
    changed = shapes(on_meta(SMALL)) | {name: shape}
    if message is None:
        layers = 4 if name == "blocks.3.foo" else 3
        assert geometry_of_shapes(changed, num_heads=2).num_layers == layers
    else:
        with pytest.raises(ValueError, match=message):
            geometry_of_shapes(changed, num_heads=2)


def test_a_rotation_that_wan_does_not_have_cannot_be_written():
    own = dataclasses.replace(SMALL, rope_theta=100.0)
    for write in (native_config, diffusers_config):
        with pytest.raises(ValueError, match="must be 10000"):
            write(own)
