"""What leaves in any form and comes back is what it was, bit by bit."""

from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.__main__ import main
from launch.export import Export, load_export
from launch.layouts import LAYOUTS
from tests.launch.exported import MODEL, manifest, write_student, write_teacher
from tests.models.small import random_transformer

KEPT = ("role", "stage", "kind", "train_seed", "steps", "sampler", "policy", "weights", "config")


def assert_same(found: Export, expected: Export) -> None:
    assert found.weights.keys() == expected.weights.keys()
    for stem, tensors in expected.weights.items():
        assert found.weights[stem].keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert found.weights[stem][name].dtype == tensor.dtype
            assert torch.equal(found.weights[stem][name], tensor), name
    for key in KEPT:
        assert found.manifest[key] == expected.manifest[key], key


def out_and_in(source: Path, folder: Path, *flags: str) -> Path:
    """Export `source` into `folder` and import it again beside that."""
    assert main(["export", str(source), str(folder), *flags]) == 0
    back = folder.with_name(f"{folder.name}-back")
    assert main(["import", str(folder), str(back)]) == 0
    return back


@pytest.mark.parametrize(("first", "second"), product(LAYOUTS, LAYOUTS))
def test_a_student_with_its_head_survives_every_pair_of_forms(first, second, tmp_path):
    source = write_student(tmp_path / "tuned")
    there = out_and_in(source, tmp_path / "one", "--format", first)
    back = out_and_in(there, tmp_path / "two", "--format", second)
    assert_same(load_export(back), load_export(source))


def test_a_teacher_survives_the_forms_that_take_it(tmp_path):
    source = write_teacher(tmp_path / "teacher")
    there = out_and_in(source, tmp_path / "one", "--format", "diffusers")
    back = out_and_in(there, tmp_path / "two", "--format", "safetensors")
    assert_same(load_export(back), load_export(source))


@pytest.mark.parametrize("form", LAYOUTS)
def test_bfloat16_comes_back_as_bfloat16(form, tmp_path):
    source = write_student(tmp_path / "tuned")
    back = out_and_in(source, tmp_path / "one", "--format", form, "--dtype", "bf16")
    found, expected = load_export(back), load_export(source)
    for name, tensor in expected.tensors("transformer").items():
        assert torch.equal(found.tensors("transformer")[name], tensor.to(torch.bfloat16))
    for name, tensor in expected.tensors("head").items():
        assert torch.equal(found.tensors("head")[name], tensor)


@pytest.mark.parametrize(("num_layers", "count"), [(30, 825), (40, 1095)])
@pytest.mark.parametrize("form", LAYOUTS)
def test_every_tensor_of_the_published_depths_goes_out_and_comes_in(
    form, num_layers, count, tmp_path
):
    config = manifest("student")["config"]
    config["model"] = MODEL | {"num_layers": num_layers}
    source = tmp_path / "deep"
    network = random_transformer(num_layers=num_layers, patch_size=(1, 2, 2))
    write_student(source, network=network, config=config)
    back = out_and_in(source, tmp_path / "one", "--format", form)
    names = {
        "diffusers": lambda: load_file(next((tmp_path / "one").rglob("*model.safetensors"))),
        "safetensors": lambda: load_file(tmp_path / "one" / "diffusion_pytorch_model.safetensors"),
        "self-forcing": lambda: torch.load(tmp_path / "one" / "model.pt")["generator_ema"],
    }[form]()
    assert len(names) == count
    assert_same(load_export(back), load_export(source))
