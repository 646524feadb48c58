"""Evaluation on a world of two gondolas, with students that were never trained."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import UserError
from configs.load import to_dict
from configs.schema import (
    EvaluateConfig,
    ModelConfig,
    RunConfig,
    SourceConfig,
    StageConfig,
    TrainerConfig,
    WorldConfig,
)
from launch import evaluate as evaluation
from launch.arena import check_budgets, load_arena
from launch.cache_forms import FORMS
from launch.contest import Contestant, Job, contestants, plan_jobs
from launch.evaluate import Record, choose_age_weights, evaluate
from launch.export import write_export
from launch.geometry import network_config, token_grid
from launch.held_out import load, prepare
from launch.report import write_report
from launch.rollouts import Rollout, measure_rollout, spread_over_seeds, summarise
from launch.student import head_from_config, transformer_from_config
from launch.workers import run_jobs
from models.kv_policies import POLICIES
from models.kv_policy import ScoredPolicy

CLOCK = "frames_per_second"
BOTH = {"causal": True, "streaming": True}


ROOT = Path(__file__).parents[2]


def make_config(folder: Path) -> RunConfig:
    return RunConfig(
        name="small",
        runs_dir=str(folder),
        source=SourceConfig(frames=8, world=WorldConfig(identities=2, period=4, frames=8)),
        model=ModelConfig(num_layers=2, num_heads=1, head_dim=8, ffn_dim=16, freq_dim=8),
        stages={
            "teacher": StageConfig(kind="teacher", steps=1, batch=1, frames=8),
            "head": StageConfig(
                kind="salience", steps=1, batch=1, frames=8, inputs={"teacher": "teacher"}
            ),
            "later": StageConfig(kind="distill", steps=1, batch=1, frames=8),
        },
        evaluate=EvaluateConfig(
            stages=["head", "later"],
            frames=[12, 16],
            prefix_frames=4,
            budgets=[32, 40],
            seeds=[3, 5],
            clips_per_seed=2,
            tune_seed=7,
            tune_clips=2,
            forms=["all"],
            age_weights=[0.0, 0.1],
            quality_steps=[1],
            steps=1,
            contenders=["full", "sink_window", "position_prior", "salience"],
            long_budgets=[40],
            long_clips_per_seed=1,
            videos=1,
        ),
        trainer=TrainerConfig(accelerator="cpu", threads=1),
    )


def export_stage(config: RunConfig, name: str, *, role: str, with_head: bool = False) -> Path:
    torch.manual_seed(len(name))
    network = transformer_from_config(network_config(config)["model"])
    torch.nn.init.normal_(network.head.head.weight, std=0.1)
    weights = {"transformer": network.state_dict()}
    if with_head:
        head = head_from_config(network_config(config))
        torch.nn.init.normal_(head.place)
        weights["head"] = head.state_dict()
    manifest = {
        "role": role,
        "stage": name,
        "train_seed": config.seed,
        "sampler": {"sigmas": [1.0, 0.0], "renoise": name == "later"},
        "config": {
            "model": to_dict(config.model),
            "head": to_dict(config.head),
            "head_log": False,
            "head_block_len": 0,
            "grid": list(token_grid(config)),
            "codec": to_dict(config.codec),
            "text": to_dict(config.text),
            "size": config.source.size,
            "fps": 8,
            "every": 1,
            "frames": 8,
        },
    }
    folder = Path(config.runs_dir) / config.name / name
    write_export(folder / "export", weights=weights, manifest=manifest)
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return make_config(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def ckpts(config: RunConfig) -> list[Path]:
    export_stage(config, "teacher", role="teacher")
    return [
        export_stage(config, "head", role="student", with_head=True),
        export_stage(config, "later", role="student"),
    ]


@pytest.fixture(scope="module")
def run(config: RunConfig, ckpts: list[Path]) -> Path:
    """Run folder after an evaluation that nobody disturbed."""
    folder = Path(config.runs_dir) / config.name
    evaluate(config, ckpts, folder / "evaluate")
    return folder


def test_an_evaluation_computes_with_the_threads_of_its_run(config, ckpts, tmp_path):
    before = torch.get_num_threads()
    torch.set_num_threads(config.trainer.threads + 1)
    try:
        with pytest.raises(UserError):
            evaluate(config, [tmp_path / "absent"], tmp_path / "out")
        assert torch.get_num_threads() == config.trainer.threads
    finally:
        torch.set_num_threads(before)


HOLD = """
import sys
from pathlib import Path
from launch.lock import hold_lock
with hold_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_that_another_evaluation_writes_is_refused(config, ckpts, tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=f"found process {holder.pid}"):
            evaluate(config, ckpts, tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
        holder.communicate()


def without_clock(path: Path) -> str:
    def drop(value: object) -> object:
        if isinstance(value, dict):
            return {key: drop(item) for key, item in value.items() if key != CLOCK}
        return [drop(item) for item in value] if isinstance(value, list) else value

    return json.dumps(drop(json.loads(path.read_text())))


def test_every_policy_is_compared_with_all_fields(run: Path):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    rows = [row for row in results["policies"] if row["stage"] == "head" and row["frames"] == 12]
    names = {row["policy"] for row in rows}
    variants = {"random_once", "salience_redundancy", "untrained_head", "inverted_head"}
    assert names == {*POLICIES, *variants}
    for row in rows:
        assert 0 <= row["identity_accuracy"]["mean"] <= 1
        assert len(row["accuracy_per_revolution"]) == 2  # 8 generated frames, 4 per revolution
        assert row["rollout_seeds"] == [3, 5]
        assert row["kv_bytes"] == row["held_tokens"] * 2 * 2 * 8 * 4  # 2 layers, k and v, 8 x 4 B
        assert row["held_tokens"] <= row["budget_tokens"]
        assert row["budget_share"] == row["budget_tokens"] / 64
        policy = POLICIES.get(row["policy"])
        if policy is not None:
            assert (row["age_weight"] is not None) == issubclass(policy, ScoredPolicy)
        assert {"position_error", "background_drift", "pixel_error", CLOCK} <= set(row)
    budgets = {row["budget_tokens"] for row in rows if row["policy"] == "salience"}
    assert budgets == {32, 40}
    weights = [row["weights"] for row in rows if row["policy"] == "salience"]
    assert [1.0, 1.0, 1.0] in weights
    assert next(r for r in rows if r["policy"] == "full")["budget_tokens"] == 12 * 8


def test_other_forms_of_a_cache_take_no_more_bytes_than_the_plain_one(run: Path):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    rows = results["forms"]
    assert {(row["policy"], row["form"]) for row in rows} == {
        (policy, form) for policy in ("sink_window", "salience") for form in FORMS
    }
    for row in rows:
        plain = row["budget_tokens"] * 2 * 2 * 8 * 4
        assert row["kv_bytes"] <= plain
        if row["form"] in ("int8", "int4"):
            assert row["held_tokens"] == row["budget_tokens"]
            assert row["kv_bytes"] < 0.6 * plain
        if row["form"] in ("pyramid", "entropy", "prefix", "ispa"):
            # A budget is a whole number of tokens in every layer.
            assert row["kv_bytes"] > plain - 2 * 2 * 2 * 8 * 4
        assert (row["host_bytes"] > 0) == (row["form"] == "offload")
        assert row["error_to_full"] > 0
    whole = [row for row in results["policies"] if row["stage"] == "head" and row["frames"] == 12]
    assert {row["policy"] for row in whole if row["error_to_full"] == 0} == {"full"}


def test_other_sections_are_there(run: Path):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    assert {row["stage"] for row in results["quality"]} == {"head", "later"}
    assert all(0 <= row["self_consistency"]["mean"] <= 1 for row in results["prefix_free"])
    assert set(results["head"]["spearman"]["head"]) == {"later", "within", "earlier"}
    assert len(results["head"]["recall_at_budget"]["head"]["later"]) == 2
    by_frame = results["head"]["target_by_frame"]["head"]
    assert [len(means) for means in by_frame.values()] == [8, 8, 8]
    assert by_frame["later"][-1] is None  # no later block
    assert by_frame["earlier"][0] is None
    assert all(isinstance(mean, float) for mean in by_frame["within"])
    baselines = results["head"]["baselines"]
    assert set(baselines) == {"head"}
    assert set(baselines["head"]) == {"position", "key_norm", "value_norm"}
    for parts in baselines["head"].values():
        assert set(parts) == {"later", "within", "earlier"}
        for scores in parts.values():
            assert all(-1 <= value <= 1 for value in scores["spearman"])
            assert all(0 <= value <= 1 for value in scores["recall"])
            assert [len(values) for values in scores.values()] == [2, 2]
    assert {row["frames"] for row in results["policies"]} == {12, 16}
    assert {row["age_weight"] for row in results["tuning"]} == {0.0, 0.1}


def test_student_without_a_head_borrows_that_of_the_checkpoint_before(run: Path):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    rows = [r for r in results["policies"] if r["stage"] == "later" and r["policy"] == "salience"]
    assert rows
    assert all(row["head_stage"] == "head" for row in rows)


def test_report_shows_what_the_evaluation_wrote(run: Path):
    page = write_report(run).read_text()
    assert page.count("<video ") == 1
    assert "How it works" in page
    assert "Of 6 pairs of layer and part, the head ranks better than" in page


def test_killed_evaluation_continues_to_the_same_bits(
    run: Path, config: RunConfig, ckpts: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    calls = 0

    def killed(*args: object, **kwargs: object) -> Iterator[object]:
        nonlocal calls
        for done in run_jobs(*args, **kwargs):  # type: ignore[arg-type]
            calls += 1
            yield done
            if calls == 30:
                raise KeyboardInterrupt

    monkeypatch.setattr(evaluation, "run_jobs", killed)
    with pytest.raises(KeyboardInterrupt):
        evaluate(config, ckpts, tmp_path)
    assert not (tmp_path / "results.json").exists()
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"key": "torn')
    evaluate(config, ckpts, tmp_path)
    undisturbed = run / "evaluate"
    total = len((undisturbed / "rows.jsonl").read_text().splitlines())
    assert calls == total  # nothing ran twice
    assert without_clock(tmp_path / "results.json") == without_clock(undisturbed / "results.json")
    for name in ("kept.safetensors", "salience.safetensors", "videos/clip-0.mp4"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()


def test_two_processes_give_the_bits_of_one(run: Path, config: RunConfig, ckpts: list[Path]):
    clips = run / "evaluate" / "clips"
    arena = load_arena(config, ckpts, clips)
    contestant = Contestant("salience", "salience", (), "trained", True)
    jobs = [
        Job("policies", stage, contestant, 32, (12,), age_weight=0.1, clips_per_seed=1)
        for stage in ("head", "later")
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = dict(run_jobs(arena, jobs, ckpts=ckpts, clips=clips))
    torch.set_num_threads(threads)
    shared = replace(arena, config=replace(config, trainer=replace(config.trainer, threads=2)))
    together = dict(run_jobs(shared, jobs, ckpts=ckpts, clips=clips))
    for job in jobs:
        assert [{**row, CLOCK: 0} for row in together[job]] == [
            {**row, CLOCK: 0} for row in alone[job]
        ]


def test_long_rollout_contains_the_short_one(run: Path, config: RunConfig, ckpts: list[Path]):
    arena = load_arena(config, ckpts, run / "evaluate" / "clips")
    for policy in ("full", "random"):
        contestant = Contestant(policy, policy)
        long = Job("policies", "head", contestant, 32, (8, 16), clips_per_seed=1)
        first, _ = arena.run(long)
        (alone,) = arena.run(replace(long, frames=(8,)))
        assert {**first, CLOCK: 0} == {**alone, CLOCK: 0}


def test_true_latents_are_measured_as_right(run: Path, config: RunConfig, ckpts: list[Path]):
    arena = load_arena(config, ckpts, run / "evaluate" / "clips")
    true = Rollout(arena.clips.latents, 4, 0, 0, 0, 0.0)
    values = measure_rollout(arena.students["head"], arena.clips, true)
    row = summarise(values, arena.clips.groups, prefix_frames=4, num_frames=12, period=4)
    assert row["identity_accuracy"] == {"mean": 1.0, "std": 0.0}
    assert row["previous_revolution_accuracy"]["mean"] == 1.0
    assert row["position_error"] == 0
    assert row["accuracy_per_revolution"] == [1.0, 1.0]
    # What is left is the world's pixel noise of 0.03 and the loss of H.264.
    assert row["pixel_error"] < 0.002
    assert row["background_drift"] < 0.002
    assert row["checker_contrast"] == pytest.approx(1, abs=0.05)


def test_clips_of_seeds_and_of_training_differ(run: Path, config: RunConfig):
    clips = load(run / "evaluate" / "clips", [3, 5, 7])
    worlds = {
        json.loads(
            (run / "evaluate" / "clips" / f"seed-{seed}" / "world" / "world.json").read_text()
        )["config"]["seed"]
        for seed in (3, 5, 7)
    }
    assert len(worlds | {config.source.world.seed}) == 4
    assert len(set(clips.noise_seeds.tolist())) == len(clips.groups) == 6
    assert clips.first(1).groups == [3, 5, 7]


def test_untrained_head_keeps_the_statistics_but_not_the_weights(
    run: Path, config: RunConfig, ckpts: list[Path]
):
    arena = load_arena(config, ckpts, run / "evaluate" / "clips")
    contestant = Contestant("untrained_head", "salience", (), "untrained", True)
    job = Job("policies", "head", contestant, 32, (12,), age_weight=0.0)
    fresh, trained = arena.student_for(job).head, arena.students["head"].head
    assert torch.equal(fresh.place, trained.place)
    assert not torch.equal(fresh.layers[0].up.weight, trained.layers[0].up.weight)
    again = arena.student_for(job).head
    assert torch.equal(fresh.layers[0].up.weight, again.layers[0].up.weight)


def test_every_few_clips_have_an_untrained_head_of_their_own(
    run: Path, config: RunConfig, ckpts: list[Path], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("launch.arena.CLIPS_PER_UNTRAINED_HEAD", 3)
    arena = load_arena(config, ckpts, run / "evaluate" / "clips")
    contestant = Contestant("untrained_head", "salience", (), "untrained", True)
    job = Job("policies", "head", contestant, 32, (12,), age_weight=0.0)
    entries = arena.entries(job, arena.clips)
    assert [part.groups for _, part in entries] == [[3, 3, 5], [5]]
    assert torch.equal(torch.cat([part.latents for _, part in entries]), arena.clips.latents)
    first, second = (student.head.layers[0].up.weight for student, _ in entries)
    assert not torch.equal(first, second)
    trained = Contestant("salience", "salience", (), "trained", True)
    assert len(arena.entries(replace(job, contestant=trained), arena.clips)) == 1


def test_age_weight_of_highest_accuracy_wins_and_the_first_of_equals():
    contestant = Contestant(
        "salience", "salience", (("weights", (1.0, 0.0, 0.0)),), "trained", True
    )

    def tried(age_weight: float, accuracy: float, budget: int) -> tuple[Job, list[dict]]:
        job = Job("tuning", "head", contestant, budget, (12,), age_weight=age_weight)
        return job, [{"identity_accuracy": {"mean": accuracy}}]

    rows = [tried(0.0, 0.5, 32), tried(0.05, 0.7, 32), tried(0.1, 0.7, 32), tried(0.1, 0.1, 40)]
    ages = choose_age_weights(rows)
    assert sorted(ages.values()) == [0.05, 0.1]


def test_every_scored_policy_is_tuned_on_the_same_grid():
    settings = EvaluateConfig()
    jobs = plan_jobs(settings, has_head={"causal": True}, has_teacher={"causal": True})
    scored = [c for c in contestants(settings, has_head=True, has_teacher=True) if c.is_scored]
    own = [contestant for contestant in scored if contestant.twin is None]
    assert {c.policy for c in own} == {
        name for name, policy in POLICIES.items() if issubclass(policy, ScoredPolicy)
    }
    checks = [contestant for contestant in scored if contestant.twin is not None]
    assert {c.name for c in checks} == {"untrained_head", "inverted_head"}
    assert all(contestant.twin in own for contestant in checks)
    assert not any(job.section == "tuning" and job.contestant in checks for job in jobs)
    for contestant in own:
        for budget in settings.budgets:
            grid = [
                job.age_weight
                for job in jobs
                if job.section == "tuning"
                and job.contestant == contestant
                and job.budget_tokens == budget
            ]
            assert grid == settings.age_weights


def test_by_default_every_policy_meets_every_budget_and_length_in_every_stage():
    settings = EvaluateConfig()
    jobs = plan_jobs(settings, has_head=BOTH, has_teacher=BOTH)
    met = {
        (job.stage, job.contestant, job.budget_tokens, frames)
        for job in jobs
        if job.section == "policies"
        for frames in job.frames
    }
    for stage in ("causal", "streaming"):
        for contestant in contestants(settings, has_head=True, has_teacher=True):
            if POLICIES[contestant.policy].is_bounded:
                for budget in settings.budgets:
                    for frames in settings.frames:
                        assert (stage, contestant, budget, frames) in met


def test_few_steps_are_compared_on_all_clips_and_the_costly_reference_on_fewer():
    settings = EvaluateConfig(clips_per_seed=9, long_clips_per_seed=2)
    jobs = plan_jobs(settings, has_head=BOTH, has_teacher=BOTH)
    found = {(job.stage, job.steps, job.clips_per_seed) for job in jobs if job.section == "quality"}
    few = {(stage, steps, 9) for stage in ("causal", "streaming") for steps in (1, 2)}
    assert found == few | {("causal", 32, 2)}


def test_misspelled_contender_is_an_error_with_a_hint():
    settings = EvaluateConfig(contenders=["full", "sink_windw"])
    with pytest.raises(UserError, match=r"evaluate\.contenders .* did you mean 'sink_window'"):
        plan_jobs(settings, has_head={"causal": True}, has_teacher={"causal": True})


def test_student_without_any_head_is_compared_without_the_policies_that_need_one():
    taking_part = contestants(EvaluateConfig(), has_head=False, has_teacher=False)
    expected = {name for name, policy in POLICIES.items() if not policy.needs_head}
    assert {c.policy for c in taking_part} == expected
    without_teacher = contestants(EvaluateConfig(), has_head=True, has_teacher=False)
    assert {c.policy for c in without_teacher} == set(POLICIES) - {"oracle"}


def test_spread_is_the_sample_deviation_of_seed_means():
    values = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, torch.nan]])
    assert spread_over_seeds(values, [0, 0, 1]) == {
        "mean": pytest.approx(0.375),
        "std": pytest.approx(0.75 / 2**0.5),
    }
    assert spread_over_seeds(values[:2], [0, 0]) == {"mean": 0.75, "std": 0.0}


def test_budget_below_what_is_protected_is_an_error(
    run: Path, config: RunConfig, ckpts: list[Path]
):
    arena = load_arena(config, ckpts, run / "evaluate" / "clips")
    contestant = Contestant("sink_window", "sink_window")
    jobs = [Job("policies", "head", contestant, budget, (12,)) for budget in (32, 8)]
    check_budgets(arena, jobs[:1])
    with pytest.raises(
        UserError, match="'sink_window': the cache budget must hold sink and recent"
    ):
        check_budgets(arena, jobs)


def test_lengths_that_are_not_whole_blocks_are_an_error(
    config: RunConfig, ckpts: list[Path], tmp_path: Path
):
    odd = replace(config, evaluate=replace(config.evaluate, prefix_frames=3))
    with pytest.raises(UserError, match=r"evaluate\.prefix_frames must be whole blocks of 2"):
        evaluate(odd, ckpts, tmp_path)


def test_videos_without_truth_are_an_error(config: RunConfig, ckpts: list[Path], tmp_path: Path):
    clips = replace(config, source=replace(config.source, kind="videos", path="here"))
    with pytest.raises(UserError, match=r"source\.kind=world"):
        prepare(clips, tmp_path)


def test_checkpoint_of_a_teacher_is_an_error(config: RunConfig, ckpts: list[Path], tmp_path: Path):
    with pytest.raises(UserError, match="must be a student"):
        evaluate(config, [ckpts[0].with_name("teacher")], tmp_path)


def test_record_drops_a_torn_line_and_goes_on(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    Record(path).add("a", [{"x": 1}])
    with path.open("a") as file:
        file.write('{"key": "b", "ro')
    record = Record(path)
    assert "a" in record
    assert "b" not in record
    record.add("b", [])
    assert Record(path).rows("a") == [{"x": 1}]
    assert "b" in Record(path)


def test_record_names_a_damaged_line(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"key": "a", "rows": []}\n{"key": "b", "r\x00ws": []}\n')
    with pytest.raises(UserError, match=r"line 2 of .*rows\.jsonl must be a finished rollout"):
        Record(path)
