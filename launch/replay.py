"""`python -m launch replay`: repeat the steps up to a failed one, and take that one apart.

In one process, from the newest whole checkpoint that is not after the failed step. Nothing is
written but `replay.json` in the folder of the stage.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configs.errors import UserError
from configs.load import load_config
from configs.schema import RunConfig
from data.batches import LatentBatches
from data.files import write_atomically
from launch.build import build_stage
from launch.inputs import load_inputs
from launch.lock import hold_lock
from launch.steps import say
from train import checkpoint
from train.callbacks import LINE_SECONDS
from train.dissection import Finding, Loner
from train.engine import SingleEngine, build_engines
from train.failures import (
    Failure,
    describe_samples,
    failure_path,
    newest_failure,
    read_failure,
    step_number,
)
from train.fit import CHECKPOINTS, attach_config, prepare_process
from train.memory import settle
from train.randomness import derive_seed, seed_generators
from train.restore import restore, restore_random
from train.stage import NonFiniteError, Stage
from train.strategy import uses_gpu

RESULT = "replay.json"
NOT_REPRODUCED = 1
"""Exit status where the failed step turned out finite."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the words of the command line."""
    parser.add_argument(
        "folder", type=Path, metavar="STAGE_FOLDER", help="such as runs/demo/distill"
    )
    parser.add_argument(
        "--step", type=int, metavar="N", help="counted from 1; by default the last that failed"
    )


def run(arguments: argparse.Namespace) -> None:
    """Carry out the command.

    Raises:
        SystemExit: With status 1 if a step that failed is finite here.
    """
    folder: Path = arguments.folder
    config = read_config(folder)
    step = find_step(folder, arguments.step, num_steps=config.stages[folder.name].steps)
    record = failure_path(folder, step)
    failure = read_failure(record) if record.exists() else None
    with hold_lock(folder.parent):
        result = replay(config, folder, step)
        if failure is not None:
            require_samples(failure, result["samples"])
        write_atomically(folder / RESULT, json.dumps(result, indent=1).encode())
    say(table(result))
    if result["failed"] or failure is None:
        say(f"{'reproduced' if result['failed'] else 'finite'}; {folder / RESULT} says the rest")
        return
    say(
        f"step {step} failed before but is finite here: it ran on other hardware, with another "
        "number of ranks or with trainer.compile, or the failure does not repeat; continue the "
        "training with the command that started it"
    )
    raise SystemExit(NOT_REPRODUCED)


def read_config(folder: Path) -> RunConfig:
    """The config of the stage in `folder`, for one process in which every module can be watched.

    Raises:
        UserError: If the folder is not that of a stage which has begun.
    """
    file = folder / "config.yaml"
    if not file.is_file():
        raise UserError(
            f"a replay needs the folder of a stage that has begun, found no {str(file)!r}; give a "
            "folder such as runs/demo/distill"
        )
    folder = folder.resolve()
    config = load_config([str(file)])
    if folder.name not in config.stages:
        raise UserError(
            f"{str(folder)!r} must be the folder of a stage of its config, one of "
            f"{list(config.stages)}, found {folder.name!r}; give it the name it was made with"
        )
    config.name, config.runs_dir = folder.parent.name, str(folder.parent.parent)
    trainer = config.trainer
    trainer.strategy, trainer.devices, trainer.num_nodes = "single", 1, 1
    trainer.activation_checkpointing = trainer.compile = False
    return config


def find_step(folder: Path, wanted: int | None, *, num_steps: int) -> int:
    """The step, from 1, that is meant: `wanted`, or the last that failed.

    Raises:
        UserError: If there is none.
    """
    if wanted is not None:
        if not 1 <= wanted <= num_steps:
            raise UserError(f"--step must lie in 1 .. {num_steps}, found {wanted}")
        return wanted
    failure = newest_failure(folder)
    if failure is None:
        raise UserError(
            f"{str(folder)!r} must hold the record of a step that failed, found none; give --step N"
        )
    return step_number(failure)


def require_samples(failure: Failure, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise `UserError` unless the step was repeated on the samples that it failed on."""
    recorded = [key for entry in failure.ranks for key in entry["keys"]]
    found = [sample["key"] for sample in samples]
    if recorded != found:
        raise UserError(
            f"step {failure.step} must be repeated on the samples that it failed on, {recorded}, "
            f"found {found}; the shards have changed since: restore them"
        )


def replay(config: RunConfig, folder: Path, step: int) -> dict[str, Any]:
    """Repeat the training up to `step` (from 1) and take that step apart.

    Returns:
        What replay.json holds.

    Raises:
        UserError: If inputs, shards or checkpoint do not fit, or the step trains nothing.
    """
    prepare_process(config)
    name = folder.name
    stage, datamodule = build_stage(config, name)
    hashes = {role: export.hash for role, export in load_inputs(config, name).items()}
    attach_config(stage, config, name, input_hashes=hashes)
    device = torch.device("cuda" if uses_gpu(config.trainer) else "cpu")
    settle(stage, device)
    stage.to(device)
    stage.engines = build_engines(stage.engine_specs(), SingleEngine)
    source = restore_before(stage, folder / CHECKPOINTS, step)
    say(f"from {source or 'the start of the stage'}: {step - 1 - stage.completed} steps to repeat")
    samples, together = repeat(stage, datamodule.batches(), step)
    if not any(sample["losses"] for sample in samples):
        raise UserError(
            f"step {step} of stage {name!r} must train a network to be taken apart, it only "
            "gathers statistics; give --step N with a later step"
        )
    failed = isinstance(together, NonFiniteError)
    return {
        "step": step,
        "checkpoint": source,
        "failed": failed,
        "together": str(together) if failed else together,
        "samples": samples,
    }


def restore_before(stage: Stage, checkpoints: Path, step: int) -> str | None:
    """Bring `stage` to its newest whole checkpoint that is not after the start of `step`.

    Returns:
        Name of the checkpoint; None for the start of the stage.
    """
    source = checkpoint.newest_whole(checkpoints, before=step)
    if source is None:
        seed_generators(derive_seed(stage.seed, "rank", 0))
        return None
    restore(stage, source)
    restore_random(stage, source)
    return source.name


def repeat(
    stage: Stage, batches: LatentBatches, step: int
) -> tuple[list[dict[str, Any]], dict[str, float] | NonFiniteError]:
    """Train up to `step` (from 1), that one included.

    Returns:
        What each sample does in that step alone, and what all do together: what the step reports,
        or how it failed.
    """
    loners: list[Loner] = []
    last_line = time.monotonic()
    # None: only in a terminal.
    for number in tqdm(range(stage.completed, step), desc="replay", unit="step", disable=None):
        batch = batches[number].to(stage.device)
        is_last = number == step - 1
        # A sample alone in a stream must have been alone in it from its start.
        if is_last or stage.restarts_at_snapshot:
            loners = loners or [Loner(stage, index) for index in range(len(batch.seeds))]
            findings = [loner.observe(batch, number) for loner in loners]
            described = describe_samples(stage.batch_at_work(batch))
        if time.monotonic() - last_line > LINE_SECONDS and not sys.stderr.isatty():
            last_line = time.monotonic()
            say(f"replay: step {number + 1}/{step}")
        try:
            with stage.autocast():
                reported = stage.update(batch, number)
        except NonFiniteError as error:
            if not is_last:
                raise UserError(
                    f"step {step} must be reached to be taken apart, step {number + 1} failed "
                    f"first ({error}); give --step {number + 1}"
                ) from error
            return list_samples(described, findings), error
        stage.completed = number + 1
    return list_samples(described, findings), {k: float(v) for k, v in reported.items()}


def list_samples(
    described: Mapping[str, Sequence[Any]], findings: Sequence[Finding]
) -> list[dict[str, Any]]:
    """One JSON object per sample: what it is, what it does, numbers that are not finite as text."""

    def shown(numbers: Mapping[str, float]) -> dict[str, float | str]:
        return {
            name: value if math.isfinite(value) else repr(value) for name, value in numbers.items()
        }

    return [
        {name.removesuffix("s"): values[index] for name, values in described.items()}
        | asdict(finding)
        | {"losses": shown(finding.losses), "grad_norms": shown(finding.grad_norms)}
        | {"is_finite": finding.is_finite}
        for index, finding in enumerate(findings)
    ]


def table(result: Mapping[str, Any]) -> str:
    """Losses and gradient norms of every sample, then where the first that is not finite broke."""
    samples = result["samples"]
    networks = list(samples[0]["losses"])
    header = ["sample", *(f"{kind}/{name}" for name in networks for kind in ("loss", "grad_norm"))]
    rows = [header]
    for sample in samples:
        numbers = (sample[kind][name] for name in networks for kind in ("losses", "grad_norms"))
        shown = [value if isinstance(value, str) else f"{value:.4g}" for value in numbers]
        rows.append([str(sample["key"]), *shown])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    bad = [sample for sample in samples if not sample["is_finite"]]
    if not bad and result["failed"]:
        lines.append(f"every sample alone is finite, together they are not: {result['together']}")
    for sample in bad[:1]:
        parameters = sample["parameters"]
        lines += [
            f"first sample that is not finite: {sample['key']}",
            f"  of its own tensors: {', '.join(sample['inputs']) or 'none'}",
            f"  first module whose output is not finite: {sample['module'] or 'none'}",
            f"  parameters whose gradient is not finite: {len(parameters)}, first "
            f"{', '.join(parameters[:3]) or 'none'}",
        ]
    return "\n".join(lines)
