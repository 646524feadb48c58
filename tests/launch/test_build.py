"""What a stage leaves besides its checkpoints: an export, and the same in W&B."""

import json

import wandb

from configs.load import load_config
from data.shards import ShardSet
from launch.build import latents_folder, run_stage
from launch.export import load_export
from launch.measured_train import SHAPES, write_latents
from tests.train.wandb_file import offline_runs


def test_a_stage_and_its_export_are_one_run_in_the_mirror(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    wandb.teardown()
    words = [*SHAPES["tiny"], f"runs_dir={tmp_path}", "stages.teacher.steps=2"]
    config = load_config([*words, "tracking.wandb=offline"])
    write_latents(config, frames=12, count=8)
    run_stage(config, "teacher")
    folder = tmp_path / "tiny" / "teacher"
    training, export = offline_runs(folder)
    assert training.id == export.id
    assert (training.name, training.group) == ("tiny/teacher", "tiny")
    assert training.config["data"] == ShardSet(latents_folder(config)).hash
    assert training.config["config"]["stages"]["teacher"]["steps"] == 2
    assert {key: value for key, value in export.config.items() if key != "_wandb"} == {
        key: value for key, value in training.config.items() if key != "_wandb"
    }
    (artifact,) = export.artifacts
    files = {entry.path for entry in artifact.manifest.contents}
    assert files == {path.name for path in (folder / "export").iterdir()}
    metadata = json.loads(artifact.metadata)
    assert (artifact.name, metadata["role"]) == ("tiny-teacher", "teacher")
    assert metadata["hash"] == load_export(folder).hash
    wandb.teardown()
