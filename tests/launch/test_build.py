"""What a stage starts from, and what it leaves besides its checkpoints."""

import json
from pathlib import Path

import pytest
import torch
import wandb

from configs.errors import UserError
from configs.load import load_config, to_dict
from data.shards import ShardSet
from launch.build import STAGES, latents_folder, new_stage, run_stage
from launch.export import load_export, write_export
from launch.forecast_moments import MOMENTS
from launch.forecast_passes import PASSES
from launch.inputs import load_inputs
from launch.measured_train import SHAPES, write_latents
from launch.plan import run_folder
from launch.student import transformer_from_config
from tests.train.wandb_file import offline_runs
from train.kinds import KINDS


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


def exported(config, folder, stems, *, role, seed=0):
    """An export of transformers, by file stem the changes of their sizes."""
    torch.manual_seed(seed)
    models = {stem: to_dict(config.model) | changes for stem, changes in stems.items()}
    weights = {stem: transformer_from_config(model).state_dict() for stem, model in models.items()}
    described = {"model": models["transformer"]} | {
        stem: model for stem, model in models.items() if stem != "transformer"
    }
    sampler = {"sigmas": [1.0, 0.5, 0.0], "renoise": True} if role == "student" else None
    manifest = {"role": role, "stage": "x", "sampler": sampler, "config": described}
    write_export(folder, weights=weights, manifest=manifest)
    return f"{folder}"


BIGGER = {"num_layers": 3, "num_heads": 3, "ffn_dim": 40, "frames_per_block": 7}


@pytest.fixture
def tiny(tmp_path):
    config = load_config([*SHAPES["tiny"], f"runs_dir={tmp_path}"])
    config.tracking.wandb = "disabled"
    return config


def test_a_teacher_that_only_judges_may_be_larger_and_its_critic_is_handed_on(tiny, tmp_path):
    write_latents(tiny, frames=tiny.stages["distill"].frames, count=8)
    inputs = {
        "teacher": exported(tiny, tmp_path / "t", {"transformer": BIGGER}, role="teacher"),
        "student": exported(tiny, tmp_path / "s", {"transformer": {}}, role="student"),
    }
    tiny.stages["distill"].inputs = inputs
    tiny.stages["distill"].steps = 1
    run_stage(tiny, "distill")
    export = load_export(run_folder(tiny) / "distill")
    assert "blocks.2.modulation" in export.tensors("critic")
    assert "blocks.2.modulation" not in export.tensors("transformer")
    tiny.stages["streaming"].inputs = inputs | {"critic": str(run_folder(tiny) / "distill")}
    found = load_inputs(tiny, "streaming")
    network = new_stage(tiny, "streaming", found, frozen=("teacher",)).networks["critic"]
    assert network.num_layers == 3
    assert torch.equal(network.head.head.weight, export.tensors("critic")["head.head.weight"])


def test_a_critic_may_start_from_another_teacher_but_not_from_a_student(tiny, tmp_path):
    paths = {
        "teacher": exported(tiny, tmp_path / "t", {"transformer": BIGGER}, role="teacher"),
        "student": exported(tiny, tmp_path / "s", {"transformer": {}}, role="student", seed=1),
        "critic": exported(tiny, tmp_path / "c", {"transformer": {}}, role="teacher", seed=2),
    }
    tiny.stages["distill"].inputs = paths
    found = load_inputs(tiny, "distill")
    critic = new_stage(tiny, "distill", found, frozen=()).networks["critic"]
    wanted = load_export(Path(paths["critic"])).tensors("transformer")
    assert torch.equal(critic.head.modulation, wanted["head.modulation"])
    tiny.stages["distill"].inputs["critic"] = paths["student"]
    with pytest.raises(UserError, match=r"must hold critic\.safetensors"):
        load_inputs(tiny, "distill")


@pytest.mark.parametrize(
    ("stage", "role", "changes", "wrong"),
    [
        ("causal", "teacher", {"ffn_dim": 40}, "ffn_dim"),
        ("causal", "teacher", {"frames_per_block": 7}, None),
        ("distill", "teacher", {"text_dim": 40}, "text_dim"),
        ("distill", "teacher", {"in_channels": 3}, "in_channels"),
        ("distill", "teacher", {"patch_size": [1, 2, 1]}, "patch_size"),
        ("distill", "student", {"num_heads": 3}, "num_heads"),
        ("distill", "student", {"frames_per_block": 7}, "frames_per_block"),
        ("salience", "teacher", {"num_heads": 3}, None),
        ("salience", "teacher", {"num_layers": 3}, "num_layers"),
    ],
)
def test_what_cannot_work_together_is_refused(tiny, tmp_path, stage, role, changes, wrong):
    path = exported(tiny, tmp_path / "x", {"transformer": changes}, role=role)
    tiny.stages[stage].inputs = {role: path}
    if wrong is None:
        assert load_inputs(tiny, stage)[role].folder == tmp_path / "x"
        return
    with pytest.raises(UserError, match=rf"differs in model\.{wrong};"):
        load_inputs(tiny, stage)


def test_every_kind_of_stage_can_be_checked_trained_and_planned():
    assert KINDS.keys() == STAGES.keys() == PASSES.keys() == MOMENTS.keys()
