"""A run whose few-step student is trained through adapters."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from launch.__main__ import main
from launch.export import Export, ExportError, load_export
from launch.origin import open_origin
from train.checkpoint import newest_whole

FEW_STEPS = ["stages.teacher.steps=1", "stages.causal.steps=1", "stages.distill.steps=2"]
LAYERS = ("self_attn.v", "ffn.0")
LORA = [
    "stages.distill.lora.rank=3",
    "stages.distill.lora.alpha=5",
    f"stages.distill.lora.targets=[{','.join(LAYERS)}]",
    "stages.distill.params.student_every=1",
    "stages.distill.optimizers.student.lr=0.05",
    "stages.distill.optimizers.critic.lr=0.05",
]


def parts(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path / "export" / "transformer.safetensors")


def check_what_the_checkpoint_gives(saved: Path, export: Export) -> None:
    """The average of the student and of nothing else, from a checkpoint without what was frozen."""
    from_checkpoint, from_export = open_origin(saved), open_origin(export.folder)
    assert (from_checkpoint.sets, from_export.sets) == (("ema", "raw"), ("ema",))
    average, plain = (from_checkpoint.read(kind, None) for kind in ("ema", "raw"))
    expected = from_export.read("ema", None)
    assert average.keys() == plain.keys() == expected.keys()
    assert all(torch.equal(average[name], expected[name]) for name in expected)
    moved = {name for name in plain if not torch.equal(plain[name], expected[name])}
    assert moved == {f"blocks.{n}.{name}.weight" for n in (0, 1) for name in LAYERS}
    found, wanted = (origin.read_adapters("ema") for origin in (from_checkpoint, from_export))
    assert found.keys() == wanted.keys() == {"transformer", "critic"}
    for network, factors in wanted.items():
        assert found[network].keys() == factors.keys()
        assert all(torch.equal(found[network][name], value) for name, value in factors.items())
    name = "blocks.0.ffn.0.lora_B.weight"
    assert torch.equal(wanted["transformer"][name], export.tensors("adapter")[name] * (5 / 3))
    base = saved.parents[2] / "causal" / "export"
    base.rename(base.with_name("elsewhere"))
    with pytest.raises(ExportError, match="begins with, the transformer of its input 'student'"):
        open_origin(saved)
    base.with_name("elsewhere").rename(base)


def test_adapters_are_trained_exported_merged_and_alone_and_the_next_stage_goes_on(tiny, tmp_path):
    run = tmp_path / "runs" / "tiny"
    words = [*tiny, *FEW_STEPS, *LORA]
    for name in ("teacher", "causal", "distill"):
        assert main(["fit", *words, "--stage", name]) == 0
    export = load_export(run / "distill")
    assert set(export.weights) == {"transformer", "critic", "adapter", "critic_adapter"}
    assert export.manifest["lora"]["rank"] == 3
    whole = load_export(run / "causal")
    assert (set(whole.weights), whole.manifest["lora"]) == ({"transformer"}, None)
    for base, merged, adapter in (
        ("causal", "transformer", "adapter"),
        ("teacher", "critic", "critic_adapter"),
    ):
        before, found, factors = parts(run / base), export.tensors(merged), export.tensors(adapter)
        assert found.keys() == before.keys()
        for name, weight in before.items():
            layer = name.removesuffix(".weight")
            if f"{layer}.lora_B.weight" in factors:
                first, second = (factors[f"{layer}.lora_{part}.weight"] for part in "AB")
                assert first.shape[0] == 3
                assert not torch.equal(found[name], weight)
                torch.testing.assert_close(found[name], weight + 5 / 3 * (second @ first))
            else:
                assert torch.equal(found[name], weight), f"{name} was frozen"
        assert len(factors) == 2 * 2 * 2
    saved = newest_whole(run / "distill" / "checkpoints")
    held = sum(t.numel() for t in load_file(saved / "rank-00000.safetensors").values())
    assert held < sum(t.numel() for t in before.values()), "one base would be more than all of it"
    check_what_the_checkpoint_gives(saved, export)
    more = ["stages.control.lora.rank=2", "stages.control.params.student_every=1"]
    assert main(["fit", *words, *more, "--stage", "control", "--dry-run"]) == 0


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stages.distill.lora.targets=[self_attn.w]", "stages.distill.lora.targets must be ends"),
        ("stages.distill.lora.networks=[teacher]", "networks must be one of ['student', 'critic']"),
        ("stages.causal.lora.rank=2", "a 'causal' stage trains whole networks"),
        ("stages.distill.lora.rnk=2", "did you mean 'rank'?"),
        ("stages.distill.lora.rank=0", "stages.*.lora.rank must be above 0, found 0"),
    ],
)
def test_adapters_that_cannot_be_are_refused_before_anything_runs(
    tiny, tmp_path, capsys, setting, words
):
    assert main(["run", *tiny, setting]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "runs" / "tiny" / "teacher").exists()


def test_a_missing_library_is_named_with_what_installs_it(tiny, capsys, monkeypatch):
    monkeypatch.setattr("train.lora.find_spec", lambda name: None)
    assert main(["show", *tiny, "stages.distill.lora.rank=2"]) == 2
    assert "pip install -e '.[wan]'" in capsys.readouterr().err
