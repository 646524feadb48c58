"""Imports checked by the programs they come from: diffusers, peft, and our own export."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from diffusers import WanTransformer3DModel
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from launch.__main__ import main
from launch.export import load_export, load_weights
from models.transformer import VideoTransformer
from models.wan_config import diffusers_config
from models.wan_names import native_name
from tests.launch.checkpoints import SMALL, random_weights, write_self_forcing
from tests.launch.exported import write_student
from tests.launch.test_import import assert_equal, bring, refused

CAUSAL = ["name=x", "model.num_layers=2", "model.num_heads=1", "model.head_dim=128"]


def diffusers_model(geometry=SMALL) -> WanTransformer3DModel:
    torch.manual_seed(4)
    model = WanTransformer3DModel.from_config(diffusers_config(geometry))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def imported(path: Path) -> VideoTransformer:
    """The network that a stage or `sample` would build."""
    export = load_export(path)
    model = dict(export.manifest["config"]["model"])
    del model["frames_per_block"]
    network = VideoTransformer(**model | {"patch_size": tuple(model["patch_size"])})
    load_weights(network, export, stem="transformer")
    return network.eval()


@pytest.mark.parametrize("below", ["", "transformer"])
@pytest.mark.parametrize("shard", ["10GB", "200KB"])
@torch.no_grad()
def test_what_diffusers_saves_computes_the_same_here(below, shard, tmp_path):
    geometry = replace(SMALL, num_heads=2, head_dim=24, eps=1e-5, out_channels=4)
    model = diffusers_model(geometry)
    model.save_pretrained(tmp_path / "saved" / below, max_shard_size=shard)
    assert bool(list((tmp_path / "saved").rglob("*.index.json"))) == (shard == "200KB")
    assert bring(tmp_path / "saved", tmp_path / "in", "--role", "teacher") == 0
    weights = {native_name(name): tensor for name, tensor in model.state_dict().items()}
    assert_equal(tmp_path / "in", weights)
    network = imported(tmp_path / "in")
    latents, text, sigma = torch.randn(2, 3, 4, 6, 10), torch.randn(2, 5, 8), torch.rand(2)
    ours = network(latents, sigma[:, None].expand(2, 3), text)
    theirs = model(latents.transpose(1, 2), 1000 * sigma, text, return_dict=False)[0]
    # Same float32 sums in another order.
    torch.testing.assert_close(ours, theirs.transpose(1, 2), rtol=1e-4, atol=2e-5)


def test_a_folder_of_diffusers_that_is_another_model_is_refused(tmp_path, capsys):
    diffusers_model().save_pretrained(tmp_path / "saved")
    path = tmp_path / "saved" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_layers": 30}))
    message = refused(capsys, tmp_path / "saved", tmp_path / "in", "--role", "teacher")
    assert "num_layers 30 where the weights have 2" in message
    path.write_text(json.dumps(config | {"_class_name": "WanVACETransformer3DModel"}))
    message = refused(capsys, tmp_path / "saved", tmp_path / "in", "--role", "teacher")
    assert "found 'WanVACETransformer3DModel'" in message


def longlive(tmp_path: Path, *, dtype=torch.float32, rank: int = 3, alpha: float = 6.0):
    """A base and a LoRA as peft names it, and the weights of both merged by peft itself."""
    base = random_weights(dtype=dtype)
    network = VideoTransformer(**asdict(SMALL)).to(dtype)
    network.load_state_dict(base)
    linears = ["q", "k", "v", "o", "ffn.0", "ffn.2"]
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=linears)
    wrapped = get_peft_model(network, settings)
    torch.manual_seed(5)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    factors = {k: t.clone() for k, t in get_peft_model_state_dict(wrapped).items()}
    write_self_forcing(tmp_path / "base.pt", raw=base)
    torch.save({"generator_lora": factors, "critic_lora": {}, "step": 9}, tmp_path / "lora.pt")
    return base, factors, wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("keep", [False, True])
def test_a_lora_of_longlive_is_merged_as_peft_merges_it(keep, tmp_path):
    base, factors, merged = longlive(tmp_path)
    before = (tmp_path / "base.pt").read_bytes()
    lora = ["--lora", tmp_path / "lora.pt", "--lora-alpha", "6"]
    kept = ["--keep-adapter"] if keep else []
    assert bring(tmp_path / "base.pt", tmp_path / "in", *lora, *kept) == 0
    assert (tmp_path / "base.pt").read_bytes() == before
    export = load_export(tmp_path / "in", role="student")
    for name, tensor in export.tensors("transformer").items():
        # One float32 product and sum in another order.
        torch.testing.assert_close(tensor, merged[name], rtol=1e-5, atol=1e-5)
        has_factors = name.endswith("weight") and name.split(".")[-2] in "qkvo02" and "blo" in name
        assert torch.equal(tensor, base[name]) != has_factors, name
    assert set(export.manifest["parents"]) == {"source", "lora"}
    assert ("adapter" in export.weights) == keep
    if keep:
        names = {f"base_model.model.{name}" for name in export.tensors("adapter")}
        assert names == set(factors)
        lora = export.manifest["lora"]
        assert (lora["rank"], lora["alpha"]) == (3, 6.0)
        assert "self_attn.q" in lora["targets"]


def test_a_merge_keeps_the_dtype_of_the_base(tmp_path):
    _, _, merged = longlive(tmp_path, dtype=torch.bfloat16)
    lora = ["--lora", tmp_path / "lora.pt", "--lora-alpha", "6"]
    assert bring(tmp_path / "base.pt", tmp_path / "in", *lora) == 0
    found = load_export(tmp_path / "in").tensors("transformer")["blocks.1.ffn.2.weight"]
    assert found.dtype == torch.bfloat16
    # peft rounds the product to bfloat16 before it adds; here only the sum is rounded.
    wanted = merged["blocks.1.ffn.2.weight"].float()
    torch.testing.assert_close(found.float(), wanted, rtol=2**-6, atol=2**-6)


def test_parameters_in_the_files_are_merged_as_plain_tensors_are(tmp_path):
    base, factors, _ = longlive(tmp_path)
    lora = ["--lora", tmp_path / "lora.pt", "--lora-alpha", "6"]
    assert bring(tmp_path / "base.pt", tmp_path / "plain", *lora) == 0
    base, factors = (
        {name: torch.nn.Parameter(tensor) for name, tensor in named.items()}
        for named in (base, factors)
    )
    write_self_forcing(tmp_path / "base.pt", raw=base)
    torch.save({"generator_lora": factors}, tmp_path / "lora.pt")
    assert bring(tmp_path / "base.pt", tmp_path / "in", *lora) == 0
    wanted = load_export(tmp_path / "plain").tensors("transformer")
    for name, tensor in load_export(tmp_path / "in").tensors("transformer").items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_lora_that_does_not_fit_is_refused(tmp_path, capsys):
    longlive(tmp_path)
    base, lora, dst = tmp_path / "base.pt", tmp_path / "lora.pt", tmp_path / "in"
    alpha = ["--lora-alpha", "6"]
    assert "--lora needs --lora-alpha" in refused(capsys, base, dst, "--lora", lora)
    assert "must hold a whole network, found a LoRA" in refused(capsys, lora, dst)
    assert "must hold 'generator_lora'" in refused(capsys, base, dst, "--lora", base, *alpha)
    assert "only a --lora has them" in refused(capsys, base, dst, *alpha)
    content = torch.load(lora, weights_only=True)
    name = "base_model.model.blocks.1.ffn.2.lora_A.weight"
    for changes, message in (
        ({name: torch.ones(3, 7)}, "is for [128, 7], found [128, 48]"),
        ({name: torch.ones(4, 48)}, "must have one rank in all layers, found [3, 4]"),
        ({name.replace("ffn.2", "ffn.3"): torch.ones(3, 48)}, "has no tensor or module"),
        ({"scale": torch.ones(3)}, "this layout is unverified"),
    ):
        torch.save({"generator_lora": content["generator_lora"] | changes}, lora)
        assert message in refused(capsys, base, dst, "--lora", lora, *alpha)
    del content["generator_lora"][name]
    torch.save(content, lora)
    assert "found only ['lora_B']" in refused(capsys, base, dst, "--lora", lora, *alpha)


def test_a_published_export_that_was_changed_is_refused(tmp_path, capsys):
    student, out = write_student(tmp_path / "student"), tmp_path / "out"
    assert main(["export", str(student), str(out), "--format", "safetensors"]) == 0
    assert bring(out, tmp_path / "in") == 0
    assert set(load_export(tmp_path / "in", role="student").weights) == {"transformer", "head"}
    message = refused(capsys, out, tmp_path / "again", "--sigmas", "1", "--heads", "2")
    assert "--heads and --sigmas would be ignored" in message
    head = out / "salience_head.safetensors"
    data = bytearray(head.read_bytes())
    data[-1] ^= 1
    head.write_bytes(data)
    assert "must have the SHA-256" in refused(capsys, out, tmp_path / "again")
    head.unlink()
    assert "found no salience_head.safetensors" in refused(capsys, out, tmp_path / "again")


def test_a_student_can_be_sampled_if_a_config_said_how(tmp_path, capsys):
    geometry = replace(SMALL, text_dim=32, in_channels=16, out_channels=16, patch_size=(1, 1, 1))
    source = write_self_forcing(tmp_path / "m.pt", raw=random_weights(geometry))
    config = [*CAUSAL, "model.ffn_dim=48", "model.freq_dim=16", "model.rope_theta=10000"]
    assert bring(source, tmp_path / "bare") == 0
    assert bring(source, tmp_path / "in", "--frames", "12", "--config", *config) == 0
    flags = [
        "--prompt",
        "wheel",
        "--policy",
        "fifo",
        "--budget",
        "40",
        "--frames",
        "4",
        "--device",
        "cpu",
        "--out",
    ]
    assert main(["sample", str(tmp_path / "in"), *flags, str(tmp_path / "x.mp4")]) == 0
    assert (tmp_path / "x.mp4").stat().st_size > 0
    assert main(["sample", str(tmp_path / "bare"), *flags, str(tmp_path / "y.mp4")]) == 2
    assert "import it again with --config FILE" in capsys.readouterr().err
    wrong = [*CAUSAL, "model.ffn_dim=40", "model.freq_dim=16"]
    message = refused(capsys, source, tmp_path / "no", "--config", *wrong)
    assert "ffn_dim 40 where the weights need 48, rope_theta 100.0" in message
    message = refused(
        capsys, source, tmp_path / "no", "--frames-per-block", "3", "--config", *config
    )
    assert "must be model.frames_per_block=2" in message
