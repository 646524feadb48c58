"""What `export` writes for other programs, and that nothing wrong or half-written ever appears."""

import errno
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from launch import formats, layouts, publish, verify
from launch.__main__ import main
from launch.card import model_card
from launch.export import ExportError
from launch.layouts import LAYOUTS
from launch.origin import open_origin
from launch.publish import publish as export
from models.wan_names import diffusers_name, native_name, native_names
from tests.launch.exported import MODEL, POLICY, files_up_to, head, write_student, write_teacher
from tests.models.small import random_transformer

FORMS = tuple(LAYOUTS)
WEIGHTS = {
    name: tensor.detach()
    for name, tensor in random_transformer(patch_size=(1, 2, 2)).state_dict().items()
}


@pytest.fixture
def student(tmp_path) -> Path:
    return write_student(tmp_path / "run" / "tuned")


@pytest.fixture
def dst(tmp_path) -> Path:
    return tmp_path / "out" / "weights"


def assert_nothing_at(dst: Path) -> None:
    assert not dst.parent.exists() or list(dst.parent.iterdir()) == []


@pytest.mark.parametrize("form", FORMS)
def test_an_export_is_verified_and_holds_the_same_bits(form, student, dst):
    said = export(student, dst, form=form, is_verified=True)
    assert said["verified"]["largest_difference"] <= 1e-5
    assert said == json.loads((dst / "pafukv.json").read_text())
    found = {
        "diffusers": lambda: {
            native_name(name): tensor
            for name, tensor in load_file(
                dst / "transformer" / "diffusion_pytorch_model.safetensors"
            ).items()
        },
        "safetensors": lambda: load_file(dst / "diffusion_pytorch_model.safetensors"),
        "self-forcing": lambda: {
            name.removeprefix("model."): tensor
            for name, tensor in torch.load(dst / "model.pt", weights_only=True)[
                "generator_ema"
            ].items()
        },
    }[form]()
    assert set(found) == set(native_names(2)) == set(WEIGHTS)
    assert all(torch.equal(found[name], tensor) for name, tensor in WEIGHTS.items())


def test_diffusers_computes_with_bfloat16_files_what_our_network_computes(student, dst):
    said = export(student, dst, form="diffusers", dtype=torch.bfloat16, is_verified=True)
    assert said["dtypes"] == ["bfloat16"]
    path = dst / "transformer" / "diffusion_pytorch_model.safetensors"
    for name, tensor in load_file(path).items():
        assert torch.equal(tensor, WEIGHTS[native_name(name)].to(torch.bfloat16))


def test_a_large_transformer_is_cut_into_shards_that_diffusers_puts_together(
    student, dst, monkeypatch
):
    monkeypatch.setattr(layouts, "SHARD_SIZE", 30_000)  # bytes
    export(student, dst, form="diffusers", is_verified=True)
    files = sorted(path.name for path in (dst / "transformer").iterdir())
    assert len(files) > 3
    assert "diffusion_pytorch_model.safetensors.index.json" in files


def test_a_teacher_has_no_head_and_is_no_self_forcing_generator(tmp_path, dst):
    teacher = write_teacher(tmp_path / "run" / "teacher")
    with pytest.raises(ExportError, match="must be given a student, found a teacher"):
        export(teacher, dst, form="self-forcing")
    said = export(teacher, dst, form="safetensors")
    assert sorted(path.name for path in dst.iterdir()) == [
        "README.md",
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "pafukv.json",
    ]
    assert said["policy"] is None
    assert "There is no salience head." in (dst / "README.md").read_text()


def test_the_head_comes_with_its_statistics_and_policy(student, dst):
    said = export(student, dst, form="safetensors")
    found = load_file(dst / "salience_head.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in head().state_dict().items())
    assert said["policy"] == POLICY
    assert said["sampler"] == {"sigmas": [1.0, 0.75, 0.0], "renoise": True}
    assert said["config"]["head_log"] is True
    card = (dst / "README.md").read_text()
    assert "| age_weight | 0.07 |" in card
    assert "| budget_tokens | 96 |" in card


def test_a_head_without_a_trained_policy_gets_the_defaults_and_says_so(tmp_path, dst):
    student = write_student(tmp_path / "tuned", policy=None)
    assert export(student, dst, form="safetensors")["policy"]["params"]["age_weight"] == 0.05
    assert "the defaults: no stage was trained under a policy" in (dst / "README.md").read_text()


def test_what_was_not_verified_says_so(student, dst):
    assert export(student, dst, form="self-forcing")["verified"] is None
    assert "Nothing: exported without `--verify`." in (dst / "README.md").read_text()


def test_a_self_forcing_file_is_no_larger_than_its_tensors(student, dst):
    export(student, dst, form="self-forcing")
    assert (dst / "model.pt").stat().st_size < 1.5 * sum(t.nbytes for t in WEIGHTS.values())


def test_files_are_as_readable_as_others_of_the_user(student, dst):
    export(student, dst, form="safetensors")
    assert len({path.stat().st_mode for path in dst.iterdir()}) == 1


def swapped(translate):
    """A mapping that takes self-attention's queries for its keys."""

    def wrong(name: str) -> str:
        other = {"self_attn.q.": "self_attn.k.", "self_attn.k.": "self_attn.q."}
        other |= {"attn1.to_q.": "attn1.to_k.", "attn1.to_k.": "attn1.to_q."}
        for mine, yours in other.items():
            if mine in name:
                return translate(name.replace(mine, yours))
        return translate(name)

    return wrong


def test_names_that_mean_something_else_in_diffusers_are_found_by_outputs(
    student, dst, monkeypatch
):
    for module in (layouts, verify):
        monkeypatch.setattr(module, "diffusers_name", swapped(diffusers_name))
    for module in (formats, verify):
        monkeypatch.setattr(module, "native_name", swapped(native_name))
    for form in FORMS:
        with pytest.raises(ExportError, match="hidden state behind the last layer must be the sa"):
            export(student, dst, form=form, is_verified=True)
        assert_nothing_at(dst)


def test_a_wrong_name_on_the_way_out_alone_is_found_by_bits(student, dst, monkeypatch):
    monkeypatch.setattr(layouts, "diffusers_name", swapped(diffusers_name))
    with pytest.raises(ExportError, match="tensors must come back with the same bits, found 8"):
        export(student, dst, form="diffusers", is_verified=True)
    assert_nothing_at(dst)


def damage_config(folder: Path) -> None:
    path = next(folder.rglob("config.json"))
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"eps": 1e-3}))


def damage_tensors(folder: Path) -> None:
    path = next(folder.rglob("diffusion_pytorch_model.safetensors"))
    tensors = load_file(path)
    last = sorted(tensors)[-1]
    save_file(
        {name: t.double() if name == last else t.clone() for name, t in tensors.items()}, path
    )


def flip_a_bit(folder: Path) -> None:
    path = next(folder.rglob("diffusion_pytorch_model.safetensors"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_config, r"config\.json must say Geometry.*found Geometry"),
        (damage_tensors, r"must hold 69 names with their shapes and dtypes, found 1 that differ"),
        (flip_a_bit, "must come back with the same bits, found 1"),
    ],
)
@pytest.mark.parametrize("form", ["diffusers", "safetensors"])
def test_files_that_say_something_else_fail_and_leave_nothing(
    form, damage, message, student, dst, monkeypatch
):
    layout = LAYOUTS[form]

    def write(folder, *rest):
        layout.write(folder, *rest)
        damage(folder)

    damaged = replace(layout, write=write)
    monkeypatch.setitem(publish.LAYOUTS, form, damaged)
    with pytest.raises(ExportError, match=message):
        export(student, dst, form=form, is_verified=True)
    assert_nothing_at(dst)


def test_a_disk_that_is_full_amid_a_tensor_is_what_torch_says_then(tmp_path):
    write = LAYOUTS["self-forcing"].write
    weights = {"x": torch.zeros(1 << 18)}  # 1 MB
    with files_up_to(300_000), pytest.raises(OSError, match="File too large"):
        write(tmp_path, None, {"raw": weights}, 512)


@pytest.mark.parametrize("form", FORMS)
def test_a_full_disk_is_named_and_leaves_nothing(form, student, dst):
    size = 4096  # less than the weights, more than a config
    with files_up_to(size), pytest.raises(ExportError, match="File too large; free some space"):
        export(student, dst, form=form)
    assert_nothing_at(dst)
    export(student, dst, form=form)


@pytest.mark.parametrize("named", [True, False])
def test_a_source_that_cannot_be_read_is_not_taken_for_a_full_disk(
    student, dst, monkeypatch, named
):
    def broken(*_: object) -> None:
        file = (str(student / "weights.bin"),) if named else ()
        raise OSError(errno.EIO, os.strerror(errno.EIO), *file)

    def opened(path: Path, **more):
        return replace(open_origin(path, **more), read=broken)

    monkeypatch.setattr(publish, "open_origin", opened)
    wanted = "weights.bin" if named else student.name
    with pytest.raises(ExportError, match=rf"{wanted}' must be readable, found Input/output err"):
        export(student, dst, form="safetensors")
    assert_nothing_at(dst)


def test_a_place_that_cannot_be_written_is_named(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match="must be writable, found Not a directory; check the fo"):
        export(student, tmp_path / "file" / "weights", form="safetensors")


def test_what_is_there_stays(student, tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("run", "link", "run/new/.."):
        with pytest.raises(ExportError, match="must not exist yet"):
            export(student, tmp_path / name, form="safetensors")
    assert (student / "export" / "manifest.json").is_file()


def test_what_a_killed_export_left_is_in_nobodys_way(student, dst):
    others = [dst.with_name(name) for name in ("weights.part", ".weights.0123.part")]
    for left in others:
        left.mkdir(parents=True)
        (left / "junk").write_text("")
    export(student, dst, form="safetensors")
    assert not (dst / "junk").exists()
    assert all((left / "junk").exists() for left in others)


def test_a_network_that_wan_cannot_compute_is_refused(tmp_path, dst):
    config = {"model": MODEL | {"rope_theta": 100.0}}
    student = write_student(tmp_path / "tuned", config=config)
    for form in FORMS:
        with pytest.raises(ExportError, match=r"model\.rope_theta must be 10000, .* found 100"):
            export(student, dst, form=form)
    assert_nothing_at(dst)


def test_a_manifest_of_another_network_is_refused_with_the_names(tmp_path, dst):
    config = {"model": MODEL | {"num_layers": 3, "ffn_dim": 64}}
    student = write_student(tmp_path / "tuned", config=config)
    with pytest.raises(UserError, match=r"must hold the 96 tensors .* 27 missing: blocks\.2\."):
        export(student, dst, form="safetensors")


def test_a_run_folder_is_refused_with_its_stages(student, dst):
    with pytest.raises(ExportError, match=r"found a run with the stages \['tuned'\]; give one"):
        export(student.parent, dst, form="safetensors")


def test_weights_that_an_export_does_not_hold_are_refused(student, tmp_path, dst):
    with pytest.raises(ExportError, match=r"--weights raw must be in .* only the ema weights"):
        export(student, dst, form="safetensors", weights="raw")
    older = write_student(tmp_path / "older", weights=None)
    with pytest.raises(ExportError, match="found no word on which of both it holds"):
        export(older, dst, form="safetensors", weights="ema")
    assert export(older, dst, form="self-forcing")["weights"] is None


def test_the_card_says_how_each_form_is_loaded_and_what_was_compared(student, dst):
    said = export(student, dst, form="safetensors")
    found = {"reader": "READER", "tensors": {"ema": 69}, "largest_difference": 2e-7}
    found |= {"tolerance": 1e-5, "videos": [[3, 2, 7]]}
    for form, snippet in {
        "diffusers": "WanTransformer3DModel.from_pretrained(",
        "safetensors": 'load_file("THIS_FOLDER/diffusion_pytorch_model.safetensors")',
        "self-forcing": 'mmap=True)["generator_ema"]',
    }.items():
        card = model_card(said | {"format": form, "verified": found})
        assert snippet in card
        assert "69 tensors came back bit by bit" in card
        assert "compared in one-block mode" in card
        assert "differ by at most 2.0e-07" in card
        assert "teacher at the start: abababababab" in card
        assert "Not stated here." in card
    assert "one-block mode" not in model_card(said | {"role": "teacher", "verified": found})
    assert "--use_ema" in model_card(said | {"format": "self-forcing"})
    assert "--use_ema" not in model_card(said | {"format": "self-forcing", "sets": ["raw"]})


@pytest.mark.parametrize("form", FORMS)
def test_sizes_that_wans_code_has_fixed_are_named_where_it_is_to_read_them(
    form, student, dst, capsys
):
    words = ["export", str(student), str(dst), "--format", form]
    assert main(words) == 0
    refused = "cannot load this: it fixes text_dim and patch_size, where these weights have"
    shown = (capsys.readouterr().out, (dst / "README.md").read_text())
    for text in shown:
        assert (f"{refused} text_dim 8. " in text) == (form != "diffusers")
    said = json.loads((dst / "pafukv.json").read_text())
    said["config"]["model"] |= {"text_dim": 4096}
    assert refused not in model_card(said)
    said["config"]["model"] |= {"patch_size": [1, 4, 2]}
    assert ("have patch_size [1, 4, 2]. " in model_card(said)) == (form != "diffusers")
