"""Benchmark `train`: what a training step of a stage costs, where its time goes, how it scales."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from configs.errors import UserError
from configs.load import load_config, nearest
from configs.schema import RunConfig
from launch import benchmark
from launch.measured_train import SHAPES, measured_config, train_measured, write_latents
from launch.plan import check_stages
from launch.steps import is_leader, say, write_record
from train.versions import package_version

MEASURED = "measured.json"
"""What one number of ranks has given, in the folder of its measurement."""
STALL_GOAL_STEPS = 0.05
"""Of a checkpoint, in seconds of a step: one in every 100 steps then costs 0.05 %."""
COUNTED = (
    "seconds_per_step: median without checkpoints; share: of all measured steps, in which one "
    "checkpoint falls; tflops_per_second: of one device, matrix products, convolutions and "
    "attention, recomputed activations not counted; peak_memory_gb: largest of any rank"
)
STALL_NOTE = "main thread, per checkpoint; goal: at most 0.05 steps where one falls on 100 steps"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the stage, the shape and the ranks."""
    parser.add_argument(
        "config",
        nargs="*",
        metavar="FILE|KEY=VALUE",
        help="a plan and overrides, in place of --shape",
    )
    parser.add_argument("--stage", required=True, metavar="NAME", help="a stage of the plan")
    benchmark.add_arguments(parser)
    parser.set_defaults(repeats=20)
    parser.add_argument(
        "--steps", dest="repeats", type=int, metavar="K", help="the same as --repeats, 20"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="steps before these, not measured"
    )
    parser.add_argument(
        "--shape", metavar="NAME", help=f"one of {', '.join(SHAPES)}; demo if no plan is given"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="in place of the plan's")
    parser.add_argument(
        "--ranks", default="1", metavar="N,M", help="numbers of processes, one after the other"
    )
    parser.add_argument(
        "--strategy",
        metavar="NAME",
        help="trainer.strategy; single for one process, deepspeed for more",
    )
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)  # of a rank


def run(arguments: argparse.Namespace) -> None:
    """Train a stage of random networks on random latents and write what its steps cost.

    Every number of ranks has processes of its own. Everything goes through `fit`, twice: FLOPs are
    counted in the first training. Shards and checkpoints lie meanwhile in a new folder beside the
    record, which holds a list, an entry per number of ranks:

    - `seconds_per_step` (median, checkpoints apart) and `mean_seconds_per_step`; the rates follow
      from the mean;
    - `share` of each part in `train.spans.SPANS` and of `other` things;
    - `tokens_per_second` of all ranks, `tflops_per_second` of one device, `mfu` where the device's
      peak is known; on a CPU `ratio_to_product`: over the speed of a bare float32 matrix product
      in the same process;
    - `checkpoint_stall`: seconds that the main thread stands still for a checkpoint (copies of
      the state at the start of a stream among them), and the same in steps;
    - `layers` of the networks, and `layers_of_plan`, what they would be without `--layers`;
    - `speedup` and `efficiency` over the first number of ranks, in tokens per second.

    On a CPU, `threads` are shared out to the ranks, so that all numbers of ranks have as many.

    Raises:
        UserError: If an argument does not fit, before anything runs.
    """
    counts = _check(arguments)
    if arguments.work is not None:  # a rank of those that `_launch` has started
        _measure(arguments, int(os.environ["WORLD_SIZE"]))
        return
    if "WORLD_SIZE" in os.environ:
        raise UserError("bench train starts its processes itself; give --ranks N without torchrun")
    rows = []
    for count in counts:
        say(f"train: stage {arguments.stage}, {count} rank{'s' if count > 1 else ''}")
        rows.append(_measure_ranks(arguments, count))
        say(_line(rows[-1]))
    for row in rows:
        first = rows[0]
        row["speedup"] = row["tokens_per_second"] / first["tokens_per_second"]
        row["efficiency"] = row["speedup"] * first["ranks"] / row["ranks"]
    given = {key: value for key, value in vars(arguments).items() if value is not None}
    plan = given.pop("config")
    benchmark.write_result(argparse.Namespace(**given), rows, verb=" ".join(["train", *plan]))


def _measure_ranks(arguments: argparse.Namespace, ranks: int) -> dict[str, Any]:
    """Write the shards, measure in fresh processes, which leave nothing on a device, tidy up."""
    out = arguments.out.resolve()
    with TemporaryDirectory(prefix=f".{out.name}.", suffix=".work", dir=out.parent) as name:
        work = Path(name)
        config = _config(arguments, ranks, work)
        stage = config.stages[arguments.stage]
        write_latents(config, frames=stage.frames, count=max(8, 2 * stage.batch))
        _launch(arguments, ranks, work)
        found: dict[str, Any] = json.loads((work / MEASURED).read_text())
    return found


def _line(row: dict[str, Any]) -> str:
    layers = f"{row['layers']} of " if row["layers"] != row["layers_of_plan"] else ""
    layers += f"{row['layers_of_plan']} layers"
    speed = f"{row['tflops_per_second']:.3g} TFLOP/s"
    if row["mfu"] is not None:
        speed += f", {row['mfu']:.1%} of the peak"
    elif "ratio_to_product" in row:
        speed += f", {row['ratio_to_product']:.1%} of a bare product"
    parts = ", ".join(f"{name} {share:.0%}" for name, share in row["share"].items() if share)
    stall = row["checkpoint_stall"]
    return (
        f"{layers}: {row['seconds_per_step']:.3g} s per step, "
        f"{row['tokens_per_second']:.0f} tokens/s, {speed}; {parts}; "
        f"a checkpoint stops training for {stall['seconds']:.3g} s, {stall['steps']:.2f} steps"
    )


def _check(arguments: argparse.Namespace) -> list[int]:
    """The numbers of ranks; raises `UserError` if an argument does not fit."""
    benchmark.check_arguments(arguments, positive=("warmup",))
    if arguments.repeats < 2:
        raise UserError(
            f"--steps must be at least 2, found {arguments.repeats}: a checkpoint falls between "
            "two of them"
        )
    try:
        counts = [int(word) for word in arguments.ranks.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(
            f"--ranks must be numbers of processes such as 1,2, found {arguments.ranks!r}"
        )
    if arguments.config and arguments.shape:
        raise UserError(
            f"--shape must not be given with a plan of one's own, found {arguments.shape!r} and "
            f"{arguments.config}; leave out one"
        )
    if arguments.shape not in (None, *SHAPES):
        raise UserError(f"--shape must be one of {list(SHAPES)}, found {arguments.shape!r}")
    config = _config(arguments, counts[0])
    if arguments.stage not in config.stages:
        raise UserError(
            f"--stage must name a stage of the plan, one of {list(config.stages)}, found "
            f"{arguments.stage!r}{nearest(arguments.stage, config.stages)}"
        )
    check_stages(config)
    return counts


def _config(arguments: argparse.Namespace, ranks: int, work: Path | None = None) -> RunConfig:
    """Of a measurement, which keeps its data and checkpoints in `work`; None to look at it only."""
    words = _plan(arguments)
    if arguments.layers is not None:
        words.append(f"model.num_layers={arguments.layers}")
    strategy = arguments.strategy or ("single" if ranks == 1 else "deepspeed")
    words += [f"runs_dir={work}"] if work is not None else []
    words += [
        "name=bench",
        f"trainer.strategy={strategy}",
        f"trainer.devices={ranks}",
        f"trainer.accelerator={'gpu' if arguments.device == 'cuda' else 'cpu'}",
        f"trainer.threads={max(1, arguments.threads // ranks)}",
    ]
    return measured_config(
        words,
        ranks=ranks,
        stage_name=arguments.stage,
        num_steps=arguments.warmup + arguments.repeats,
        checkpoint_step=arguments.warmup + arguments.repeats // 2,
    )


def _plan(arguments: argparse.Namespace) -> list[str]:
    return list(arguments.config or SHAPES[arguments.shape or "demo"])


def _launch(arguments: argparse.Namespace, ranks: int, work: Path) -> None:
    """Run this command once more as so many processes, by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), "-m", "launch", "bench", "train"]
    command += [*arguments.config, "--work", str(work)]
    for name in ("stage", "out", "device", "threads", "repeats", "warmup", "shape", "layers"):
        value = getattr(arguments, name)
        command += [f"--{name}", str(value)] if value is not None else []
    if arguments.strategy is not None:
        command += ["--strategy", arguments.strategy]
    root = Path(__file__).parents[1]
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    status = subprocess.run(command, env=os.environ | own, check=False).returncode
    if status:
        plural = "s" if ranks > 1 else ""
        raise UserError(
            f"a training of {ranks} rank{plural} must end with status 0, found {status}; see its "
            "messages above"
        )


def _measure(arguments: argparse.Namespace, ranks: int) -> None:
    """Measure in this process, as one of `ranks`, and leave the result in `--work`."""
    config = _config(arguments, ranks, arguments.work)
    found = train_measured(config, arguments.stage, warmup=arguments.warmup)
    if not is_leader():
        return
    about = {
        "stage": arguments.stage,
        "kind": config.stages[arguments.stage].kind,
        "ranks": ranks,
        "strategy": config.trainer.strategy,
        "precision": config.trainer.precision,
        "threads_per_rank": config.trainer.threads,
        "layers": config.model.num_layers,
        "layers_of_plan": load_config(_plan(arguments)).model.num_layers,
        "width": config.model.num_heads * config.model.head_dim,
        "counted": COUNTED,
        "packages": {name: package_version(name) for name in ("lightning", "deepspeed")},
    }
    found["checkpoint_stall"] |= {"goal_steps": STALL_GOAL_STEPS, "about": STALL_NOTE}
    write_record(arguments.work / MEASURED, about | found)
