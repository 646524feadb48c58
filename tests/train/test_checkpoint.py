import errno
import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file

from configs.errors import UserError
from tests.train import toy
from tests.train.toy import ToyStage, toy_config, toy_stage, train
from train import checkpoint
from train.checkpoint import CheckpointError, Shelf, Snapshot, newest_whole, step_of, write
from train.engine import SingleEngine, build_engines
from train.restore import restore
from train.tracking import MACHINE_KEYS
from train.versions import code_version


def built_stage(**changes):
    """A stage with engines, as a strategy leaves it."""
    stage = toy_stage(toy_config(**changes))
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    stage.identity = {"stage": {"steps": stage.config.steps}, "seed": stage.seed}
    return stage


def snapshot_at(stage, step) -> Snapshot:
    stage.completed = step
    return checkpoint.capture(stage)


def test_a_checkpoint_says_which_code_wrote_it(tmp_path):
    code_version.cache_clear()
    folder = write(snapshot_at(built_stage(), 5), Shelf(tmp_path))
    described = checkpoint.read_marker(folder)
    assert described["code"] == code_version()
    assert described["code"].keys() in ({"commit", "dirty"}, {"version"})
    assert described["versions"]["torch"] == torch.__version__


def test_a_second_capture_asks_git_no_more(monkeypatch):
    stage = built_stage()
    first = checkpoint.capture(stage)
    monkeypatch.setattr("subprocess.run", lambda *_, **__: pytest.fail("asked again"))
    assert checkpoint.capture(stage).meta["code"] == first.meta["code"]


def test_capture_is_a_copy_that_later_steps_do_not_reach():
    stage = built_stage()
    stage.counters["critic_steps"] = 1
    taken = checkpoint.capture(stage)
    held = {key: value.clone() for key, value in taken.tensors.items()}
    engine = stage.engine("student")
    engine.backward(engine(torch.ones(2, 6)).sum())
    engine.step(0.5)
    stage.counters["critic_steps"] = 2
    stage.mean += 1
    assert all(torch.equal(held[key], value) for key, value in taken.tensors.items())
    assert taken.meta["counters"] == {"critic_steps": 1}


def test_restore_brings_back_engines_average_counters_and_own_tensors(tmp_path):
    stage = built_stage()
    for name in ("student", "critic"):
        engine = stage.engine(name)
        engine.backward(engine(torch.ones(2, 6)).sum())
        engine.step(0.1)
    stage.counters, stage.mean = {"critic_steps": 3}, torch.arange(6.0)
    stage.metrics.add({"loss": 0.1})
    other = built_stage()
    assert restore(other, write(snapshot_at(stage, 5), Shelf(tmp_path, keep=2))) == 5
    expected, found = checkpoint.capture(stage), checkpoint.capture(other)
    assert expected.meta == found.meta
    for key, value in expected.tensors.items():
        assert torch.equal(value, found.tensors[key]), key
    assert "engine.student.ema.0" in expected.tensors
    assert "engine.student.exp_avg_sq.3" in expected.tensors


def test_only_the_newest_checkpoints_stay_and_the_pointer_names_the_last(tmp_path):
    stage = built_stage()
    for step in (2, 4, 10):
        write(snapshot_at(stage, step), Shelf(tmp_path, keep=2))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "newest",
        "step-00000004",
        "step-00000010",
    ]
    assert (tmp_path / "newest").read_text() == "step-00000010\n"
    assert step_of(newest_whole(tmp_path)) == 10


def test_unfinished_and_unmarked_folders_are_not_checkpoints(tmp_path):
    assert newest_whole(tmp_path / "nowhere") is None
    stage = built_stage()
    whole = write(snapshot_at(stage, 2), Shelf(tmp_path, keep=2))
    shutil.copytree(whole, tmp_path / "step-00000004.part")
    shutil.copytree(whole, tmp_path / "step-00000006")
    (tmp_path / "step-00000006" / checkpoint.MARKER).unlink()
    assert newest_whole(tmp_path) == whole


def test_killed_between_rename_and_pointer_the_new_checkpoint_counts(tmp_path):
    stage = built_stage()
    write(snapshot_at(stage, 2), Shelf(tmp_path, keep=2))
    write(snapshot_at(stage, 4), Shelf(tmp_path, keep=2))
    (tmp_path / "newest").write_text("step-00000002\n")
    assert step_of(newest_whole(tmp_path)) == 4


def test_checkpoint_that_exists_is_never_written_again(tmp_path):
    stage = built_stage()
    whole = write(snapshot_at(stage, 2), Shelf(tmp_path, keep=2))
    before = (whole / checkpoint.MARKER).stat().st_ino
    assert write(snapshot_at(stage, 2), Shelf(tmp_path, keep=2)) == whole
    assert (whole / checkpoint.MARKER).stat().st_ino == before


def test_full_disk_names_the_cause_and_leaves_the_newest_whole_one(tmp_path, monkeypatch):
    stage = built_stage()
    whole = write(snapshot_at(stage, 2), Shelf(tmp_path, keep=1))

    def fail(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint.safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"No space left on device.*free space on that disk"):
        write(snapshot_at(stage, 4), Shelf(tmp_path, keep=1))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [whole.name]
    monkeypatch.undo()
    assert restore(built_stage(), newest_whole(tmp_path)) == 2


def test_damaged_file_is_named(tmp_path):
    whole = write(snapshot_at(built_stage(), 2), Shelf(tmp_path, keep=1))
    path = whole / "rank-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors must be the file"):
        restore(built_stage(), whole)
    path.unlink()
    with pytest.raises(CheckpointError, match="damaged or missing"):
        restore(built_stage(), whole)


def test_a_file_of_another_step_is_refused(tmp_path):
    stage = built_stage()
    old = write(snapshot_at(stage, 2), Shelf(tmp_path, keep=2))
    new = write(snapshot_at(stage, 4), Shelf(tmp_path, keep=2))
    stage.engine("student").module[0].weight.data.add_(1)
    shutil.copy(old / "rank-00000.safetensors", new)
    path = new / "rank-00000.safetensors"
    path.write_bytes(path.read_bytes().replace(b"extra.mean", b"extra.maen"))
    with pytest.raises(CheckpointError, match=r"rank-00000\.safetensors must be the file that COM"):
        restore(built_stage(), new)


def test_every_so_many_steps_a_checkpoint_stays_for_good(tmp_path):
    stage = built_stage()
    for step in (2, 5, 7, 8, 10):  # the first at or behind 4, and at or behind 8
        write(snapshot_at(stage, step), Shelf(tmp_path, keep=1, keep_every=4))
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-00000005", "step-00000008", "step-00000010"]


def test_unreadable_marker_is_named(tmp_path):
    whole = write(snapshot_at(built_stage(), 2), Shelf(tmp_path, keep=1))
    (whole / checkpoint.MARKER).write_text("{")
    with pytest.raises(CheckpointError, match=r"readable COMPLETE\.json"):
        restore(built_stage(), whole)


def test_other_configuration_is_refused_with_the_keys_that_differ(tmp_path):
    whole = write(snapshot_at(built_stage(steps=6), 2), Shelf(tmp_path, keep=1))
    other = built_stage(steps=9)
    other.identity["extra"] = 1
    expected = r"stage\.steps: 6 in the checkpoint, 9 now; extra: None in the checkpoint, 1 now"
    with pytest.raises(CheckpointError, match=expected) as caught:
        restore(other, whole)
    assert isinstance(caught.value, UserError)


def test_engine_of_another_shape_is_refused(tmp_path):
    whole = write(snapshot_at(built_stage(), 2), Shelf(tmp_path, keep=1))
    other = toy_stage(toy_config())
    other.networks["student"] = torch.nn.Sequential(torch.nn.Linear(6, 6))
    other.engines = build_engines(other.engine_specs(), SingleEngine)
    other.identity = built_stage().identity
    with pytest.raises(
        CheckpointError, match=r"'student'.*its parameters; missing: \[\], not known: \['2"
    ):
        restore(other, whole)


# The streams of ToyStream start at steps 0, 3 and 6, and those are the states it can save. What is
# being written when a step kills the run may become whole or not.
@pytest.mark.parametrize(
    ("kind", "event", "left"),
    [
        ("ToyStage", "kill:1", (None,)),
        ("ToyStage", "kill:5", (2, 4)),
        ("ToyStage", "save:4", (2,)),
        ("ToyStage", "saved:4", (2,)),
        ("ToyStage", "pointer:4", (4,)),
        ("ToyStream", "kill:5", (0, 3)),
        ("ToyStream", "save:3", (0,)),
    ],
)
def test_killed_run_continues_to_the_same_bits(run_toy, uninterrupted, tmp_path, kind, event, left):
    folder = tmp_path / "run"
    words = (folder, "--steps", 7, "--kind", kind)
    assert run_toy(*words, "--event", event) == [-signal.SIGKILL]
    newest = newest_whole(folder / "checkpoints")
    assert (step_of(newest) if newest else None) in left
    assert not (folder / "final.safetensors").exists()
    run_here(folder, kind)
    assert_same_outcome(uninterrupted(kind), folder)


def run_here(folder, kind):
    toy.main([str(folder), "--steps", "7", "--kind", kind])


def assert_same_outcome(expected, found):
    """All tensors and all rows are equal, clock readings aside."""
    one, other = (load_file(folder / "final.safetensors") for folder in (expected, found))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows_without_clocks(expected) == rows_without_clocks(found)


def rows_without_clocks(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [
        {key: value for key, value in row.items() if not key.startswith(MACHINE_KEYS)}
        for row in rows
    ]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """uninterrupted(kind) -> the folder of a run of 7 steps that nothing disturbed."""
    folders = {}

    def run(kind):
        if kind not in folders:
            folders[kind] = tmp_path_factory.mktemp(kind)
            run_here(folders[kind], kind)
        return folders[kind]

    return run


@pytest.mark.parametrize("stop_after", [1, 2, 4])
def test_four_steps_are_two_and_two(tmp_path, stop_after):
    """Stopped by an error after any number of steps, with rows that end within a window."""

    class Stop(Exception):
        pass

    class Stopping(ToyStage):
        def at_update(self, step):
            if step == stop_after:
                raise Stop

    config = toy_config(steps=5, checkpoint_every=1, log_every=3)
    train(tmp_path / "whole", config)
    with pytest.raises(Stop):
        train(tmp_path / "parts", config, toy_stage(config, Stopping))
    stage = train(tmp_path / "parts", config)
    assert stage.counters["critic_steps"] == 5
    one, other = (
        load_file(tmp_path / name / "checkpoints/step-00000005/rank-00000.safetensors")
        for name in ("whole", "parts")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert rows_without_clocks(tmp_path / "whole") == rows_without_clocks(tmp_path / "parts")
