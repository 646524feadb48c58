"""`python -m launch sample` follows what the stage behind an export has trained, and says so."""

import json
from pathlib import Path

import pytest
import torch

from configs.load import load_config
from data.codec import TransformCodec
from data.video import read_video
from launch.__main__ import main
from launch.benchmark import peak_allocated
from launch.build import export_manifest, new_stage
from launch.export import MANIFEST, load_export, write_export
from launch.student import in_precision, load_student
from models.flow import sampling_sigmas, shift_of
from models.kv_cache import KVCache
from models.kv_policies import build_policy
from models.rollout import NoiseSource, generate_blocks

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
TRAINED = [
    "trainer.precision=bf16",
    "stages.distill.params.student_shift=3",
    "stages.streaming.params.policy_params={age_weight: 0.07}",
    "stages.streaming.params.budget_tokens=48",
    "stages.streaming.params.sink_frames=2",
    "stages.streaming.params.time=relative",
    "stages.streaming.params.max_lag=9",
    "stages.streaming.params.student_steps=3",
]


@pytest.fixture(scope="module")
def exports(tmp_path_factory) -> Path:
    """A folder per student stage of the run `tiny`, of fresh weights; read only."""
    config = load_config([TINY, *TRAINED])
    root = tmp_path_factory.mktemp("exports")
    parents = {"causal": None, "distill": "causal", "salience": "distill", "streaming": "salience"}
    for name, parent in parents.items():
        inputs = {} if parent is None else {"student": load_export(root / parent)}
        frozen = {"salience": ("student",), "streaming": ("head",)}.get(name, ())
        stage = new_stage(config, name, {}, frozen=frozen, is_fresh=True)
        networks = {**stage.networks, **stage.frozen}
        torch.manual_seed(0)
        torch.nn.init.normal_(networks[stage.exported["transformer"]].head.head.weight, std=0.1)
        weights = {stem: networks[own].state_dict() for stem, own in stage.exported.items()}
        manifest = export_manifest(config, stage, name, inputs)
        write_export(root / name / "export", weights=weights, manifest=manifest)
    return root


def sample(folder: Path, out: Path, *flags: str, frames: int = 8) -> int:
    words = ["--prompt", "red", "--frames", str(frames), "--out", str(out), "--device", "cpu"]
    return main(["sample", str(folder), *words, *flags])


def used(out: Path) -> dict[str, tuple[object, str]]:
    """Value and source of each setting, from the record beside a video."""
    record = json.loads(out.with_name(f"{out.name}.json").read_text())["settings"]
    return {name: (entry["value"], entry["source"]) for name, entry in record.items()}


def changed(export: Path, to: Path, **entries: object) -> Path:
    """A copy of an export whose manifest has other entries."""
    made = load_export(export)
    write_export(to, weights=made.weights, manifest=made.manifest | entries)
    return to


def test_a_streaming_student_is_sampled_as_it_was_trained(exports, tmp_path, capsys):
    out, own = tmp_path / "x.mp4", "from the checkpoint"
    assert sample(exports / "streaming", out) == 0
    assert used(out) == {
        "policy": ("salience", own),
        "age_weight": (0.07, own),
        "redundancy_weight": (0.0, own),
        "weights": ([1.0, 0.0, 0.0], own),
        "budget_tokens": (48, own),
        "sink_frames": (2, own),
        "recent_frames": (2, own),
        "time": ("relative", own),
        "max_lag": (9, own),
        "sigmas": (sampling_sigmas(3, 5.0), own),
        "renoise": (True, own),
        "precision": ("bf16", own),
    }
    record = json.loads((tmp_path / "x.mp4.json").read_text())
    assert (record["seed"], record["scale"], record["wan"]) == (0, 1, None)
    told, end = capsys.readouterr().out.splitlines()
    assert told.startswith("from the checkpoint: policy salience, age_weight 0.07,")
    assert ", 48 tokens per layer cached, " in end


def test_what_is_given_wins_and_the_rest_stays(exports, tmp_path, monkeypatch, capsys):
    out, made = tmp_path / "x.mp4", []
    create = KVCache.__init__

    def watched(self, **more):
        made.append((more["policy"], more["spec"]))
        create(self, **more)

    monkeypatch.setattr(KVCache, "__init__", watched)
    flags = ["--param", "weights=[1,1,1]", "--budget", "40", "--max-lag", "8", "--steps", "2"]
    assert sample(exports / "streaming", out, *flags, "--precision", "fp32") == 0
    ((policy, spec),) = made
    assert (list(policy.weights), policy.age_weight) == ([1, 1, 1], 0.07)
    assert (spec.budget_tokens, spec.sink_frames, spec.recent_frames) == (40, 2, 2)
    assert (spec.time, spec.max_lag) == ("relative", 8)
    settings = used(out)
    given = {name for name, (_, source) in settings.items() if source == "given"}
    assert given == {"weights", "budget_tokens", "max_lag", "sigmas", "precision"}
    assert settings["sigmas"][0] == sampling_sigmas(2, 5.0)
    line = capsys.readouterr().out.splitlines()[0]
    assert line == (
        "given: weights [1, 1, 1], budget_tokens 40, max_lag 8, sigmas [1, 0.8333, 0], "
        "precision fp32"
    )


def test_another_policy_has_parameters_of_its_own(exports, tmp_path):
    out = tmp_path / "x.mp4"
    assert sample(exports / "streaming", out, "--policy", "norm") == 0
    settings = used(out)
    assert settings["policy"] == ("norm", "given")
    assert settings["age_weight"] == (build_policy("norm").age_weight, "by default")
    assert settings["budget_tokens"] == (48, "from the checkpoint")


def test_without_a_policy_the_defaults_are_used_and_said(exports, tmp_path, capsys):
    out = tmp_path / "x.mp4"
    assert sample(exports / "salience", out, "--budget", "40") == 0
    settings = used(out)
    default = {name for name, (_, source) in settings.items() if source == "by default"}
    assert default == {
        *("policy", "age_weight", "redundancy_weight", "weights"),
        *("sink_frames", "recent_frames", "time", "max_lag"),
    }
    assert (settings["sink_frames"][0], settings["time"][0]) == (1, "relative")
    assert settings["max_lag"][0] == 11
    text = capsys.readouterr().out
    assert "by default, as the checkpoint names no cache policy: policy salience, " in text


def test_what_an_export_for_others_says_of_an_untried_head_is_not_taken_for_trained(
    exports, tmp_path
):
    policy = {"name": "salience", "params": {"age_weight": 0.3}}
    export = changed(exports / "salience", tmp_path / "a", policy=policy)
    assert sample(export, tmp_path / "x.mp4", "--budget", "40") == 0
    settings = used(tmp_path / "x.mp4")
    assert settings["policy"] == ("salience", "by default")
    assert settings["age_weight"] == (build_policy("salience").age_weight, "by default")


def test_without_a_policy_somebody_must_name_the_budget(exports, tmp_path, capsys):
    assert sample(exports / "distill", tmp_path / "x.mp4", "--policy", "fifo") == 2
    error = capsys.readouterr().err
    assert "--budget must be given, in tokens per layer" in error
    assert "a frame has 8 tokens" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("word", ["age_weight=[", "age_weight=${oc.env:NOWHERE}"])
def test_a_value_that_cannot_be_read_is_named(exports, tmp_path, capsys, word):
    assert sample(exports / "streaming", tmp_path / "x.mp4", "--param", word) == 2
    assert f"--param must be KEY=VALUE with a YAML value, got {word!r}" in capsys.readouterr().err


def test_a_stage_that_leaves_the_student_alone_hands_on_its_policy(exports):
    config = load_config([TINY, *TRAINED])
    inputs = {"student": load_export(exports / "streaming")}
    stage = new_stage(config, "salience", {}, frozen=("student",), is_fresh=True)
    manifest = export_manifest(config, stage, "salience", inputs)
    assert manifest["policy"] == inputs["student"].manifest["policy"]
    assert manifest["sampler"] == inputs["student"].manifest["sampler"]


def test_a_lag_that_absolute_time_ignored_is_not_taken_for_trained(exports, tmp_path):
    policy = load_export(exports / "streaming").manifest["policy"] | {"time": "absolute"}
    export = changed(exports / "streaming", tmp_path / "a", policy=policy)
    assert sample(export, tmp_path / "x.mp4", "--time", "relative") == 0
    assert used(tmp_path / "x.mp4")["max_lag"] == (11, "by default")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_budgets": [40, 56]}, r"have no fields but .*, found ['layer_budgets']"),
        ({"params": {"age_wieght": 1.0}}, "did you mean 'age_weight'"),
        ({"name": "salient"}, "choose one of"),
        ({"budget_tokens": 24}, "must hold sink and recent frames"),
    ],
)
def test_a_policy_that_cannot_be_followed_is_refused(exports, tmp_path, capsys, fields, message):
    policy = load_export(exports / "streaming").manifest["policy"] | fields
    export = changed(exports / "streaming", tmp_path / "a", policy=policy)
    assert sample(export, tmp_path / "x.mp4") == 2
    error = capsys.readouterr().err
    for part in message.split(".*"):
        assert part in error
    if "layer_budgets" in fields:
        assert str(export / MANIFEST) in error
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_other_noise_levels_keep_the_shift_of_training(exports, tmp_path):
    for flags, wanted in (
        (["--steps", "4"], sampling_sigmas(4, 3.0)),
        (["--shift", "7"], sampling_sigmas(2, 7.0)),
    ):
        out = tmp_path / "x.mp4"
        assert sample(exports / "distill", out, "--policy", "fifo", "--budget", "40", *flags) == 0
        assert used(out)["sigmas"] == (wanted, "given")


@pytest.mark.parametrize("shift", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("num_steps", [2, 3, 50])
def test_the_shift_of_a_schedule_is_found(num_steps, shift):
    assert shift_of(sampling_sigmas(num_steps, shift)) == shift


@pytest.mark.parametrize("sigmas", [[1.0, 0.0], [1.0, 0.9, 0.2, 0.0], [0.9, 0.5, 0.0]])
def test_other_noise_levels_have_no_shift(sigmas):
    assert shift_of(sigmas) is None


def roll(student, precision: str) -> tuple[torch.Tensor, KVCache]:
    """Latents of four blocks, and the cache behind them."""
    network = in_precision(student.network, precision)
    spec = student.cache_spec(budget_tokens=40, preallocate=True)
    seeds = torch.tensor([3])
    cache = student.new_cache(build_policy("salience"), seeds, spec=spec)
    text = torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(1))
    blocks = generate_blocks(
        network,
        text,
        cache=cache,
        noise=NoiseSource(seeds),
        num_frames=8,
        latent_shape=student.latent_shape,
        sampler=student.sampler,
    )
    with torch.no_grad():
        return torch.cat(list(blocks), dim=1), cache


def test_bfloat16_halves_weights_and_cache_and_stays_near(exports):
    found, peaks = {}, {}
    for precision in ("fp32", "bf16"):
        student = load_student(exports / "streaming")
        video, cache = roll(student, precision)
        held = {part.dtype for layer in cache.layers for part in layer.parts.values()}
        assert held == {torch.float32 if precision == "fp32" else torch.bfloat16}
        assert video.dtype == torch.float32
        found[precision] = video, cache.num_bytes
        weights = sum(p.numel() * p.element_size() for p in student.network.parameters())
        peaks[precision] = weights + peak_allocated(lambda s=student, p=precision: roll(s, p))
    assert found["bf16"][1] * 2 == found["fp32"][1]
    # Norms, modulation and the latents stay in float32.
    assert peaks["bf16"] < 0.7 * peaks["fp32"]
    exact, rounded = found["fp32"][0], found["bf16"][0]
    difference = (exact - rounded).square().mean().sqrt() / exact.square().mean().sqrt()
    assert 0 < difference < 0.05


def test_bfloat16_computes_what_autocast_computed_in_training(exports):
    student = load_student(exports / "streaming")
    with torch.autocast("cpu", dtype=torch.bfloat16, cache_enabled=False):
        trained, _ = roll(student, "fp32")
    video, _ = roll(student, "bf16")
    assert torch.equal(video, trained)


def test_the_codec_keeps_its_own_precision(exports, tmp_path, monkeypatch):
    decode, seen = TransformCodec.decode_chunks, []

    def watched(self, blocks):
        for frames in decode(self, blocks):
            seen.append((frames.dtype, torch.is_autocast_enabled("cpu")))
            yield frames

    monkeypatch.setattr(TransformCodec, "decode_chunks", watched)
    assert sample(exports / "streaming", tmp_path / "x.mp4", "--precision", "bf16") == 0
    assert set(seen) == {(torch.float32, False)}
    assert read_video(tmp_path / "x.mp4").shape == (8, 32, 64, 3)
