"""The report, built from numbers that are made up here and never shipped."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from configs.errors import UserError
from configs.schema import WorldConfig
from data.truth import truth_at
from data.video import VideoWriter
from data.world import render_clip
from launch.figures import series_of, shares_by_age, style_of
from launch.material import read_material, read_rows
from launch.notes import notes
from launch.pictures import stack_panels
from launch.report import build_page, write_report

FRAMES, PREFIX, PERIOD, BLOCK = 96, 24, 20, 2
SKILL = {
    "full": 0.99,
    "salience": 0.9,
    "salience_all": 0.93,
    "position_prior": 0.7,
    "attention_mass": 0.19,
    "random": 0.3,
    "random_once": 0.33,
    "sink_window": 0.1,
    "fifo": 0.09,
    "untrained_head": 0.12,
    "inverted_head": 0.1,
}
PANELS = ("truth", "full", "sink_window", "random", "salience")


def made_up_row(series: str, *, budget: int, frames: int, stage: str, skill: float) -> dict:
    policy = "salience" if series.startswith("salience") else series
    weights = {"salience": [1.0, 0.0, 0.0], "salience_all": [1.0, 1.0, 1.0]}.get(series)
    held = frames * 8 if policy == "full" else budget
    turns = (frames - PREFIX) // PERIOD
    accuracy = [max(0.083, skill - 0.02 * turn) for turn in range(turns)]
    return {
        "policy": policy,
        "frames": frames,
        "stage": stage,
        "train_seed": 0,
        "rollout_seeds": [0, 1, 2],
        "budget_tokens": held,
        "budget_share": held / 384,
        "weights": weights,
        "age_weight": 0.05 if weights or policy == "position_prior" else None,
        "steps": 4,
        "identity_accuracy": {"mean": float(np.mean(accuracy)), "std": 0.02},
        "accuracy_per_revolution": accuracy,
        "previous_revolution_accuracy": {"mean": skill, "std": 0.02},
        "position_error": 0.1,
        "background_drift": 0.02,
        "pixel_error": 0.01,
        "crisp_share": {"mean": 0.5, "std": 0.02},
        "checker_contrast": 0.9,
        "kv_bytes": held * 3 * 2 * 64 * 4,
        "frames_per_second": 700.0,
    }


def made_up_results() -> dict:
    rows = [
        made_up_row(s, budget=budget, frames=96, stage="causal_head", skill=skill * factor)
        for s, skill in SKILL.items()
        for budget, factor in ((96, 0.85), (128, 1.0))
        if s != "full" or budget == 128
    ]
    for stage in ("distill_head", "streaming", "control"):
        for series in ("full", "salience", "sink_window"):
            for frames, factor in ((96, 1.0), (240, 0.8), (480, 0.6)):
                skill = SKILL[series] * factor
                rows.append(
                    made_up_row(series, budget=128, frames=frames, stage=stage, skill=skill)
                )
    quality = [
        made_up_row(policy, budget=128, frames=96, stage=stage, skill=0.9) | {"steps": steps}
        for stage in ("causal_head", "distill_head")
        for policy in ("full", "sink_window")
        for steps in (1, 2, 32)
    ]
    layers = {part: [0.3, 0.65, 0.5] for part in ("later", "within", "earlier")}
    free = [
        {"stage": stage, "policy": policy, "frames": 96}
        | {"self_consistency": {"mean": SKILL[policy], "std": 0.03}}
        for stage in ("causal_head", "streaming")
        for policy in ("full", "salience", "sink_window")
    ]
    fall = [1.5 - frame / 16 for frame in range(44)] + 4 * [None]
    parts_by_frame = {"later": fall, "within": [0.1] * 48, "earlier": fall[::-1]}
    head = dict.fromkeys(("causal_head", "distill_head"), layers)
    even = {"spearman": [0.4, 0.1, 0.7], "recall": [0.2, 0.2, 0.2]}
    weak = {"spearman": [0.0, 0.1, 0.0], "recall": [0.3, 0.65, 0.5]}
    rivals = {
        "position": dict.fromkeys(layers, even),
        "key_norm": dict.fromkeys(layers, weak),
        "value_norm": dict.fromkeys(layers, weak),
    }
    return {
        "name": "made-up",
        "plan": ["teacher", "causal"],
        "stages": ["causal_head", "distill_head", "streaming", "control"],
        "world": {
            "identities": 10,
            "period": PERIOD,
            "frames_shown": 2,
            "prefix_frames": PREFIX,
            "training_frames": 48,
            "tokens_per_frame": 8,
            "frames_per_block": BLOCK,
            "chance": 1 / 12,
        },
        "policies": rows,
        "quality": quality,
        "prefix_free": free,
        "head": {
            "budget_share": 0.25,
            "spearman": head,
            "recall_at_budget": head,
            "target_by_frame": dict.fromkeys(head, parts_by_frame),
            "baselines": dict.fromkeys(head, rivals),
        },
    }


def write_made_up_videos(folder: Path) -> None:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    clips = []
    for index in range(2):
        clip = render_clip(WorldConfig(frames=FRAMES), index)
        lit = truth_at(clip.truth, range(FRAMES)).lit
        panels, videos = [], []
        for series in PANELS:
            right = draw.random(FRAMES) < SKILL.get(series, 1.0)
            right[:PREFIX] = True
            shown = np.stack(
                [clip.frames[t] if right[t] else clip.frames[t - 6] for t in range(FRAMES)]
            )
            videos.append(shown)
            word = "".join("01"[int(x)] for x in right)
            panels.append(
                {
                    "series": series,
                    "about": "" if series == "truth" else "128 tokens",
                    "correct": word,
                }
            )
        video = stack_panels(videos)
        name = f"clip-{index}.mp4"
        with VideoWriter(folder / name, 8, video.shape[1:3], scale=4, crf=20) as writer:
            writer.write(video)
        clips.append({"file": name, "lit": lit.tolist(), "panels": panels})
    about = {
        "fps": 8,
        "frames": FRAMES,
        "prefix_frames": PREFIX,
        "period": PERIOD,
        "budget_tokens": 128,
        "grid": [2, 4],
        "clips": clips,
    }
    (folder / "clips.json").write_text(json.dumps(about))


def made_up_kept(series: str) -> np.ndarray:
    draw = np.random.default_rng(1)
    kept = np.zeros((FRAMES // BLOCK, FRAMES, 2, 4))
    lot = draw.random((FRAMES, 2, 4))
    for block in range(len(kept)):
        newest = (block + 1) * BLOCK
        age = newest - np.arange(FRAMES)
        if series == "full":
            value = np.ones((FRAMES, 2, 4))
        elif series == "sink_window":
            value = np.broadcast_to((age <= 15)[:, None, None], (FRAMES, 2, 4)).astype(float)
        elif series == "random":
            value = (lot < np.exp(-age / 14)[:, None, None]).astype(float)
        else:
            value = np.zeros((FRAMES, 2, 4))
            value[:, 1, 1:3] = np.exp(-((age / 38.0) ** 6))[:, None]
        kept[block] = np.where((age > 0)[:, None, None], value, 0)
        kept[block, 0] = 1
    return (255 * kept).astype(np.uint8)


def write_made_up_run(run: Path) -> Path:
    folder = run / "evaluate"
    write_made_up_videos(folder / "videos")
    (folder / "results.json").write_text(json.dumps(made_up_results()))
    kept = {
        series: made_up_kept(series) for series in ("full", "sink_window", "random", "salience")
    }
    clip = render_clip(WorldConfig(frames=FRAMES), 0)
    frames = {f"frames.{series}": clip.frames for series in kept}
    save_file(kept | frames, folder / "kept.safetensors")
    draw = np.random.default_rng(2)
    target = 0.2 * draw.standard_normal((10, 2, 4))
    lit = truth_at(clip.truth, range(20, 30)).lit.numpy()
    target[np.arange(10), lit[:, 0], lit[:, 1]] += 2
    arrays = {
        "frames": clip.frames,
        "salience_frames": clip.frames[20:30].copy(),
        "target": target.astype(np.float32),
        "predicted": (target + 0.3 * draw.standard_normal(target.shape)).astype(np.float32),
        "layer": np.array([1]),
        "phase": np.array([clip.truth.phase]),
    }
    save_file(arrays, folder / "salience.safetensors")
    for stage, names in (
        ("teacher", ["loss/teacher"]),
        ("causal", ["loss/student"]),
        ("distill", ["loss/student", "loss/critic"]),
    ):
        (run / stage).mkdir()
        rows = [
            {"step": step} | {n: 1 / (1 + step / 50) + 0.1 * k for k, n in enumerate(names)}
            for step in range(0, 500, 10)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / stage / "metrics.jsonl").write_text(text + '{"step": 500, "lo')
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_made_up_run(tmp_path_factory.mktemp("runs") / "made-up")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return write_report(run).read_text()


def test_page_needs_nothing_beside_it(page: str):
    references = re.findall(r"""(?:\b(?:src|href)=|url\()["']?([^"')\s>]+)""", page)
    outside = [r for r in references if not r.startswith(("data:", "#"))]
    assert not outside
    # The namespaces of SVG are names, not addresses.
    assert not re.search(r"https?://(?!www\.w3\.org/)", page)
    assert "{{" not in page


def test_same_run_gives_the_same_bytes(run: Path, page: str):
    assert build_page(read_material(run)) == page


def test_headline_is_the_accuracy_at_the_largest_budget(page: str):
    headline = re.search(r'class="number">(.*?)</p>', page)
    row = next(
        r
        for r in made_up_results()["policies"]
        if r["weights"] == [1.0, 0.0, 0.0] and r["budget_tokens"] == 128
    )
    assert headline is not None
    assert headline[1].startswith(f"{100 * row['identity_accuracy']['mean']:.0f}<")
    assert "a third of a clip" in page


def test_every_policy_stage_and_video_is_on_the_page(page: str):
    for series in SKILL:
        assert style_of(series).label in page
    for stage in made_up_results()["stages"]:
        assert stage in page
    assert page.count("<video ") == 2
    data = json.loads(re.search(r'id="clips">(.*?)</script>', page)[1])
    assert len(data["clips"][0]["lit"]) == FRAMES
    assert all(len(panel["correct"]) == FRAMES for panel in data["clips"][1]["panels"])


def test_ids_on_the_page_are_unique(page: str):
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_a_policy_without_a_style_is_shown_under_its_own_name(run: Path):
    material = read_material(run)
    row = made_up_row("brand_new", budget=128, frames=96, stage="causal_head", skill=0.5)
    material.results["policies"].append(row)
    assert "brand new" in build_page(material)


def test_page_is_made_of_results_alone_where_pictures_are_missing(run: Path, tmp_path: Path):
    (tmp_path / "evaluate").mkdir()
    shutil.copy(run / "evaluate" / "results.json", tmp_path / "evaluate")
    page = write_report(tmp_path).read_text()
    assert "All policies" in page
    assert "<video " not in page


def test_the_head_stands_beside_what_needs_no_training(run: Path, page: str):
    sentence = (
        "Of 9 pairs of layer and part, the head ranks better than the mean salience of the place "
        "in 3 (9), the smallness of the key in 9 (0) and the size of the value in 9 (0);"
    )
    assert page.count(sentence) == 2
    rows = re.findall(r'left">([\w ]+)</td>((?:<td class="heat".*?</td>)+)</tr>', page)
    cells = {name: re.findall(r">([\d.]+)</td>", values) for name, values in rows}
    assert cells["the head"] == ["0.48"] * 6
    assert cells["the mean salience of the place"] == ["0.40"] * 3 + ["0.20"] * 3
    assert cells["the size of the value"] == ["0.03"] * 3 + ["0.48"] * 3
    older = read_material(run)
    del older.results["head"]["baselines"]
    without = build_page(older)
    assert "what needs no training" not in without
    assert "The head of &ldquo;causal_head&rdquo;" in without


def test_pictures_without_a_teacher_leave_its_step_out(run: Path):
    material = read_material(run)
    del material.pictures["target"]
    page = build_page(material)
    assert "in two pictures" in page
    assert "read off the teacher" not in page


def test_change_counts_beyond_two_standard_deviations_only(run: Path):
    material = read_material(run)
    rows = [row for row in material.results["policies"] if row["frames"] == 480]
    for row, mean in zip(
        [r for r in rows if r["policy"] == "salience"], (0.5, 0.55, 0.6), strict=True
    ):
        row["identity_accuracy"] = {"mean": mean, "std": 0.02}
    page = build_page(material)
    assert "streaming, learned salience: 50&nbsp;% to 55&nbsp;%, no clear change" in page
    assert "control, learned salience: 50&nbsp;% to 60&nbsp;%, better" in page


def test_page_without_the_learned_policy_says_so(run: Path):
    material = read_material(run)
    rows = material.results["policies"]
    rows[:] = [row for row in rows if row["policy"] == "sink_window"]
    assert "was not evaluated" in build_page(material)


def test_torn_last_row_of_metrics_is_left_out(run: Path):
    assert len(read_rows(run / "teacher" / "metrics.jsonl")) == 50


def test_run_without_results_is_an_error_of_the_user(tmp_path: Path):
    with pytest.raises(UserError, match=r"results\.json.*evaluate the run first"):
        write_report(tmp_path)


def test_ages_of_what_is_kept_are_counted_back_from_the_newest_frame():
    share = np.zeros((2, 4))
    share[0, 0], share[1, 3] = 0.25, 0.75
    by_age = shares_by_age(share, frames_per_block=2, max_age=4)
    assert by_age[1, 0] == 0.25  # frame 0 after the block of frames 0 and 1
    assert by_age[0, 1] == 0.75  # frame 3, the newest of the second block
    assert np.isnan(by_age[2:, 0]).all()


def test_page_says_who_wins_and_who_cannot_be_told_apart():
    results = made_up_results()
    page = notes(results)
    assert (
        "at 96 tokens learned salience, all parts, 77&nbsp;%, not told apart from learned salience;"
        in page
    )
    for row in results["policies"]:
        if series_of(row) == "salience":
            row["identity_accuracy"] = {"mean": 0.99, "std": 0.01}
    assert "at 96 tokens learned salience, 99&nbsp;%, alone" in notes(results)


def test_other_forms_of_a_cache_have_a_table_beside_the_plain_one(run: Path):
    results = json.loads((run / "evaluate" / "results.json").read_text())
    plain = next(
        row for row in results["policies"] if row["policy"] == "salience" and row["frames"] == 96
    )
    results["forms"] = [
        plain | {"form": form, "budget_tokens": budget, "kv_bytes": 2048, "host_bytes": 10240 * far}
        for form, far in (("int4", 0), ("offload", 1))
        for budget in (96, 128)
    ]
    (run / "evaluate" / "results.json").write_text(json.dumps(results))
    page = build_page(read_material(run))
    assert "4 bits per channel" in page
    assert "a quarter fetched back from the host" in page
    table = page[page.index("otherwise stored") :]
    table = table[: table.index("</table>")]
    assert table.count("<tr>") == 4  # head, plain, two forms
    assert "<td>10</td>" in table
    del results["forms"]
    (run / "evaluate" / "results.json").write_text(json.dumps(results))
    assert "otherwise stored" not in build_page(read_material(run))
