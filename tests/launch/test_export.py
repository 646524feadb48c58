"""Exports are whole or not there, and a loader refuses what does not fit."""

import errno
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from launch import export
from launch.export import (
    ExportError,
    find_export,
    load_export,
    load_weights,
    map_weights,
    require_absent,
    write_export,
)
from train.memory import settle

MANIFEST = {"role": "student", "stage": "causal", "config": {"model": {"width": 5}}, "parents": {}}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))


@pytest.fixture
def written(tmp_path: Path) -> Path:
    folder = tmp_path / "causal" / "export"
    write_export(folder, weights={"transformer": network().state_dict()}, manifest=MANIFEST)
    return folder


def test_an_export_comes_back_bit_for_bit_from_either_folder(written):
    for path in (written, written.parent):
        loaded = load_export(path, role="student")
        for key, tensor in network().state_dict().items():
            assert torch.equal(loaded.tensors("transformer")[key], tensor)
        assert loaded.manifest["stage"] == "causal"


def test_the_hash_follows_from_the_content_alone(written, tmp_path):
    state = network().state_dict()
    same = write_export(tmp_path / "again", weights={"transformer": state}, manifest=MANIFEST)
    assert same == load_export(written).hash
    state["0.bias"] = state["0.bias"] + 1e-7
    other = write_export(tmp_path / "other", weights={"transformer": state}, manifest=MANIFEST)
    assert other != same


def test_loading_in_another_process_gives_the_same_numbers(written):
    program = (
        "import sys, torch; from pathlib import Path; from torch import nn\n"
        "from launch.export import load_export, load_weights\n"
        "module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 2))\n"
        "load_weights(module, load_export(Path(sys.argv[1])), stem='transformer')\n"
        "values = module(torch.arange(5.0)).tolist()\n"
        "sys.stdout.write(' '.join(value.hex() for value in values))\n"
    )
    command = [sys.executable, "-c", program, str(written)]
    found = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    expected = " ".join(value.hex() for value in network()(torch.arange(5.0)).tolist())
    assert found.stdout == expected


def test_an_export_with_a_head_fills_both_roles_and_one_without_does_not(written, tmp_path):
    with pytest.raises(ExportError, match="must hold a salience head, found a student of stage"):
        load_export(written, role="head")
    weights = {"transformer": network().state_dict(), "head": {"w": torch.ones(3)}}
    write_export(tmp_path / "both", weights=weights, manifest=MANIFEST)
    assert "head" in load_export(tmp_path / "both", role="head").weights
    assert load_export(tmp_path / "both", role="student").manifest["role"] == "student"


def test_a_wrong_role_is_refused_by_name(written):
    with pytest.raises(ExportError, match="must be a teacher, found a student of stage 'causal'"):
        load_export(written, role="teacher")


def test_a_flipped_bit_is_found(written):
    path = written / "transformer.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)
    with pytest.raises(ExportError, match=r"transformer\.safetensors.*SHA-256"):
        load_export(written)


@pytest.mark.parametrize("content", ["", "[1]", '{"format": 99}', '{"format":'])
def test_a_foreign_manifest_is_refused(written, content):
    (written / "manifest.json").write_text(content)
    with pytest.raises(ExportError, match=r"manifest\.json"):
        load_export(written)


def test_a_missing_weights_file_is_named(written):
    (written / "transformer.safetensors").unlink()
    with pytest.raises(ExportError, match=r"transformer\.safetensors' must be readable"):
        load_export(written)


def test_a_path_without_an_export_says_what_lies_there(written, tmp_path):
    with pytest.raises(ExportError, match=r"did you mean '.*causal'"):
        find_export(tmp_path / "causl")
    (tmp_path / "teacher" / "checkpoints" / "step-00000100").mkdir(parents=True)
    with pytest.raises(ExportError, match="a stage that has not finished"):
        find_export(tmp_path / "teacher")
    with pytest.raises(ExportError, match="a stage that has not finished"):
        find_export(tmp_path / "teacher" / "checkpoints" / "step-00000100")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ExportError, match=r"found no manifest\.json"):
        find_export(tmp_path / "empty")


def test_weights_of_another_network_are_refused_by_key_and_shape(written):
    loaded = load_export(written)
    with pytest.raises(ExportError, match=r"0\.weight is \[7, 5\] where the network has \[7, 6\]"):
        load_weights(nn.Sequential(nn.Linear(6, 7), nn.Linear(7, 2)), loaded, stem="transformer")
    with pytest.raises(ExportError, match=r"2\.weight is missing"):
        load_weights(nn.Sequential(*network(), nn.Linear(2, 2)), loaded, stem="transformer")
    with pytest.raises(ExportError, match=r"1\.bias is not in the network"):
        load_weights(nn.Sequential(nn.Linear(5, 7)), loaded, stem="transformer")
    with pytest.raises(ExportError, match=r"must hold head\.safetensors, found only"):
        load_weights(network(), loaded, stem="head")


def is_mapped(tensor: torch.Tensor, file: Path) -> bool:
    """Whether the memory of a tensor is that of a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(word, 16) for word in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return line.endswith(str(file))
    raise AssertionError("every tensor lies somewhere")


def test_mapped_weights_lie_in_the_file_until_they_are_settled(tmp_path):
    wide = {name: tensor.bfloat16() for name, tensor in network().state_dict().items()}
    write_export(tmp_path / "wide", weights={"transformer": wide}, manifest=MANIFEST)
    file, loaded = tmp_path / "wide" / "transformer.safetensors", load_export(tmp_path / "wide")
    with torch.device("meta"):
        trained, frozen = network(), network()
    for module in (trained, frozen):
        map_weights(module, loaded, stem="transformer")
        assert all(is_mapped(tensor, file) for tensor in module.parameters())
        assert {tensor.dtype for tensor in module.parameters()} == {torch.bfloat16}
    settle(trained, torch.device("cpu"))
    for name, tensor in trained.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, wide[name].float())
        assert not is_mapped(tensor, file)
    with torch.no_grad():
        frozen[0].bias.add_(1)
    assert torch.equal(trained[0].bias, wide["0.bias"].float())
    assert load_export(tmp_path / "wide").hash == loaded.hash


def test_a_second_export_replaces_the_first(written):
    head = {"head": {"w": torch.ones(3)}}
    with pytest.raises(ExportError, match="must be writable, found File exists"):
        write_export(written, weights=head, manifest=MANIFEST)
    assert "transformer" in load_export(written).weights
    write_export(written, weights=head, manifest=MANIFEST, replaces=True)
    assert sorted(path.name for path in written.iterdir()) == ["head.safetensors", "manifest.json"]
    assert sorted(path.name for path in written.parent.iterdir()) == ["export"]


def test_what_is_no_export_is_never_deleted(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "thesis").write_text("ten years")
    weights = {"head": {"w": torch.ones(3)}}
    for path in (tmp_path / "inner", tmp_path / "inner" / "new" / ".."):
        for replaces in (False, True):
            with pytest.raises(ExportError, match="must be writable, found File exists"):
                write_export(path, weights=weights, manifest=MANIFEST, replaces=replaces)
        with pytest.raises(ExportError, match="must not exist yet"):
            require_absent(path)
    assert [path.name for path in tmp_path.rglob("*")] == ["inner", "thesis"]


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def full(path: Path, data: bytes) -> None:
        path.write_bytes(data[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(export, "_write_bytes", full)
    with pytest.raises(ExportError, match="No space left on device; free some space"):
        write_export(tmp_path / "e", weights={"w": {"a": torch.ones(2)}}, manifest=MANIFEST)
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_names_every_tensor_with_type_and_shape(written):
    manifest = json.loads((written / "manifest.json").read_text())
    assert manifest["files"]["transformer"]["tensors"]["0.weight"] == ["float32", [7, 5]]
    assert set(manifest["versions"]) == {"pafukv", "torch", "safetensors"}
