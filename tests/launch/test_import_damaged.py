"""`python -m launch import`: files that are damaged, odd or of half a model end with a sentence."""

import json
import random
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from launch.__main__ import main
from launch.weight_files import WeightsError, read_torch
from models.wan_config import native_config
from tests.launch.checkpoints import SMALL, random_weights, write_native, write_self_forcing
from tests.launch.exported import write_student
from tests.launch.test_import import bring, refused

DAMAGED = ("must be a whole file of torch.save", "must hold tensors alone", "a dictionary of")


@pytest.mark.parametrize("seed", range(4))
def test_a_list_of_tensors_with_one_other_byte_is_read_or_refused(seed, tmp_path):
    path = tmp_path / "m.pt"
    torch.save({f"layer.{n}.weight": torch.ones(2, 3) for n in range(3)} | {"step": 7}, path)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        content = archive.read(name)
    start, dice, refusals = whole.index(content), random.Random(seed), set()
    for position in dice.choices(range(len(content)), k=50):
        data = bytearray(whole)
        data[start + position] ^= dice.randrange(1, 256)
        path.write_bytes(data)
        try:
            read_torch(path)
        except WeightsError as error:
            refusals.add((str(error), type(error.__cause__)))
    assert all(any(words in said for words in DAMAGED) for said, _ in refusals)
    assert len({cause for _, cause in refusals}) > 2, "several kinds of damage must be tried"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "128"}, "dim must be a whole number above 0, found '128'"),
        ({"patch_size": 2}, "patch_size must be [time, height, width]"),
        ({"patch_size": [2, 2, 2]}, "must be of a network that can be built"),
        ({"num_layers": 10**9}, "must hold 27 tensors for each of 1000000000 layers"),
        ({"ffn_dim": 10**30}, "must be of a network that can be built"),
    ],
)
def test_a_malformed_config_is_refused(changes, message, tmp_path, capsys):
    weights = random_weights()
    del weights["time_embedding.0.weight"]  # so that the sizes are those of the config alone
    folder = write_native(tmp_path / "wan", weights)
    (folder / "config.json").write_text(json.dumps(native_config(SMALL) | changes))
    assert message in refused(capsys, folder, tmp_path / "in", "--role", "teacher")


def with_entries(found, changes):
    """`found` with entries replaced, and those without a value taken out."""
    changed = {**found, **changes}
    return {key: value for key, value in changed.items() if value is not ...}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: {}, "must be of version 1, found None"),
        (lambda found: with_entries(found, {"version": 2}), "must be of version 1, found 2"),
        (lambda found: with_entries(found, {"version": True}), "must be of version 1, found True"),
        (lambda _: {"version": 1}, "odd entries: role, stage, config, sampler, files;"),
        (lambda found: with_entries(found, {"role": "head"}), "odd entries: role;"),
        (lambda found: with_entries(found, {"role": ["x"]}), "odd entries: role;"),
        (lambda found: with_entries(found, {"stage": ...}), "odd entries: stage;"),
        (lambda found: with_entries(found, {"config": {}}), "odd entries: config.model;"),
        (
            lambda found: with_entries(
                found, {"config": {"model": {"num_heads": 0, "frames_per_block": True}}}
            ),
            "odd entries: config.model.num_heads, config.model.frames_per_block;",
        ),
        (lambda found: with_entries(found, {"sampler": {"sigmas": 1}}), "sampler.sigmas, sampler."),
        (lambda found: with_entries(found, {"files": {}}), "odd entries: files;"),
        (lambda found: with_entries(found, {"files": {"README.md": 3}}), "odd entries: files;"),
        (lambda found: with_entries(found, {"files": ["README.md"]}), "odd entries: files;"),
    ],
)
def test_an_odd_pafukv_json_is_refused(change, message, published, tmp_path, capsys):
    path = published / "pafukv.json"
    whole = path.read_text()
    path.write_text(json.dumps(change(json.loads(whole))))
    try:
        assert message in refused(capsys, published, tmp_path / "in")
    finally:
        path.write_text(whole)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """What `export` writes of a small student."""
    folder = tmp_path_factory.mktemp("published")
    source = write_student(folder / "student")
    assert main(["export", str(source), str(folder / "out"), "--format", "safetensors"]) == 0
    return folder / "out"


def nested(tensor):
    return torch.nested.nested_tensor([tensor, tensor[:1]])


UNUSABLE = "1 sparse, quantized or without values: blocks.0.ffn.2.bias"
KINDS = {
    "sparse": (lambda tensor: tensor.to_sparse(), UNUSABLE),
    "quantized": (lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.qint8), UNUSABLE),
    "meta": (lambda tensor: tensor.to("meta"), UNUSABLE),
    "rows": (lambda tensor: tensor[None].to_sparse_csr(), UNUSABLE),
    "nested": (nested, "1 not in the network: blocks.0.ffn.2.bias"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_that_is_no_array_of_values_is_listed(kind, tmp_path, capsys):
    weights, (change, message) = random_weights(), KINDS[kind]
    weights["blocks.0.ffn.2.bias"] = change(weights["blocks.0.ffn.2.bias"])
    source = write_self_forcing(tmp_path / "m.pt", raw=weights)
    assert message in refused(capsys, source, tmp_path / "in")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blocks.x.foo", "1 not in the network: blocks.x.foo"),
        ("blocks.01.foo", "1 not in the network: blocks.01.foo"),
        ("blocks.999999.foo", "found 3 of them and blocks.999999"),
    ],
)
@pytest.mark.timeout(120)
def test_an_odd_number_of_a_block_is_named(name, message, tmp_path, capsys):
    weights = random_weights() | {name: torch.ones(2)}
    source = write_self_forcing(tmp_path / "m.pt", raw=weights)
    assert message in refused(capsys, source, tmp_path / "in")


@pytest.mark.parametrize("part", ["folder", "index"])
def test_half_of_a_model_with_two_experts_is_refused(part, tmp_path, capsys):
    pipeline = tmp_path / "wan"
    write_native(pipeline / "transformer", random_weights(), geometry=replace(SMALL, eps=1e-5))
    index = {"_class_name": "WanPipeline", "transformer_2": [None, None]}
    (pipeline / "model_index.json").write_text(json.dumps(index))
    assert bring(pipeline, tmp_path / "one", "--role", "teacher") == 0
    if part == "folder":
        (pipeline / "transformer_2").mkdir()
    else:
        index["transformer_2"] = ["diffusers", "WanTransformer3DModel"]
        (pipeline / "model_index.json").write_text(json.dumps(index))
    message = refused(capsys, pipeline, tmp_path / "in", "--role", "teacher")
    assert "must be a pipeline with one transformer" in message
