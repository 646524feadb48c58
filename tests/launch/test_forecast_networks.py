"""Networks of other sizes than the run's, against a real run in which they work together."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from configs.errors import UserError
from configs.load import load_config, to_dict
from configs.schema import ModelConfig
from launch.__main__ import main
from launch.build import build_stage, new_stage, run_stage
from launch.forecast import forecast
from launch.forecast_knobs import Cluster
from launch.forecast_memory import StageMeter
from launch.forecast_networks import stage_models
from launch.inputs import load_inputs
from launch.measured_train import SHAPES, write_latents
from launch.plan import run_folder
from tests.launch.held import master_tensors, watch
from tests.launch.test_build import BIGGER, exported
from train.engine import SingleEngine, build_engines
from train.flops import count_flops

ROOT = Path(__file__).parents[2]
ONE = Cluster("H100", 1, 1, 0.4)
FIXED = {"prefix_frames": [8], "budgets": [40], "student_steps": 1, "student_every": 1}


@pytest.fixture
def tiny(tmp_path):
    """A run whose `distill` has a teacher, and so a critic, that is larger than the student."""
    config = load_config([*SHAPES["tiny"], f"runs_dir={tmp_path}"])
    config.tracking.wandb = "disabled"
    stage = config.stages["distill"]
    write_latents(config, frames=stage.frames, count=8)
    stage.steps, stage.params = 1, stage.params | FIXED
    stage.inputs = {
        "teacher": exported(config, tmp_path / "t", {"transformer": BIGGER}, role="teacher"),
        "student": exported(config, tmp_path / "s", {"transformer": {}}, role="student"),
    }
    return config


def tensor_bytes(folder: Path) -> int:
    files = [load_file(path) for path in folder.rglob("*.safetensors")]
    return sum(tensor.nbytes for file in files for tensor in file.values())


def test_a_larger_teacher_takes_what_a_real_run_takes(tiny, tmp_path):
    stage, data = build_stage(tiny, "distill")
    stage.engines, held = build_engines(stage.engine_specs(), SingleEngine), {}
    for engine in stage.engines.values():
        watch(engine, held)
    batch = next(iter(data.train_dataloader()))
    with count_flops(stage.modules()) as counter:
        stage.update(batch, 0)
    for engine in stage.engines.values():
        engine._update()  # looks once more: moments are there from the first update on
    meter = StageMeter(tiny, "distill", 1)
    shares = meter.measure().shares
    for network in ("student", "critic"):
        share = shares[network]
        for part in ("parameters", "moments", "averages", "gradients"):
            assert held[network][part] == getattr(share, part), part
    teacher = stage.frozen["teacher"]
    assert shares["teacher"].parameters == sum(p.nbytes for p in teacher.parameters())
    assert shares["critic"].parameters == shares["teacher"].parameters
    assert shares["critic"].parameters > 1.2 * shares["student"].parameters
    (found,) = forecast(tiny, ONE, stage="distill")
    assert found.flops == pytest.approx(counter.total, rel=1e-9)
    assert found.networks == {
        name: sum(p.numel() for p in network.parameters())
        for name, network in {**stage.networks, **stage.frozen}.items()
    }
    assert found.mapped_bytes == tensor_bytes(tmp_path / "t") + tensor_bytes(tmp_path / "s")
    assert found.missing == {}


def test_what_a_run_leaves_on_disk_is_what_was_planned(tiny):
    stage = tiny.stages["distill"]
    stage.steps, stage.checkpoint_every, stage.keep = 3, 1, 1
    meter = StageMeter(tiny, "distill", 1)
    planned = meter.measure().disk
    run_stage(tiny, "distill")
    folder = run_folder(tiny) / "distill"
    assert planned["export"] == tensor_bytes(folder / "export")
    kept = [path for path in (folder / "checkpoints").iterdir() if path.name.startswith("step-")]
    assert kept
    for checkpoint in kept:
        tensors = [master_tensors(file) for file in checkpoint.glob("*.safetensors")]
        found = sum(tensor.nbytes for file in tensors for tensor in file.values())
        assert found == meter.checkpoint_bytes()
    (name,) = [key for key in planned if key.endswith("checkpoints")]
    assert len(kept) <= int(name.split()[0]) == planned[name] // meter.checkpoint_bytes()


def test_a_critic_of_another_size_is_handed_on_within_a_plan(tiny, tmp_path):
    run_stage(tiny, "distill")
    inputs = tiny.stages["distill"].inputs
    streaming = tiny.stages["streaming"]
    own = streaming.inputs = inputs | {"critic": "distill"}
    planned = stage_models(tiny, "streaming", {})
    built = new_stage(tiny, "streaming", load_inputs(tiny, "streaming"), frozen=("teacher",))
    for name, network in {**built.networks, **built.frozen}.items():
        assert planned[name].num_layers == network.num_layers, name
    assert planned["critic"].num_layers > planned["student"].num_layers
    (found,) = forecast(tiny, ONE, stage="streaming")
    files = [Path(own["teacher"]), Path(own["student"]), run_folder(tiny) / "distill" / "export"]
    assert found.mapped_bytes == sum(tensor_bytes(path) for path in files)


def test_an_input_that_is_not_there_counts_as_the_runs_own_or_as_the_model_named(tiny, tmp_path):
    (real,) = forecast(tiny, ONE, stage="distill")
    path = str(tmp_path / "nowhere")
    tiny.stages["distill"].inputs["teacher"] = path
    (own,) = forecast(tiny, ONE, stage="distill")
    assert own.missing == {"teacher": path}
    assert own.networks["teacher"] == own.networks["student"] < real.networks["teacher"]
    larger = ModelConfig(**to_dict(tiny.model) | BIGGER)
    (found,) = forecast(tiny, ONE, stage="distill", like={path: larger})
    assert found == real
    tiny.stages["causal"].inputs["teacher"] = path
    with pytest.raises(UserError, match=r"nowhere must hold the network .* model\.ffn_dim"):
        forecast(tiny, ONE, stage="causal", like={path: larger})


def test_plan_says_what_is_not_there_and_takes_a_size_for_it(tmp_path, capsys):
    teacher = f"{tmp_path}/nowhere"
    words = ["plan", str(ROOT / "configs" / "tiny.yaml"), "--stage", "distill"]
    words.append(f"stages.distill.inputs.teacher={teacher}")
    assert main(words) == 0
    assert f"teacher: {teacher} is not there; counted as the run's own model" in (
        capsys.readouterr().out
    )
    record = tmp_path / "plan.json"
    larger = tmp_path / "larger.yaml"
    sizes = to_dict(load_config(words[1:2]).model) | {"num_layers": 5}
    larger.write_text(f"name: larger\nmodel: {json.dumps(sizes)}\n")
    assert main([*words, "--like", f"{teacher}={larger}", "--json", str(record)]) == 0
    assert "is not there" not in capsys.readouterr().out
    networks = json.loads(record.read_text())["stages"][0]["networks"]
    assert networks["teacher"] == networks["critic"] > 2 * networks["student"]
    assert main([*words, "--like", "teacher"]) == 2
    assert "--like must be PATH=FILE" in capsys.readouterr().err
    assert main([*words, "--like", f"{teacher}/={larger}"]) == 2
    assert f"must name an input that is not there, found ['{teacher}']" in capsys.readouterr().err


def test_a_stage_that_is_still_training_counts_as_not_there(tiny, tmp_path):
    (real,) = forecast(tiny, ONE, stage="distill")
    path = tmp_path / "teacher"
    (path / "checkpoints").mkdir(parents=True)
    tiny.stages["distill"].inputs["teacher"] = str(path)
    (found,) = forecast(tiny, ONE, stage="distill")
    assert found.missing == {"teacher": str(path)}
    assert forecast(
        tiny,
        ONE,
        stage="distill",
        like={str(path): ModelConfig(**to_dict(tiny.model) | BIGGER)},
    ) == [real]
    (path / "checkpoints").rmdir()
    with pytest.raises(UserError, match=r"must hold an export, found no manifest\.json"):
        forecast(tiny, ONE, stage="distill")


def test_an_input_that_is_there_but_cannot_work_is_refused_at_once(tiny, tmp_path):
    wrong = exported(tiny, tmp_path / "x", {"transformer": {"text_dim": 40}}, role="teacher")
    tiny.stages["distill"].inputs["teacher"] = wrong
    with pytest.raises(UserError, match=r"differs in model\.text_dim"):
        forecast(tiny, ONE, stage="distill")
