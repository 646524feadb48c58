"""`python -m launch import`: what comes in is what was there, and what does not fit is refused."""

import json
import pickle
import resource
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch.__main__ import main
from launch.export import load_export
from models.wan_config import Geometry, native_config
from tests.launch.checkpoints import (
    SMALL,
    random_weights,
    write_native,
    write_self_forcing,
)


def bring(src: Path, dst: Path, *more: object) -> int:
    return main(["import", str(src), str(dst), *map(str, more)])


def refused(capsys, src: Path, dst: Path, *more: object) -> str:
    """The one sentence with which an import ends; nothing may be left."""
    before = sorted(dst.parent.iterdir())
    assert bring(src, dst, *more) == 2
    assert sorted(dst.parent.iterdir()) == before
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    return message


def assert_equal(export: Path, weights) -> None:
    found = load_export(export).tensors("transformer")
    assert set(found) == set(weights)
    for name, tensor in weights.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def bare(path: Path, weights) -> Path:
    save_file(weights, path)
    return path


def views(weights):
    """The same values as parts of one vector, as sharding libraries keep them, one transposed."""
    whole = torch.cat([tensor.flatten() for tensor in weights.values()])
    parts = whole.split([tensor.numel() for tensor in weights.values()])
    made = {k: part.view(weights[k].shape) for k, part in zip(weights, parts, strict=True)}
    name = "blocks.0.ffn.0.weight"
    return made | {name: weights[name].t().contiguous().t()}


SOURCES = {
    "native": lambda folder, w: write_native(folder / "wan", w),
    "native shards": lambda folder, w: write_native(folder / "wan", w, shards=3),
    "file": lambda folder, w: bare(folder / "wan.anything", w),
    "file of ComfyUI": lambda folder, w: bare(
        folder / "wan.safetensors", {f"model.diffusion_model.{k}": t for k, t in w.items()}
    ),
    "self-forcing": lambda folder, w: write_self_forcing(folder / "m.pt", raw=w),
    "self-forcing ema": lambda folder, w: write_self_forcing(folder / "m.pt", ema=w),
    "folder of a .pt": lambda folder, w: (
        write_self_forcing(folder / "x" / "model.pt", raw=w).parent
    ),
    "ode_init": lambda folder, w: write_self_forcing(folder / "m.pt", model=w),
    "views of one storage": lambda folder, w: write_self_forcing(folder / "m.pt", **views(w)),
    "state dict": lambda folder, w: write_self_forcing(folder / "m.pt", **w),
}


@pytest.mark.parametrize("form", SOURCES)
def test_every_form_comes_in_bit_by_bit(form, tmp_path, capsys):
    weights = random_weights()
    source = SOURCES[form](tmp_path, weights)
    is_student = form in ("self-forcing", "self-forcing ema", "folder of a .pt")
    role = () if is_student else ("--role", "teacher")
    assert bring(source, tmp_path / "in", *role) == 0
    assert_equal(tmp_path / "in", weights)
    manifest = load_export(tmp_path / "in", role="student" if is_student else "teacher").manifest
    sizes = {**asdict(SMALL), "patch_size": [1, 2, 2], "frames_per_block": 3}
    assert manifest["config"]["model"] == sizes
    sigmas = [1.0, 0.9375, 5 / 6, 0.625, 0.0]
    sampler = {"sigmas": pytest.approx(sigmas), "renoise": True}
    assert manifest["sampler"] == (sampler if is_student else None)
    assert len(manifest["parents"]["source"]) == 64
    assert "1 heads of 128 channels" in capsys.readouterr().out


def test_the_average_is_taken_unless_the_other_is_asked_for(tmp_path, capsys):
    raw, ema = random_weights(seed=1), random_weights(seed=2)
    source = write_self_forcing(tmp_path / "m.pt", raw=raw, ema=ema, critic={}, step=7)
    assert bring(source, tmp_path / "a") == 0
    out = capsys.readouterr().out
    assert "weights: ema" in out
    assert "left out: critic, step, generator" in out
    assert_equal(tmp_path / "a", ema)
    assert bring(source, tmp_path / "b", "--weights", "raw") == 0
    assert_equal(tmp_path / "b", raw)
    only = write_self_forcing(tmp_path / "raw.pt", raw=raw)
    message = refused(capsys, only, tmp_path / "c", "--weights", "ema")
    assert "needs 'generator_ema'" in message
    native = write_native(tmp_path / "wan", raw)
    message = refused(capsys, native, tmp_path / "c", "--role", "teacher", "--weights", "raw")
    assert "which hold one set" in message


def test_an_import_of_an_import_keeps_everything(tmp_path, capsys):
    weights = random_weights()
    source = write_self_forcing(tmp_path / "m.pt", raw=weights)
    assert bring(source, tmp_path / "a", "--sigmas", "0.9", "0.5", "--euler") == 0
    assert bring(tmp_path / "a", tmp_path / "b") == 0
    first, second = (load_export(tmp_path / name) for name in "ab")
    assert first.manifest["sampler"] == {"sigmas": [0.9, 0.5, 0.0], "renoise": False}
    for key in ("role", "stage", "sampler", "config", "weights"):
        assert second.manifest[key] == first.manifest[key]
    assert second.manifest["parents"] == {"source": first.hash}
    assert_equal(tmp_path / "b", weights)
    message = refused(capsys, tmp_path / "a", tmp_path / "c", "--frames", "9")
    assert "--frames would be ignored" in message


def test_missing_unknown_and_misshaped_tensors_are_listed(tmp_path, capsys):
    weights = random_weights()
    for name in [name for name in weights if "cross_attn" in name]:
        del weights[name]
    weights["blocks.0.norm3.weight"] = torch.ones(7)
    weights["blocks.0.norm9.weight"] = torch.ones(7)
    message = refused(capsys, bare(tmp_path / "w", weights), tmp_path / "in", "--role", "teacher")
    assert "must hold the 69 tensors" in message
    assert "20 missing: blocks.0.cross_attn." in message
    assert "and 10 more; 1 not in the network: blocks.0.norm9.weight" in message
    assert "1 misshaped: blocks.0.norm3.weight [7] instead of [128]" in message
    tied = random_weights()
    tied["blocks.1.norm3.bias"] = tied["blocks.0.norm3.bias"]
    message = refused(capsys, write_self_forcing(tmp_path / "m.pt", raw=tied), tmp_path / "in")
    assert "2 tied to each other: blocks.0.norm3.bias, blocks.1.norm3.bias" in message


def test_a_config_of_another_size_is_told_from_the_weights(tmp_path, capsys):
    big = Geometry(
        num_layers=40, num_heads=40, head_dim=128, ffn_dim=13824, freq_dim=256, text_dim=4096
    )
    folder = write_native(tmp_path / "wan", random_weights())
    (folder / "config.json").write_text(json.dumps(native_config(big)))
    message = refused(capsys, folder, tmp_path / "in", "--role", "teacher")
    assert "config.json in" in message
    assert (
        "width 5120 where the weights have 128, num_layers 40 where the weights have 2" in message
    )
    (folder / "config.json").write_text(json.dumps({"model_type": "i2v"}))
    assert "found 'i2v'" in refused(capsys, folder, tmp_path / "in", "--role", "teacher")


def test_the_number_of_heads_comes_from_config_flag_or_width(tmp_path, capsys):
    geometry = replace(SMALL, num_heads=4, head_dim=32)
    weights = random_weights(geometry)
    folder = write_native(tmp_path / "wan", weights, geometry=geometry)
    assert bring(folder, tmp_path / "a", "--role", "teacher") == 0
    assert "4 heads of 32 channels, by its config.json" in capsys.readouterr().out
    (folder / "config.json").unlink()
    assert bring(folder, tmp_path / "b", "--role", "teacher", "--heads", "4") == 0
    assert bring(folder, tmp_path / "c", "--role", "teacher") == 0
    found = [load_export(tmp_path / name).manifest["config"]["model"] for name in "abc"]
    assert [(model["num_heads"], model["head_dim"]) for model in found] == [(4, 32)] * 2 + [
        (1, 128)
    ]
    message = refused(capsys, folder, tmp_path / "d", "--role", "teacher", "--heads", "7")
    assert "multiple of the number of heads, found 7" in message


def test_the_role_must_be_known_and_right(tmp_path, capsys):
    weights = random_weights()
    native = write_native(tmp_path / "wan", weights)
    assert "--role must be given" in refused(capsys, native, tmp_path / "in")
    student = write_self_forcing(tmp_path / "m.pt", raw=weights)
    message = refused(capsys, student, tmp_path / "in", "--role", "teacher")
    assert "--role must be that of" in message
    assert "student, found teacher" in message
    message = refused(capsys, native, tmp_path / "in", "--role", "teacher", "--sigmas", "1")
    assert "a teacher has no sampler" in message
    for sigmas in (("1.2", "0.5"), ("0.5", "0.5"), ("0.5", "0")):
        message = refused(capsys, student, tmp_path / "in", "--sigmas", *sigmas)
        assert "must fall from at most 1 to above 0" in message


def cut(path: Path, share: float = 0.6) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])


def test_damaged_files_are_named(tmp_path, capsys):
    weights = random_weights()
    folder = write_native(tmp_path / "wan", weights, shards=3)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    shard = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    cut(shard)
    message = refused(capsys, folder, tmp_path / "in", "--role", "teacher")
    assert "must be a whole safetensors file" in message
    assert shard.name in message
    shard.unlink()
    message = refused(capsys, folder, tmp_path / "in", "--role", "teacher")
    assert f"names 3 shards, which must lie beside it, found no {shard.name}" in message
    shard.write_bytes(whole)
    content = json.loads(index.read_text())
    del content["weight_map"]["head.head.bias"]
    index.write_text(json.dumps(content))
    message = refused(capsys, folder, tmp_path / "in", "--role", "teacher")
    assert "1 differences such as 'head.head.bias'" in message
    index.unlink()
    assert "found 3 candidates" in refused(capsys, folder, tmp_path / "in", "--role", "teacher")
    pt = write_self_forcing(tmp_path / "m.pt", raw=weights)
    cut(pt)
    assert "must be a whole file of torch.save" in refused(capsys, pt, tmp_path / "in")


class Bomb:
    """Unpickled, it would create a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("form", ["archive", "nested", "pickle", "old torch.save"])
def test_a_pickle_that_would_run_code_is_refused_and_does_nothing(form, tmp_path, capsys):
    target, path = tmp_path / "exploded", tmp_path / "m.pt"
    if form == "pickle":
        path.write_bytes(pickle.dumps({"generator": Bomb(target)}))
    else:
        content = {
            "generator": random_weights() | ({"x": Bomb(target)} if form == "nested" else {})
        }
        content |= {} if form == "nested" else {"step": Bomb(target)}
        torch.save(content, path, _use_new_zipfile_serialization=form != "old torch.save")
    message = refused(capsys, path, tmp_path / "in")
    assert (
        "found something that only code could bring back" in message or "a bare pickle" in message
    )
    assert not target.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert target.exists(), "the bomb must be a real one"


def test_a_full_disk_leaves_nothing(tmp_path, capsys):
    source = write_native(tmp_path / "wan", random_weights())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        message = refused(capsys, source, tmp_path / "in", "--role", "teacher")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "must be writable, found" in message
    assert "File too large" in message


def test_what_is_no_text_to_video_transformer_is_called_by_its_name(tmp_path, capsys):
    weights = random_weights()
    alien = weights | {"blocks.0.cross_attn.k_img.weight": torch.ones(2)}
    message = refused(capsys, bare(tmp_path / "i2v", alien), tmp_path / "in", "--role", "teacher")
    assert "an image-to-video model" in message
    vae = bare(tmp_path / "vae", {"encoder.conv1.weight": torch.ones(2)})
    message = refused(capsys, vae, tmp_path / "in", "--role", "teacher")
    assert "such as ['encoder.conv1.weight']" in message
    double = bare(tmp_path / "double", weights | {f"model.{k}": t + 1 for k, t in weights.items()})
    message = refused(capsys, double, tmp_path / "in", "--role", "teacher")
    assert "found several tensors for" in message
    (tmp_path / "empty").mkdir()
    message = refused(capsys, tmp_path / "empty", tmp_path / "in", "--role", "teacher")
    assert "found nothing" in message
    message = refused(capsys, tmp_path / "emty", tmp_path / "in", "--role", "teacher")
    assert "did you mean" in message
    (tmp_path / "text").write_text("hello, this is no checkpoint")
    message = refused(capsys, tmp_path / "text", tmp_path / "in", "--role", "teacher")
    assert "found neither" in message


def test_dst_is_never_overwritten(tmp_path, capsys):
    source = write_native(tmp_path / "wan", random_weights())
    assert bring(source, tmp_path / "in", "--role", "teacher") == 0
    (tmp_path / "in" / "thesis").write_text("ten years")
    message = refused(capsys, source, tmp_path / "in", "--role", "teacher")
    assert "must not exist yet" in message
    assert bring(source, tmp_path / "in" / "new" / "..", "--role", "teacher") == 2
    assert "must not exist yet" in capsys.readouterr().err
    assert (tmp_path / "in" / "thesis").exists()
