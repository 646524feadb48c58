"""`run --dry-run` and `fit --dry-run`: one step of everything, and nothing is left of it.

The config, the shards, the inputs, the strategy and the ranks are the real ones. What is written
goes to `.dry-run` beside the stages, which is removed at the end, also after an error; the next
dry run removes what a killed one has left.
"""

import contextlib
import copy
import io
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import lightning as L
import torch

from configs.errors import UserError
from configs.schema import EvaluateConfig, RunConfig, StageConfig
from data.targets import STORED
from launch.build import (
    export_stage,
    preview_decoder,
    train_stage,
)
from launch.export import load_export
from launch.inputs import load_inputs
from launch.lock import hold_lock, wait_for_leader
from launch.plan import (
    NEGATIVE_STEP,
    check_run,
    data_steps,
    negative_folder,
    plan_steps,
    run_folder,
    targets_folder,
)
from launch.steps import (
    is_complete,
    is_leader,
    require_parents,
    run_steps,
    say,
    step_keys,
)
from train import checkpoint
from train.failures import TrainingFailure
from train.fit import CHECKPOINTS, SAMPLES
from train.hardware import peak_gigabytes
from train.kinds import stage_kind
from train.ranks import barrier
from train.restore import restore
from train.samples import SampleVideos
from train.stage import Stage

SCRATCH = ".dry-run"
READY = "ready"


def dry_run(config: RunConfig, *, stage_name: str | None = None) -> None:
    """Do one step of everything that is not complete, or of one stage.

    Args:
        config: Of the run.
        stage_name: Only this stage, whose inputs must be complete; all if None, after the data.

    Raises:
        UserError: If anything of it does not work.
    """
    chosen = () if stage_name is None else (stage_name,)
    check_run(config, *chosen)
    root = run_folder(config)
    if stage_name is None:
        say("dry run: the data is needed anyway, it is made if it is not there, and stays")
        run_steps(data_steps(config), root=root)
    steps = plan_steps(config, last=stage_name)
    keys, by_name = step_keys(steps), {step.name: step for step in steps}
    done = {step.name for step in steps if is_complete(step, keys[step.name])}
    names = [name for name in config.stages if name not in done]
    if stage_name is not None:
        step = by_name[stage_name]
        given = tuple(name for name in step.parents if not name.startswith("targets-"))
        require_parents(replace(step, parents=given), by_name, keys, root=root)
        names = [stage_name]
    with (
        hold_lock(root) if is_leader() else nullcontext("") as owner,
        scratch_folder(config, done, owner) as scratch,
    ):
        small = shrink(config, names, done, scratch=scratch)
        for name in names:
            try_stage(small, name)
        if stage_name is None and config.evaluate.stages and is_leader():
            folders = [
                (run_folder(small) if name in names else root) / name
                for name in config.evaluate.stages
            ]
            try_evaluation(small, folders, run_folder(small) / "evaluate")
    say(f"dry run: everything works; nothing of it is left in {root}")


@contextmanager
def scratch_folder(config: RunConfig, done: Collection[str], owner: str) -> Iterator[Path]:
    """A folder that ends with the block; below it, a run folder with links to the data there is.

    Args:
        config: Of the run.
        done: Names of the steps that are complete.
        owner: On rank 0, what the lock of the run folder says; the other ranks go in when the
            folder says the same and that rank is seen to be at work, so not into what a killed
            dry run has left.

    Raises:
        PlanError: On another rank, if rank 0 is not at work.
    """
    root = run_folder(config)
    scratch = (root / SCRATCH).resolve()
    if not is_leader():
        wait_for_leader(root, lambda leader: leader != "" and _read_ready(scratch) == leader)
        yield scratch
        return
    try:
        if scratch.exists():
            shutil.rmtree(scratch)
        data = scratch / config.name / "data"
        data.mkdir(parents=True)
        linked = [targets_folder(config, name) for name in config.stages]
        linked = [folder for folder in linked if folder.name in done]
        linked += [negative_folder(config)] if NEGATIVE_STEP in done else []
        for folder in (root / "data" / "latents", *linked):
            (data / folder.name).symlink_to(folder.resolve())
        (scratch / READY).write_text(owner)
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_ready(scratch: Path) -> str | None:
    try:
        return (scratch / READY).read_text()
    except FileNotFoundError:
        return None


def shrink(
    config: RunConfig, names: Collection[str], done: Collection[str], *, scratch: Path
) -> RunConfig:
    """The run with stages of one training step below `scratch`.

    Args:
        config: Of the run; it stays as it is.
        names: Stages to keep; the others give their real exports.
        done: Names of the steps that are complete.
        scratch: From `scratch_folder`.
    """
    root, small = run_folder(config).resolve(), copy.deepcopy(config)
    small.runs_dir = str(scratch)
    small.tracking.wandb = "disabled"
    small.stages = {name: stage for name, stage in small.stages.items() if name in names}
    for name, stage in small.stages.items():
        stage.inputs = {
            role: str(root / origin) if origin in config.stages and origin not in names else origin
            for role, origin in stage.inputs.items()
        }
        _shorten(stage, has_targets=targets_folder(config, name).name in done)
    small.evaluate = _smallest(config.evaluate, config.model.frames_per_block)
    return small


def _shorten(stage: StageConfig, *, has_targets: bool) -> None:
    """One step in which every network is trained, after one that gathers statistics if need be."""
    known = {entry.name for entry in fields(stage_kind(stage.kind).params_type)}
    stage.steps = 1
    if "student_every" in known:
        stage.params["student_every"] = 1
    if "statistics_steps" in known:
        stage.steps = 2
        stage.params["statistics_steps"] = 1
    if stage.params.get("targets") == STORED and not has_targets:
        stage.params["targets"] = "online"  # to store them takes a pass over all clips
    stage.checkpoint_every, stage.sample_every, stage.log_every = stage.steps, 0, 1


def _smallest(settings: EvaluateConfig, block: int) -> EvaluateConfig:
    return replace(
        settings,
        frames=[settings.prefix_frames + block],
        budgets=settings.budgets[:1],
        seeds=settings.seeds[:1],
        clips_per_seed=1,
        tune_clips=1,
        age_weights=settings.age_weights[:1],
        weights=settings.weights[:1],
        steps=1,
        quality_steps=[],
        reference_steps=1,
        videos=1,
        forms=[],
        long_budgets=settings.long_budgets[:1],
        long_clips_per_seed=1,
    )


class Stopwatch(L.Callback):
    """Seconds of the parts of a training, by name, between calls of `lap`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Count the time since the last lap as `name`."""
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def on_train_batch_start(self, *arguments: Any) -> None:
        """All before the first step is preparation."""
        self.lap("networks, inputs and engines")

    def on_train_batch_end(self, *arguments: Any) -> None:
        """A step is done; samples and checkpoint follow."""
        self.lap("training")

    def on_train_end(self, *arguments: Any) -> None:
        """The checkpoint is written last."""
        self.lap("checkpoint written")


class VideoLap(L.Callback):
    """Stands behind the sample videos."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch = watch

    def on_train_batch_end(self, *arguments: Any) -> None:
        """Samples are made."""
        self.watch.lap("sample video")


def try_stage(config: RunConfig, name: str) -> None:
    """Train, sample, save, read back, export and load a stage of a shrunk run; say how it went."""
    folder, watch, settings = run_folder(config) / name, Stopwatch(), config.stages[name]
    decode, fps = preview_decoder(config), config.fps
    videos = SampleVideos(folder / SAMPLES, every=settings.steps, decode=decode, fps=fps)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    try:
        inputs = load_inputs(config, name)
        stage = train_stage(config, name, inputs, callbacks=[watch, videos, VideoLap(watch)])
    except TrainingFailure as failure:
        raise UserError(
            f"dry run of stage {name!r}: {str(failure).partition(';')[0]}; train it without "
            "--dry-run to keep the samples' names"
        ) from failure
    untrained = [net for net in stage.networks if f"grad_norm/{net}" not in stage.metrics.latest]
    assert not untrained, f"a dry run trains every network, not so {untrained}"
    watch.lap("checkpoint written")
    check_checkpoint(stage, folder / CHECKPOINTS)
    watch.lap("checkpoint read back and compared")
    export_stage(config, name, stage, inputs)
    stage.close()
    barrier()  # the next stage reads it
    if is_leader():
        load_export(folder)
    watch.lap("export written and loaded")
    if not list((folder / SAMPLES).glob("*.mp4")):
        del watch.seconds["sample video"]
    losses = [f"{key} {value:.4g}" for key, value in stage.metrics.latest.items() if "loss" in key]
    say(f"dry run of stage {name}: {', '.join(losses)}")
    for part, seconds in watch.seconds.items():
        say(f"  {part}: {seconds:.2f} s")
    say(f"  peak memory: {peak_gigabytes(stage.device):.2f} GB")


def check_checkpoint(stage: Stage, folder: Path) -> None:
    """Read the newest checkpoint back into `stage` and compare it with what was to be saved.

    Raises:
        UserError: If it is another.
    """
    saved = checkpoint.newest_whole(folder)
    assert saved is not None
    expected = stage.snapshot().tensors
    restore(stage, saved)
    found = checkpoint.capture(stage).tensors
    # Generators go on; all else must be what it was.
    names = {key for key in {*expected, *found} if not key.startswith("random.")}
    for key in sorted(names):
        if key not in expected or key not in found or not torch.equal(expected[key], found[key]):
            raise UserError(
                f"{saved} must read back as it was written, its {key!r} does not; check the disk"
            )


def try_evaluation(config: RunConfig, folders: list[Path], out: Path) -> None:
    """The smallest evaluation there is; what it finds means nothing and is not shown."""
    from launch.evaluate import evaluate

    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluate(config, folders, out)
    say(f"dry run of evaluate: {time.perf_counter() - start:.2f} s")
