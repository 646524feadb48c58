"""Train one stage: Lightning's loop, our engines, checkpoints and records put together."""

import logging
import os
import signal
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins import ClusterEnvironment
from lightning.fabric.plugins.environments import (
    LightningEnvironment,
    SLURMEnvironment,
    TorchElasticEnvironment,
)
from torch import Tensor

from configs.load import to_dict
from configs.schema import FREE_STAGE_KEYS, RunConfig
from train import checkpoint
from train.alarms import Alarms
from train.callbacks import Checkpoints, Progress, Records, StopSignals
from train.failures import Failures
from train.hardware import forget_peaks
from train.samples import SampleVideos
from train.stage import NonFiniteError, Stage
from train.strategy import build_strategy, patience, uses_gpu
from train.tracking import JsonlLogger, RunInfo
from train.versions import code_version
from train.watchdog import Watchdog
from train.world import SLURM, TORCHRUN, World, resolve_world

CHECKPOINTS = "checkpoints"
SAMPLES = "samples"
METRICS = "metrics.jsonl"

QUIET_LINES = (
    "GPU available:",
    "TPU available:",
    "HPU available:",
    "💡 Tip:",
    "`Trainer.fit` stopped",
    "`Trainer(limit_train_batches",
    "initializing deepspeed distributed",
)
"""Beginnings of Lightning's log lines that tell nothing about this run."""

QUIET_LOGGERS = (
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.utilities.rank_zero",
    "lightning.pytorch.strategies.deepspeed",
)

QUIET_WARNINGS = (
    r".*does not have many workers.*",
    r".*The number of training batches .* is smaller than the logging interval.*",
    r".*Found \d+ module\(s\) in eval mode at the start of training.*",
    r".*`isinstance\(treespec, LeafSpec\)` is deprecated.*",
    r"`torch\.distributed\.(all_gather_into|reduce_scatter)_tensor` is deprecated.*",
)
"""Warnings about what is meant: frozen networks, small loaders, calls inside the libraries."""


class Interrupted(SystemExit):
    """Training was asked to stop and left a whole checkpoint; as an exit, its status is 0.

    Attributes:
        step: Steps that are done.
    """

    def __init__(self, step: int) -> None:
        super().__init__(0)
        self.step = step


def fit(
    stage: Stage,
    datamodule: L.LightningDataModule,
    *,
    folder: Path,
    config: RunConfig,
    stage_name: str,
    decode: Callable[[Tensor], Tensor] | None = None,
    fps: float = 8,
    input_hashes: Mapping[str, str] | None = None,
    data_hash: str | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> None:
    """Train `stage` from its newest whole checkpoint, or from the start, to its last step.

    Afterwards the engines of the stage still answer `weights`, on all ranks together.

    Args:
        stage: Untouched networks; a checkpoint replaces all their weights.
        datamodule: Yields batches number `start_batch` to the last; `start_batch` is set when
            ranks have agreed on the checkpoint.
        folder: Of the stage; checkpoints, metrics and samples go below it.
        config: Of the run.
        stage_name: Name of the stage in the plan.
        decode: Latents [F, C, H, W] to frames [F, 3, height, width] in [-1, 1], for samples.
        fps: Of sample videos.
        input_hashes: Content of each input of the stage; a checkpoint is bound to them.
        data_hash: Of the shards, for the records.
        callbacks: More of them, called before our own.

    Raises:
        Interrupted: If SIGTERM or SIGUSR1 ended training early.
        KeyboardInterrupt: If Ctrl-C did.
        CheckpointError: If the newest checkpoint does not fit or cannot be written.
        TrainingFailure: If a loss or a gradient is not finite.
    """
    prepare_process(config)
    forget_peaks()
    attach_config(stage, config, stage_name, input_hashes=input_hashes or {})
    stage.speed.peak_tflops = config.trainer.peak_tflops
    signals = StopSignals()
    shelf = checkpoint.Shelf(folder / CHECKPOINTS, stage.config.keep, stage.config.keep_every)
    checkpoints = Checkpoints(
        shelf,
        every=stage.config.checkpoint_every,
        signals=signals,
        patience=patience(config.trainer),
    )
    watchdog = Watchdog(config.trainer)
    failures = Failures(folder, checkpoints=folder / CHECKPOINTS)
    ours: list[L.Callback] = [watchdog]
    if decode is not None and stage.config.sample_every > 0:
        every = stage.config.sample_every
        ours.append(SampleVideos(folder / SAMPLES, every=every, decode=decode, fps=fps))
    about = run_info(config, stage_name, folder=folder, identity=stage.identity, data=data_hash)
    # In this order: a checkpoint says that samples and rows before it are written; the record of a
    # failure names the checkpoint that was still being written.
    ours += [checkpoints, failures, Records(config.tracking, about)]
    ours += [Alarms(config.tracking), Progress(stage_name)]
    trainer = build_trainer(config, folder, [*callbacks, *ours])
    try:
        with signals, watchdog:
            trainer.fit(stage, datamodule=datamodule)
    except NonFiniteError as error:
        raise failures.error() from error
    if checkpoints.stopped:
        if signals.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(stage.completed)


def attach_config(
    stage: Stage, config: RunConfig, stage_name: str, *, input_hashes: Mapping[str, str]
) -> None:
    """Tell a stage the precision of its run, and what its checkpoints are bound to."""
    stage.uses_bf16 = config.trainer.precision == "bf16"
    stage.identity = identity(config, stage_name, seed=stage.seed)
    stage.identity["inputs"] = dict(input_hashes)


def build_trainer(config: RunConfig, folder: Path, callbacks: list[L.Callback]) -> L.Trainer:
    """A Lightning trainer that does nothing but loop: all else is in `callbacks`."""
    world = resolve_world(config.trainer)
    return L.Trainer(
        accelerator="gpu" if uses_gpu(config.trainer) else "cpu",
        strategy=build_strategy(config.trainer),
        devices=world.devices,
        num_nodes=world.num_nodes,
        plugins=[build_environment(world)],
        precision="32-true",  # bfloat16 is autocast, in Stage
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=[JsonlLogger(folder / METRICS)],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def build_environment(world: World) -> ClusterEnvironment:
    """Lightning's view of the launcher; chosen here, for its own guess takes shells for tasks."""
    if world.launcher == TORCHRUN:
        return TorchElasticEnvironment()
    if world.launcher == SLURM:
        # Lightning reads numbers and nodes of the job; those of the step are what runs.
        os.environ["SLURM_NTASKS"] = str(world.size)
        os.environ["SLURM_NTASKS_PER_NODE"] = str(world.devices)
        os.environ["SLURM_NNODES"] = str(world.num_nodes)
        if "SLURM_STEP_NODELIST" in os.environ:
            os.environ["SLURM_NODELIST"] = os.environ["SLURM_STEP_NODELIST"]  # rank 0 is its first
        return SLURMEnvironment(auto_requeue=False)
    return LightningEnvironment()


def identity(config: RunConfig, stage_name: str, *, seed: int) -> dict[str, Any]:
    """The part of a run that decides what a stage computes; a resume must have the same."""
    whole = to_dict(config)
    stage = {
        key: value
        for key, value in whole["stages"][stage_name].items()
        if key not in FREE_STAGE_KEYS
    }
    sections = ("source", "codec", "text", "data", "model", "head")
    shared = {key: whole[key] for key in sections}
    del shared["data"]["workers"]  # who reads a sample does not change it
    if not config.stages[stage_name].is_guided:
        del shared["text"]["negative"]
    own = {"name": stage_name, "seed": seed, "stage": stage}
    return own | {"precision": whole["trainer"]["precision"]} | shared


def run_info(
    config: RunConfig,
    stage_name: str,
    *,
    folder: Path,
    identity: Mapping[str, Any],
    data: str | None,
) -> RunInfo:
    """What W&B is told of the training of a stage; one group per run unless configured.

    Args:
        config: Of the run.
        stage_name: Name of the stage in the plan.
        folder: Of the stage.
        identity: Of the stage.
        data: Hash of the shards.
    """
    shown = {
        "config": to_dict(config),
        "identity": dict(identity),
        "code": code_version(),
        "data": data,
    }
    group = config.tracking.group or config.name
    return RunInfo(f"{config.name}/{stage_name}", group, folder, shown)


def prepare_process(config: RunConfig) -> None:
    """Set the threads of this process and leave out the lines that tell a user nothing."""
    if config.trainer.threads > 0:
        torch.set_num_threads(config.trainer.threads)
    for message in QUIET_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in QUIET_LOGGERS:
        logger = logging.getLogger(name)
        if _tells_something not in logger.filters:
            logger.addFilter(_tells_something)


def _tells_something(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(QUIET_LINES)
