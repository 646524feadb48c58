"""From `text.negative` in a config to guided stages that train, are repeated and run dry."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from data.text import build_text
from launch.__main__ import main
from launch.build import build_stage
from launch.dry_run import SCRATCH
from launch.plan import NEGATIVE_STEP, data_steps, negative_folder, plan_steps, run_one
from launch.steps import step_keys
from train.fit import identity

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
GUIDED = ["stages.distill.params.guidance_scale=3.0", "text.negative=a gondola"]
SHORT = [f"stages.{name}.steps=1" for name in ("teacher", "causal")]
SHORT += ["stages.distill.steps=3", "stages.distill.checkpoint_every=2"]
SHORT += ["stages.distill.log_every=1", "stages.distill.params.student_every=1"]


def keys(*words: str) -> dict[str, str]:
    return step_keys(plan_steps(load_config([TINY, *words])))


def test_only_guided_stages_need_the_negative_prompt_and_another_encodes_no_clip():
    plain, guided = keys(), keys(*GUIDED)
    assert guided.keys() - plain.keys() == {NEGATIVE_STEP}
    assert keys("text.negative=x") == plain
    other = keys(*GUIDED, "text.negative=x")
    changed = {name for name in guided if guided[name] != other[name]}
    after_distill = {"salience", "streaming", "control", "evaluate", "report"}
    assert changed == {NEGATIVE_STEP, "distill", *after_distill}
    assert {name for name in plain if plain[name] != guided[name]} == changed - {NEGATIVE_STEP}


def test_it_is_encoded_before_the_clips_are():
    names = [step.name for step in data_steps(load_config([TINY, *GUIDED]))]
    assert names == ["world", "ingest", NEGATIVE_STEP, "encode"]


def test_a_resume_is_bound_to_the_negative_prompt_where_a_stage_is_guided():
    config = load_config([TINY, *GUIDED])
    assert identity(config, "distill", seed=1)["text"]["negative"] == "a gondola"
    assert "negative" not in identity(config, "control", seed=1)["text"]


def test_a_guided_stage_finds_or_makes_it_and_others_do_without(tiny, tmp_path):
    words = [*tiny, *SHORT]
    for name in ("teacher", "causal"):
        assert main(["fit", *words, "--stage", name]) == 0
    build_stage(load_config(words), "distill")
    with pytest.raises(UserError, match=r"needs the encoded text\.negative: .*run `encode` again"):
        build_stage(load_config([*words, *GUIDED]), "distill")
    run_one(load_config(words), "encode")
    assert not negative_folder(load_config(words)).exists()
    run_one(load_config([*words, *GUIDED]), "distill")
    build_stage(load_config([*words, *GUIDED]), "distill")


def test_a_guided_stage_trains_and_is_repeated_bit_for_bit(tiny, tmp_path, capsys):
    run, words = tmp_path / "runs" / "tiny", [*tiny, *SHORT, *GUIDED]
    clips = run / "data" / "latents" / "manifest.json"
    stamp = clips.stat().st_mtime_ns
    assert main(["encode", *words]) == 0
    assert clips.stat().st_mtime_ns == stamp, "no clip is encoded again"
    for name in ("teacher", "causal"):
        assert main(["fit", *words, "--stage", name]) == 0
    assert main(["fit", *words, "--stage", "distill", "--dry-run"]) == 0
    assert not (run / SCRATCH).exists()
    assert main(["fit", *words, "--stage", "distill"]) == 0
    rows = [json.loads(line) for line in (run / "distill" / "metrics.jsonl").open()]
    assert main(["replay", str(run / "distill"), "--step", "3"]) == 0
    replayed = json.loads((run / "distill" / "replay.json").read_text())
    assert replayed["checkpoint"] == "step-00000002"
    assert replayed["together"]["loss/student"] == rows[2]["loss/student"]
    config = load_config(words)
    stage, _ = build_stage(config, "distill")
    assert torch.equal(stage.negative_text, build_text(config.text)("a gondola")[0])
    shutil.rmtree(negative_folder(config))
    capsys.readouterr()
    assert main(["replay", str(run / "distill"), "--step", "3"]) == 2
    assert "run `encode` again" in capsys.readouterr().err
    assert main(["encode", *words, "text.negative=wall"]) == 0
    assert main(["replay", str(run / "distill"), "--step", "3"]) == 2
    assert "negative 'wall' in place of 'a gondola'" in capsys.readouterr().err


def test_the_plan_counts_it_once(capsys):
    assert main(["plan", TINY]) == 0
    plain = capsys.readouterr().out
    assert main(["plan", TINY, *GUIDED]) == 0
    guided = capsys.readouterr().out
    assert "text.negative" not in plain
    assert "for 24 clips, text.negative 1.5 KiB among them" in guided
