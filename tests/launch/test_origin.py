"""What `export` takes: the export of a stage, or a checkpoint with what it does not hold itself."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config, save_config
from launch.build import run_stage
from launch.export import load_export
from launch.measured_train import SHAPES, write_latents
from launch.origin import open_origin
from launch.publish import publish
from train.checkpoint import newest_whole

ROOT = Path(__file__).parents[2]
STAGES = ("teacher", "causal", "distill", "salience", "streaming")
CHANGES = ["trainer.accelerator=cpu", "trainer.threads=1", "tracking.wandb=disabled", "name=run"]
CHANGES += ["stages.salience.params.statistics_steps=1", "stages.salience.params.targets=online"]
CHANGES += [
    f"stages.{stage}.{change}" for stage in STAGES for change in ("steps=2", "checkpoint_every=1")
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of two steps per stage; read only."""
    root = tmp_path_factory.mktemp("trained")
    config = load_config([*SHAPES["tiny"], *CHANGES, f"runs_dir={root}"])
    write_latents(config, frames=12, count=8)
    for stage in STAGES:
        (root / "run" / stage).mkdir()
        save_config(config, root / "run" / stage / "config.yaml")
        run_stage(config, stage)
    return root / "run"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    """A copy elsewhere: nothing may depend on where a run was trained."""
    return shutil.copytree(trained, tmp_path / "moved", ignore=shutil.ignore_patterns("data"))


def last(stage: Path) -> Path:
    found = newest_whole(stage / "checkpoints")
    assert found is not None
    return found


@pytest.mark.parametrize("stage", STAGES)
def test_the_last_checkpoint_gives_what_the_export_holds(stage, run):
    export = load_export(run / stage)
    origin = open_origin(last(run / stage))
    dropped = {"format": 1, "versions": {}, "files": {}}
    if stage == "streaming":
        # A checkpoint holds the start of the stream in which it was made: here, the input.
        dropped["steps"] = origin.manifest.pop("steps")
        export.weights["transformer"] = load_export(run / "salience").tensors("transformer")
    assert origin.manifest == {k: v for k, v in export.manifest.items() if k not in dropped}
    found = origin.read(origin.sets[0], None)
    assert found.keys() == export.weights["transformer"].keys()
    for name, tensor in export.weights["transformer"].items():
        assert torch.equal(found[name], tensor), name
    assert (origin.head is None) == ("head" not in export.weights)
    for name, tensor in (origin.head or {}).items():
        assert torch.equal(tensor, export.weights["head"][name]), name


def test_a_stage_folder_means_its_export_or_the_checkpoint_with_what_is_wanted(run):
    assert open_origin(run / "distill").record["kind"] == "export"
    raw, averaged = (open_origin(run / "distill", weights=kind) for kind in ("raw", "ema"))
    assert (raw.record["kind"], averaged.record["kind"]) == ("checkpoint", "export")
    assert (raw.sets, averaged.sets) == (("raw",), ("ema",))
    name = "head.head.weight"
    assert not torch.equal(raw.read("raw", None)[name], averaged.read("ema", None)[name])
    shutil.rmtree(run / "causal" / "export")
    shutil.rmtree(last(run / "causal"))
    unfinished = open_origin(run / "causal")
    assert unfinished.record["name"] == "step-00000001"
    assert unfinished.manifest["steps"] == 1


def test_a_checkpoint_with_both_sets_fills_both_places_of_self_forcing(run, tmp_path):
    publish(last(run / "distill"), tmp_path / "out", form="self-forcing", is_verified=True)
    content = torch.load(tmp_path / "out" / "model.pt", weights_only=True)
    assert set(content) == {"generator", "generator_ema"}
    for key, kind in (("generator", "raw"), ("generator_ema", "ema")):
        expected = open_origin(last(run / "distill"), weights=kind).read(kind, None)
        assert all(torch.equal(content[key][f"model.{name}"], t) for name, t in expected.items())
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "README.md",
        "model.pt",
        "pafukv.json",
    ]


def test_a_frozen_network_comes_from_the_input_as_it_was(run):
    shutil.rmtree(run / "salience")
    with pytest.raises(UserError, match=r"'head' is, .* the head of its input 'student', 'salie"):
        open_origin(last(run / "streaming"))
    shutil.copytree(run / "causal", run / "salience")  # another export in its place
    with pytest.raises(UserError, match="which is not there as it was; bring it back"):
        open_origin(last(run / "streaming"))


def test_an_average_that_was_not_kept_is_refused(run):
    with pytest.raises(UserError, match=r"found only the raw .*optimizers\.student\.ema is above"):
        open_origin(run / "causal", weights="ema")


def test_the_config_beside_a_checkpoint_must_be_its_own(run):
    file = run / "causal" / "config.yaml"
    config = load_config([str(file), "model.ffn_dim=999"])
    save_config(config, file)
    with pytest.raises(UserError, match=r"other values: model\.ffn_dim: \d+ in the checkpoint, 99"):
        open_origin(last(run / "causal"))
    file.unlink()
    with pytest.raises(UserError, match="beside the config of its run, found no"):
        open_origin(last(run / "causal"))


def test_a_damaged_or_half_checkpoint_is_refused(run, tmp_path):
    file = last(run / "causal") / "rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"rank-00000\.safetensors must be the file"):
        publish(last(run / "causal"), tmp_path / "out", form="safetensors")
    half = last(run / "teacher")
    (half / "COMPLETE.json").unlink()
    with pytest.raises(UserError, match=r"must hold a readable COMPLETE\.json"):
        publish(half, tmp_path / "out", form="safetensors")
    with pytest.raises(UserError, match=r"did you mean '.*step-00000002'"):
        open_origin(run / "distill" / "checkpoints" / "step-00000009")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_of_two_ranks_gives_what_they_exported_together(trained, tmp_path):
    """Under ZeRO-3 with small parameters whole on every rank, as by default."""
    root = tmp_path / "runs"
    shutil.copytree(trained / "data", root / "run" / "data")
    shutil.copytree(trained / "teacher", root / "run" / "teacher")
    words = [*SHAPES["tiny"], *CHANGES, f"runs_dir={root}", "trainer.strategy=deepspeed"]
    words += ["trainer.zero_stage=3", "trainer.persistent_params=1000"]
    words += ["stages.causal.optimizers.student.ema=0.5"]
    save_config(load_config(words), root / "plan.yaml")
    (root / "run" / "causal").mkdir()
    shutil.copy(root / "plan.yaml", root / "run" / "causal" / "config.yaml")
    program = (
        "import sys; from configs.load import load_config; from launch.build import run_stage\n"
        "from train.fit import prepare_process; config = load_config([sys.argv[1]])\n"
        "prepare_process(config); run_stage(config, 'causal')\n"
    )
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(tmp_path / "program.py"), str(root / "plan.yaml")]
    own = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=own, check=True, timeout=200, capture_output=True)
    folder = last(root / "run" / "causal")
    assert len(list(folder.glob("rank-*.safetensors"))) == 2
    origin, export = open_origin(folder), load_export(root / "run" / "causal")
    assert origin.sets == ("ema", "raw")
    assert origin.record["ranks"] == 2
    found = origin.read("ema", None)
    assert found.keys() == export.tensors("transformer").keys()
    assert all(torch.equal(found[n], t) for n, t in export.tensors("transformer").items())
