"""Steps are skipped, continued or done again by what they depend on, never by chance."""

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.load import load_config
from data.video import VideoWriter
from launch.export import write_export
from launch.geometry import network_config
from launch.lock import PlanError, hold_lock, wait_for_leader
from launch.plan import check_run, plan_steps, run, run_one
from launch.steps import (
    Step,
    is_complete,
    process_rank,
    run_one_step,
    run_steps,
    step_keys,
)

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.yaml")


class Plan:
    """Three steps in a row that write a file each and remember what ran."""

    def __init__(self, root: Path) -> None:
        self.root, self.ran = root, []
        self.settings = {"first": 1, "second": 1, "third": 1}
        self.fails: set[str] = set()

    def steps(self) -> list[Step]:
        def work(name: str) -> None:
            self.ran.append(name)
            (self.root / name / "started").touch()
            if name in self.fails:
                raise RuntimeError(f"{name} was killed")
            (self.root / name / "result").write_text(str(self.settings[name]))

        names = list(self.settings)
        return [
            Step(
                name=name,
                folder=self.root / name,
                settings={"value": self.settings[name]},
                run=lambda name=name: work(name),
                parents=tuple(names[max(0, number - 1) : number]),
                outputs=(self.root / name / "result",),
            )
            for number, name in enumerate(names)
        ]

    def run(self) -> list[str]:
        self.ran = []
        run_steps(self.steps(), root=self.root)
        return self.ran


@pytest.fixture
def plan(tmp_path) -> Plan:
    return Plan(tmp_path / "run")


def test_a_second_run_does_nothing_and_says_so(plan, capsys):
    assert plan.run() == ["first", "second", "third"]
    assert "step 2/3 second: running" in capsys.readouterr().out
    assert plan.run() == []
    assert capsys.readouterr().out == f"all 3 steps complete in {plan.root}\n"


def test_an_interrupted_step_continues_in_its_folder(plan, capsys):
    plan.fails = {"second"}
    with pytest.raises(RuntimeError, match="second was killed"):
        plan.run()
    assert not (plan.root / "second" / "DONE.json").exists()
    plan.fails = set()
    assert plan.run() == ["second", "third"]
    out = capsys.readouterr().out
    assert "step 1/3 first: complete" in out
    assert "step 2/3 second: continuing" in out
    assert not (plan.root / "superseded").exists()


def test_changed_settings_redo_a_step_and_all_that_read_it_and_keep_the_old_folders(plan, capsys):
    plan.run()
    plan.settings["second"] = 2
    assert plan.run() == ["second", "third"]
    assert (plan.root / "second" / "result").read_text() == "2"
    shelf = plan.root / "superseded"
    old = {path.name.split("-")[0]: path for path in shelf.iterdir()}
    assert sorted(old) == ["second", "third"]
    assert (old["second"] / "result").read_text() == "1"
    assert "the old folder is kept as" in capsys.readouterr().out


def test_settings_that_change_back_and_forth_lose_no_folder(plan):
    for value in (1, 2, 1, 2):
        plan.settings["third"] = value
        assert "third" in plan.run()
    assert len(list((plan.root / "superseded").iterdir())) == 3


def test_an_interrupted_step_whose_input_has_changed_starts_afresh(plan):
    plan.fails = {"second"}
    with pytest.raises(RuntimeError):
        plan.run()
    plan.fails, plan.settings["first"] = set(), 5
    assert plan.run() == ["first", "second", "third"]
    assert not (plan.root / "second" / "started").stat().st_size
    assert {path.name.split("-")[0] for path in (plan.root / "superseded").iterdir()} == {
        "first",
        "second",
    }


def test_a_step_whose_output_is_gone_runs_again(plan):
    plan.run()
    (plan.root / "second" / "result").unlink()
    assert plan.run() == ["second"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}'])
def test_a_damaged_record_means_not_complete(plan, content):
    plan.run()
    (plan.root / "third" / "DONE.json").write_text(content)
    assert plan.run() == ["third"]


def test_the_record_of_completion_is_written_last(plan):
    plan.run()
    done = plan.root / "third" / "DONE.json"
    assert done.stat().st_mtime_ns >= (plan.root / "third" / "result").stat().st_mtime_ns
    record = json.loads(done.read_text())
    assert record["settings"] == {"value": 1}
    assert record["key"] == step_keys(plan.steps())["third"]


def test_the_check_runs_once_and_only_if_something_has_to_run(plan):
    calls = []
    run_steps(plan.steps(), root=plan.root, check=lambda: calls.append(1))
    run_steps(plan.steps(), root=plan.root, check=lambda: calls.append(1))
    assert calls == [1]


def test_one_step_runs_only_after_the_steps_it_reads(plan):
    with pytest.raises(PlanError, match=r"'second' needs \['first'\] complete"):
        run_one_step(plan.steps(), "second", root=plan.root)
    run_one_step(plan.steps(), "first", root=plan.root)
    run_one_step(plan.steps(), "second", root=plan.root)
    assert plan.ran == ["first", "second"]
    run_one_step(plan.steps(), "second", root=plan.root)
    assert plan.ran == ["first", "second"]


def start_holder(root: Path) -> subprocess.Popen:
    program = textwrap.dedent(
        """
        import os, sys, time
        from pathlib import Path
        from launch.lock import hold_lock
        with hold_lock(Path(sys.argv[1])):
            if os.fork() == 0:  # as a loader worker that outlives its parent
                time.sleep(3)
                os._exit(0)
            sys.stdout.write("held\\n")
            sys.stdout.flush()
            time.sleep(60)
        """
    )
    command = [sys.executable, "-c", program, str(root)]
    holder = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    return holder


def test_a_run_folder_in_use_is_refused_and_a_dead_process_leaves_no_lock(plan):
    holder = start_holder(plan.root)
    try:
        with pytest.raises(PlanError, match=f"must be free, found process {holder.pid} on"):
            plan.run()
        assert plan.ran == []
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait(timeout=10)
    assert plan.run() == ["first", "second", "third"]


def test_the_lock_is_free_after_an_error(plan):
    with pytest.raises(RuntimeError), hold_lock(plan.root):
        raise RuntimeError
    with hold_lock(plan.root):
        pass


def test_only_rank_0_takes_the_lock_and_writes_records(plan, monkeypatch):
    plan.run()
    monkeypatch.setenv("RANK", "1")
    assert process_rank() == 1
    holder = start_holder(plan.root)
    try:
        assert plan.run() == []  # no lock needed, all complete
    finally:
        holder.kill()
        holder.wait(timeout=10)


def test_another_rank_waits_for_rank_0_and_joins_only_steps_for_all_ranks(plan, monkeypatch):
    steps = plan.steps()
    steps[1] = Step(**{**vars(steps[1]), "on_all_ranks": True})
    keys = step_keys(steps)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("launch.lock.POLL_SECONDS", 0.0)
    order = []

    def other_rank(_: float) -> None:
        """Rank 0, one event each time that this rank waits."""
        events = [(steps[0].started_file, keys["first"]), (steps[0].done_file, keys["first"])]
        events += [(steps[1].started_file, keys["second"]), (steps[1].done_file, keys["second"])]
        events += [(steps[2].started_file, keys["third"]), (steps[2].done_file, keys["third"])]
        path, key = events[len(order)]
        order.append((path.parent.name, list(plan.ran)))
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / "result").touch()
        path.write_text(json.dumps({"key": key}))

    monkeypatch.setattr(time, "sleep", other_rank)
    run_steps(steps, root=plan.root)
    assert plan.ran == ["second"]
    assert [ran for name, ran in order if name == "second"] == [[], ["second"]]


def tiny(tmp_path: Path, *overrides: str):
    return load_config([TINY, f"runs_dir={tmp_path}", *overrides])


def test_the_plan_of_a_run_lists_every_step_in_order(tmp_path):
    names = [step.name for step in plan_steps(tiny(tmp_path))]
    stages = ["teacher", "causal", "salience_causal", "distill", "targets-salience", "salience"]
    stages += ["streaming", "control"]
    assert names == ["world", "ingest", "encode", *stages, "evaluate", "report"]


def test_stored_targets_need_only_the_teacher_and_only_their_stage_needs_them(tmp_path):
    parents = {step.name: step.parents for step in plan_steps(tiny(tmp_path))}
    assert parents["targets-salience"] == ("encode", "teacher")
    readers = [name for name, read in parents.items() if "targets-salience" in read]
    assert readers == ["salience"]


def test_a_stage_that_is_run_alone_has_its_targets_written_first(tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr("launch.plan.run_one_step", lambda steps, name, **rest: ran.append(name))
    for name in ("salience", "salience_causal"):
        run_one(tiny(tmp_path), name)
    assert ran == ["targets-salience", "salience", "salience_causal"]


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("stages.teacher.keep=5", set()),
        ("stages.teacher.checkpoint_every=7", set()),
        ("trainer.threads=2", set()),
        ("tracking.wandb=offline", set()),
        ("data.workers=2", set()),
        ("name=other", set()),
        ("evaluate.budgets=[48]", {"evaluate", "report"}),
        ("stages.control.steps=9", {"control", "report"}),
        (
            "stages.salience.optimizers.head.lr=1",
            {"salience", "streaming", "evaluate", "report"},
        ),
        ("stages.salience.params.horizon=1", {"salience", "streaming", "evaluate", "report"}),
        (
            "stages.salience.params.sigma=0.5",
            {"targets-salience", "salience", "streaming", "evaluate", "report"},
        ),
        (
            "stages.salience.frames=14",
            {"targets-salience", "salience", "streaming", "evaluate", "report"},
        ),
        ("source.world.seed=9", "all"),
        ("seed=9", "training"),
        ("model.num_layers=3", "training"),
        ("text.length=13", "encoded"),
    ],
)
def test_a_key_changes_with_what_its_step_depends_on_and_with_nothing_else(
    tmp_path, override, changed
):
    before = step_keys(plan_steps(tiny(tmp_path)))
    after = step_keys(plan_steps(tiny(tmp_path, override)))
    sets = {
        "all": set(before),
        "encoded": set(before) - {"world", "ingest"},
        "training": set(before) - {"world", "ingest", "encode"},
    }
    expected = sets[changed] if isinstance(changed, str) else changed
    assert {name for name in before if before[name] != after[name]} == expected


def test_the_data_steps_run_from_the_world_to_latents(tmp_path):
    config = tiny(tmp_path, "source.world.clips=3", "source.world.frames=40")
    with pytest.raises(UserError, match=r"needs \['ingest'\] complete"):
        run_one(config, "encode")
    for name in ("world", "ingest", "encode"):
        run_one(config, name)
    assert (tmp_path / "tiny" / "data" / "latents" / "manifest.json").is_file()
    steps = plan_steps(config)
    keys = step_keys(steps)
    assert [is_complete(step, keys[step.name]) for step in steps[:4]] == [True, True, True, False]


def test_a_step_that_is_not_in_the_plan_is_named_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="found 'ecode'; did you mean 'encode'"):
        run_one(tiny(tmp_path), "ecode")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.salience.params.statistic_steps=2"], "did you mean 'statistics_steps'"),
        (["stages.causal.micro_batch=3"], "'causal' stage must be .* = 1 x 3, found 4"),
        (["trainer.strategy=ddp", "trainer.devices=4"], "'distill' stage .* = 4 x 1, found 2"),
    ],
)
def test_a_plan_that_cannot_work_starts_nothing(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        run(tiny(tmp_path, *overrides))
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_an_input_that_cannot_work_is_found_before_anything_runs(tmp_path):
    config = tiny(tmp_path)
    model = network_config(config)["model"]
    for role, sizes, message in (
        ("student", model, "must be a teacher, found a student"),
        ("teacher", model | {"num_layers": 7}, r"differs in model\.num_layers"),
    ):
        folder = tmp_path / "elsewhere" / role
        manifest = {"role": role, "stage": role, "config": {"model": sizes}}
        write_export(folder, weights={}, manifest=manifest)
        with pytest.raises(UserError, match=message):
            run(tiny(tmp_path, f"stages.salience.inputs.teacher={folder}"))
    assert [path.name for path in (tmp_path / "tiny").iterdir()] == [".lock"]


def test_every_step_asks_for_the_paths_that_it_and_those_before_it_read(tmp_path):
    videos, teacher = tmp_path / "videos", tmp_path / "elsewhere" / "teacher"
    videos.mkdir()
    with VideoWriter(videos / "a.mp4", 8, (32, 64)) as writer:
        writer.write(np.zeros((40, 32, 64, 3), np.uint8))
    (videos / "captions.jsonl").write_text('{"file": "a.mp4", "caption": "a ball"}\n')
    model = network_config(tiny(tmp_path))["model"]
    manifest = {"role": "teacher", "stage": "teacher", "config": {"model": model}}
    write_export(teacher, weights={}, manifest=manifest)
    words = ["source.kind=videos", "source.path=${paths.videos}"]
    words += ["stages.causal.inputs.teacher=${paths.teacher}"]
    words += ["stages.distill.inputs.student=${paths.student}"]
    words += [f"paths.{name}=SET_ME/{name}" for name in ("videos", "teacher", "student")]

    def missing(last: str | None) -> str:
        with pytest.raises(UserError) as error:
            plan_steps(tiny(tmp_path, *words), last=last)
        return str(error.value)

    assert "paths.videos must be a path of yours" in missing("ingest")
    words.append(f"paths.videos={videos}")
    for name in ("ingest", "encode"):
        run_one(tiny(tmp_path, *words), name)
    assert "paths.teacher must be a path of yours" in missing("causal")
    words.append(f"paths.teacher={teacher}")
    assert plan_steps(tiny(tmp_path, *words), last="causal")[-1].name == "causal"
    check_run(tiny(tmp_path, *words), "causal")
    for last in ("distill", None):
        assert "paths.student must be a path of yours" in missing(last)
    with pytest.raises(UserError, match="student' must exist"):
        check_run(tiny(tmp_path, *words))


def test_videos_are_known_by_list_caption_and_size(tmp_path):
    videos = tmp_path / "videos"
    videos.mkdir()
    (videos / "a.mp4").write_bytes(b"12345")
    listed = videos / "captions.jsonl"
    listed.write_text('{"file": "a.mp4", "caption": "a ball"}\n')

    def ingest_key(*overrides: str) -> str:
        config = tiny(tmp_path, "source.kind=videos", f"source.path={videos}", *overrides)
        return step_keys(plan_steps(config))["ingest"]

    def keys(*overrides: str) -> dict[str, str]:
        config = tiny(tmp_path, "source.kind=videos", f"source.path={videos}", *overrides)
        return step_keys(plan_steps(config, last="encode"))

    slow, fast = keys("source.fps=12"), keys("source.fps=16")
    assert slow["ingest"] == fast["ingest"]
    assert slow["encode"] != fast["encode"]
    first = ingest_key()
    assert ingest_key(f"source.path={listed}") == first
    (videos / "a.mp4").write_bytes(b"123456")
    second = ingest_key()
    listed.write_text('{"file": "a.mp4", "caption": "a cube"}\n')
    assert len({first, second, ingest_key()}) == 3
    (videos / "a.mp4").unlink()
    with pytest.raises(UserError, match=r"found no file '.*a\.mp4' \(1 of 1 are missing\)"):
        ingest_key()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"source\.path must be a folder"),
        (["source.path=nowhere"], r"found 'nowhere', which does not exist"),
        (["source.path=configs", "source.folder=package:nopackage/x"], "found no|captions"),
    ],
)
def test_videos_that_are_not_there_are_a_clear_error(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        plan_steps(tiny(tmp_path, "source.kind=videos", *overrides))


def test_a_package_that_is_not_installed_is_named(tmp_path):
    listed = tmp_path / "list.jsonl"
    listed.write_text('{"file": "a.mp4", "caption": "a ball"}\n')
    source = [f"source.path={listed}", "source.kind=videos"]
    with pytest.raises(UserError, match="needs the Python package 'nopackage', found none"):
        plan_steps(tiny(tmp_path, *source, "source.folder=package:nopackage/x"))
    with pytest.raises(UserError, match="must be a folder, found none at"):
        plan_steps(tiny(tmp_path, *source, "source.folder=package:pytest/nothing"))


def test_an_external_input_counts_by_its_content(tmp_path):
    def key(value: float) -> str:
        folder = tmp_path / "elsewhere" / "teacher"
        manifest = {"role": "teacher", "stage": "teacher"}
        write_export(
            folder, weights={"t": {"w": torch.full((2,), value)}}, manifest=manifest, replaces=True
        )
        config = tiny(tmp_path, f"stages.causal.inputs.teacher={folder}")
        return step_keys(plan_steps(config))["causal"]

    assert key(1.0) == key(1.0) != key(2.0)


def test_a_rank_does_not_wait_for_ever_for_a_leader_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.lock.LEADER_SECONDS", 0.5)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    step = Step(name="one", folder=tmp_path / "one", settings={}, run=lambda: None)
    with pytest.raises(PlanError, match=r"must be at work in run folder .* that all nodes share"):
        run_steps([step], root=tmp_path)
    # What a killed leader has left in the lock is no sign of life.
    (tmp_path / ".lock").write_text("1 on somewhere")
    with pytest.raises(PlanError, match=r"found no sign of it for 0 s"):
        run_steps([step], root=tmp_path)


HOLDER = """
import sys
from pathlib import Path
from launch import lock
lock.BEAT_SECONDS = 0.1
with lock.hold_lock(Path(sys.argv[1])) as owner:
    print(owner, flush=True)
    sys.stdin.read()
"""


def test_a_rank_waits_for_a_leader_that_is_at_work_until_it_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("launch.lock.LEADER_SECONDS", 1.0)
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as holder:
        owner, begin = holder.stdout.readline().strip(), time.monotonic()
        seen = []

        def is_ready(found: str) -> bool:
            seen.append(found)
            return time.monotonic() - begin > 2.5

        wait_for_leader(tmp_path, is_ready)
        assert seen[0] == "", "one look does not tell a living leader from a dead one"
        assert seen[-1] == owner
        holder.kill()
        holder.wait(timeout=10)
        assert (tmp_path / ".lock").read_text() == owner
        with pytest.raises(PlanError, match="found no sign of it for 1 s"):
            wait_for_leader(tmp_path, lambda _: False)


def test_a_child_of_lightning_ends_soon_after_its_parent(tmp_path):
    child = """if True:
        import sys
        from pathlib import Path
        from launch.lock import PlanError, wait_for_leader
        out = Path(sys.argv[1])
        def is_ready(_):
            (out / "waiting").touch()
            return False
        try:
            wait_for_leader(out, is_ready)
        except PlanError as error:
            (out / "said").write_text(str(error))
    """
    parent = """if True:
        import os, subprocess, sys, time
        from pathlib import Path
        environ = os.environ | {"LOCAL_RANK": "1"}
        subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], env=environ)
        while not (Path(sys.argv[2]) / "waiting").exists():
            time.sleep(0.05)
    """
    command = [sys.executable, "-c", parent, child, str(tmp_path)]
    done = subprocess.Popen(command, cwd=ROOT)
    assert done.wait(timeout=30) == 0
    deadline = time.monotonic() + 10
    while not (tmp_path / "said").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert f"found its process {done.pid}, which started this rank, at its end" in (
        (tmp_path / "said").read_text()
    )
