"""A step that failed is found again, with the sample and the module that broke it."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from data.shard_writer import ShardSetWriter
from data.shards import ShardSet
from launch.__main__ import main

STEPS = ["stages.teacher.steps=5", "stages.teacher.checkpoint_every=2", "stages.teacher.batch=2"]
STEPS += ["stages.teacher.keep=5", "stages.teacher.log_every=1"]


def poison(latents: Path, key: str) -> None:
    """Write the shards again with an infinite value in every frame of one sample."""
    shards = ShardSet(latents)
    moved = latents.with_name("poisoned")
    with ShardSetWriter(
        moved, samples_per_shard=8, source_hash="poisoned", properties=shards.properties
    ) as writer:
        for index in range(len(shards)):
            entry, members = shards.entry(index), dict(shards.read(index))
            if entry.key == key:
                values = load(members["latents.safetensors"])["latents"]
                values[:, 3, 1, 2] = torch.inf
                members["latents.safetensors"] = save({"latents": values})
            writer.write(entry.key, members, caption=entry.caption, frames=entry.frames)
    shutil.rmtree(latents)
    moved.rename(latents)


def files_below(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_a_poisoned_sample_stops_training_and_is_named_by_the_replay(tiny, tmp_path, capsys):
    run = tmp_path / "runs" / "tiny"
    stage = run / "teacher"
    key = ShardSet(run / "data" / "latents").entry(5).key
    poison(run / "data" / "latents", key)
    capsys.readouterr()
    assert main(["fit", *tiny, "--stage", "teacher", *STEPS]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    (record,) = stage.glob("failure-*.json")
    failed = int(record.stem.removeprefix("failure-"))
    assert f"loss/teacher was nan in step {failed}; nothing was updated" in error
    assert error.endswith(f"python -m launch replay {stage}")
    written = json.loads(record.read_text())
    assert key in written["ranks"][0]["keys"]
    before = files_below(run)
    assert main(["replay", str(stage)]) == 0
    out = capsys.readouterr().out
    assert f"first sample that is not finite: {key}" in out
    assert "of its own tensors: latents" in out
    assert "module whose output is not finite: teacher.patch_embedding\n" in out
    result = json.loads((stage / "replay.json").read_text())
    assert (result["step"], result["failed"]) == (failed, True)
    assert result["checkpoint"] == written["checkpoint"]
    assert [sample["key"] for sample in result["samples"]] == written["ranks"][0]["keys"]
    bad = [sample for sample in result["samples"] if not sample["is_finite"]]
    assert [sample["key"] for sample in bad] == [key]
    assert bad[0]["losses"] == {"teacher": "nan"}
    after = files_below(run)
    assert after.keys() - before.keys() == {"teacher/replay.json"}
    assert all(after[name] == content for name, content in before.items())


def test_a_healthy_step_is_looked_into_and_a_failure_that_does_not_repeat_is_told(
    tiny, tmp_path, capsys
):
    stage = tmp_path / "runs" / "tiny" / "teacher"
    assert main(["fit", *tiny, "--stage", "teacher", *STEPS]) == 0
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").open()]
    assert main(["replay", str(stage), "--step", "4"]) == 0
    result = json.loads((stage / "replay.json").read_text())
    assert (result["checkpoint"], result["failed"]) == ("step-00000002", False)
    assert result["together"]["loss/teacher"] == rows[3]["loss/teacher"], "bit for bit"
    losses = [sample["losses"]["teacher"] for sample in result["samples"]]
    # Samples may differ in the number of frames that count.
    assert min(losses) < rows[3]["loss/teacher"] < max(losses)
    keys = [sample["key"] for sample in result["samples"]]
    record = {"step": 4, "quantity": "loss/teacher", "value": "nan", "ranks": [{"keys": keys}]}
    (stage / "failure-00000004.json").write_text(json.dumps(record))
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(["replay", str(stage)])
    assert end.value.code == 1
    assert "step 4 failed before but is finite here" in capsys.readouterr().out
    record["ranks"] = [{"keys": keys[::-1]}]
    (stage / "failure-00000004.json").write_text(json.dumps(record))
    assert main(["replay", str(stage)]) == 2
    assert "must be repeated on the samples that it failed on" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "must hold the record of a step that failed, found none; give --step N"),
        (["--step", "0"], "--step must lie in 1 .. 6, found 0"),
        (["--step", "7"], "--step must lie in 1 .. 6, found 7"),
    ],
)
def test_a_replay_of_nothing_is_refused(tiny, tmp_path, capsys, words, message):
    stage = tmp_path / "runs" / "tiny" / "teacher"
    stage.mkdir()
    shutil.copy(tiny[0], stage / "config.yaml")
    capsys.readouterr()
    assert main(["replay", str(stage), *words]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_stage_is_refused(tmp_path, capsys):
    assert main(["replay", str(tmp_path)]) == 2
    assert "needs the folder of a stage that has begun" in capsys.readouterr().err
