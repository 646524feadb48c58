"""Train one stage: Lightning's loop, our engines, checkpoints and records put together."""

import logging
import signal
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from configs.load import to_dict
from configs.schema import FREE_STAGE_KEYS, RunConfig
from train import checkpoint
from train.callbacks import Checkpoints, Progress, Records, StopSignals
from train.samples import SampleVideos
from train.stage import Stage
from train.strategy import build_strategy, uses_gpu
from train.tracking import JsonlLogger, RunInfo
from train.versions import code_version

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
    fps: int = 8,
    input_hashes: Mapping[str, str] | None = None,
    data_hash: str | None = None,
) -> None:
    """Train `stage` from its newest whole checkpoint, or from the start, to its last step.

    Afterwards the engines of the stage still answer `weights`, on all ranks together.

    Args:
        stage: Untouched networks; a checkpoint replaces all their weights.
        datamodule: Yields batches number `start_batch` to the last; `start_batch` is set here.
        folder: Of the stage; checkpoints, metrics and samples go below it.
        config: Of the run.
        stage_name: Name of the stage in the plan.
        decode: Latents [F, C, H, W] to frames [F, 3, height, width] in [-1, 1], for samples.
        fps: Of sample videos.
        input_hashes: Content of each input of the stage; a checkpoint is bound to them.
        data_hash: Of the shards, for the records.

    Raises:
        Interrupted: If SIGTERM or SIGUSR1 ended training early.
        KeyboardInterrupt: If Ctrl-C did.
        CheckpointError: If the newest checkpoint does not fit or cannot be written.
    """
    prepare_process(config)
    stage.uses_bf16 = config.trainer.precision == "bf16"
    stage.speed.peak_tflops = config.trainer.peak_tflops
    stage.identity = identity(config, stage_name, seed=stage.seed)
    stage.identity["inputs"] = dict(input_hashes or {})
    newest = checkpoint.newest_whole(folder / CHECKPOINTS)
    done = checkpoint.step_of(newest) if newest is not None else 0
    datamodule.start_batch = done  # type: ignore[attr-defined]
    signals = StopSignals()
    checkpoints = Checkpoints(
        folder / CHECKPOINTS,
        every=stage.config.checkpoint_every,
        keep=stage.config.keep,
        signals=signals,
    )
    callbacks: list[L.Callback] = []
    if decode is not None and stage.config.sample_every > 0:
        every = stage.config.sample_every
        callbacks.append(SampleVideos(folder / SAMPLES, every=every, decode=decode, fps=fps))
    about = run_info(config, stage_name, folder=folder, identity=stage.identity, data=data_hash)
    # In this order: a checkpoint says that samples and rows before it are written.
    callbacks += [checkpoints, Records(config.tracking, about)]
    callbacks.append(Progress(stage_name))
    trainer = build_trainer(config, folder, callbacks, num_batches=stage.config.steps - done)
    with signals:
        trainer.fit(stage, datamodule=datamodule)
    if checkpoints.stopped:
        if signals.received == signal.SIGINT:
            raise KeyboardInterrupt
        raise Interrupted(stage.completed)


def build_trainer(
    config: RunConfig, folder: Path, callbacks: list[L.Callback], *, num_batches: int
) -> L.Trainer:
    """A Lightning trainer that does nothing but loop: all else is in `callbacks`."""
    return L.Trainer(
        accelerator="gpu" if uses_gpu(config.trainer) else "cpu",
        strategy=build_strategy(config.trainer),
        devices=config.trainer.devices,
        num_nodes=config.trainer.num_nodes,
        precision="32-true",  # bfloat16 is autocast, in Stage
        max_epochs=1,
        limit_train_batches=num_batches,
        num_sanity_val_steps=0,
        logger=[JsonlLogger(folder / METRICS)],
        callbacks=callbacks,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )


def identity(config: RunConfig, stage_name: str, *, seed: int) -> dict[str, Any]:
    """The part of a run that decides what a stage computes; a resume must have the same."""
    whole = to_dict(config)
    stage = {
        key: value
        for key, value in whole["stages"][stage_name].items()
        if key not in FREE_STAGE_KEYS
    }
    sections = ("source", "codec", "text", "data", "model", "head")
    trainer = {key: whole["trainer"][key] for key in ("strategy", "zero_stage", "precision")}
    shared = {key: whole[key] for key in sections}
    del shared["data"]["workers"]  # who reads a sample does not change it
    return {"name": stage_name, "seed": seed, "stage": stage, "trainer": trainer} | shared


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
