"""Command line: `python -m launch VERB ...`.

Exit status 0: done, or stopped by SIGTERM with a checkpoint; 2: bad input, or a loss that is not
finite, one sentence on stderr; 130: Ctrl-C. `replay` ends with 1 if the failed step is finite now.
Anything else is a bug and shows a traceback.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from configs.errors import UserError
from configs.load import is_override, load_config, nearest
from configs.schema import RunConfig
from train.memory import keep_freed_memory
from train.world import process_rank


class Verb(NamedTuple):
    """One thing the command line can do.

    Attributes:
        purpose: One line of help.
        example: Arguments after `python -m launch`.
        declare: Adds the arguments to a parser.
        act: Does it.
    """

    purpose: str
    example: str
    declare: Callable[[argparse.ArgumentParser], Any]
    act: Callable[[argparse.Namespace], None]


class Parser(argparse.ArgumentParser):
    """A parser that raises instead of exiting, and suggests the nearest option."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError` with one sentence."""
        raise UserError(f"{self.prog}: {message}; see {self.prog} --help")

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse; options may stand anywhere, but for those of a benchmark, after its name."""
        if self._subparsers is not None:
            return self.parse_args(args, namespace)
        return super().parse_intermixed_args(args, namespace)

    def check_options(self, words: Sequence[str]) -> None:
        """Raise `UserError` at the first word that looks like an option and is none."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                if words and words[0] in action.choices:
                    action.choices[words[0]].check_options(words[1:])
                return
        options = [option for action in self._actions for option in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            if re.fullmatch(r"--[a-z][\w-]*", name) and name not in options:
                hint = nearest(name, options) or f"; choose from {options}"
                raise UserError(f"{self.prog} has no option {name!r}{hint}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out one command; returns its exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    keep_freed_memory()
    try:
        _dispatch(words)
    except UserError as error:
        return _fail(str(error))
    except FileNotFoundError as error:
        if str(error.filename) not in words:
            raise
        return _fail(f"{error.filename!r} must exist, found no such file; check the path")
    except KeyboardInterrupt:
        sys.stderr.write("\ninterrupted; continue with the same command\n")
        return 130
    return 0


def _dispatch(words: list[str]) -> None:
    if not words or words[0] in ("-h", "--help", "help"):
        sys.stdout.write(_overview())
        return
    name = words[0]
    if name not in VERBS:
        hint = nearest(name, VERBS) or f"; choose one of {list(VERBS)}"
        raise UserError(f"{name!r} is not a verb of python -m launch{hint}")
    verb = VERBS[name]
    parser = Parser(
        prog=f"python -m launch {name}",
        description=verb.purpose,
        epilog=f"example:\n  python -m launch {verb.example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verb.declare(parser)
    parser.check_options(words[1:])
    verb.act(parser.parse_intermixed_args(words[1:]))


def _fail(message: str) -> int:
    """Report bad input in one line; returns the exit status."""
    rank = process_rank()
    prefix = f"rank {rank}: " if rank else ""
    sys.stderr.write(f"{prefix}error: {' '.join(message.split())}\n")
    return 2


def _overview() -> str:
    lines = ["usage: python -m launch VERB ... (VERB --help says more)", ""]
    lines += [f"  {name:<9} {verb.purpose}" for name, verb in VERBS.items()]
    lines += ["", "examples:"]
    lines += [f"  python -m launch {verb.example}" for verb in VERBS.values()]
    return "\n".join([*lines, ""])


def _config_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="+",
        metavar="FILE|KEY=VALUE",
        help="YAML files, merged left to right, then overrides such as stages.teacher.steps=100",
    )


def _run_arguments(parser: argparse.ArgumentParser) -> None:
    _config_arguments(parser)
    parser.add_argument(
        "--restart",
        action="store_true",
        help="set unfinished stages that were begun with other settings aside, and start them anew",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="do one step of everything in a folder that is removed again",
    )


def _fit_arguments(parser: argparse.ArgumentParser) -> None:
    _run_arguments(parser)
    parser.add_argument("--stage", required=True, metavar="NAME", help="a stage of the plan")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "arguments",
        nargs="+",
        metavar="CKPT|KEY=VALUE",
        help="stage folders or exports of students, and overrides such as evaluate.steps=2",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="YAML of the run; by default config.yaml in the first checkpoint's stage folder",
    )


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, such as runs/demo")


def _replay_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.replay import add_arguments

    add_arguments(parser)


def _replay(arguments: argparse.Namespace) -> None:
    from launch.replay import run

    run(arguments)


def _export_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.publish import add_arguments

    add_arguments(parser)


def _bench_arguments(parser: argparse.ArgumentParser) -> None:
    from launch import (
        benchmark_codec,
        benchmark_rollout,
        benchmark_targets,
        benchmark_train,
    )

    benchmarks: dict[str, tuple[Callable[[Any], None], Callable[[Any], None]]] = {
        "targets": (benchmark_targets.add_arguments, benchmark_targets.run),
        "rollout": (benchmark_rollout.add_arguments, benchmark_rollout.run),
        "train": (benchmark_train.add_arguments, benchmark_train.run),
        "codec": (benchmark_codec.add_arguments, benchmark_codec.run),
    }
    choose = parser.add_subparsers(dest="name", metavar="NAME", required=True)
    for name, (declare, act) in benchmarks.items():
        one = choose.add_parser(name, allow_abbrev=False, help=f"NAME {name} --help says more")
        declare(one)
        one.set_defaults(act=act)


def _bench(arguments: argparse.Namespace) -> None:
    arguments.act(arguments)


def _sample_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.sample import add_arguments

    add_arguments(parser)


def _slurm_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.slurm import add_arguments

    _config_arguments(parser)
    add_arguments(parser)


def _slurm(arguments: argparse.Namespace) -> None:
    from launch.slurm import write_script

    write_script(arguments)


def _run(arguments: argparse.Namespace) -> None:
    from launch.plan import run

    config = load_config(arguments.config)
    if arguments.dry_run:
        _try(config, None)
    else:
        run(config, restart=arguments.restart)


def _try(config: RunConfig, stage_name: str | None) -> None:
    from launch.dry_run import dry_run

    dry_run(config, stage_name=stage_name)


def _run_data_step(name: str) -> Callable[[argparse.Namespace], None]:
    def act(arguments: argparse.Namespace) -> None:
        from launch.plan import run_one

        run_one(load_config(arguments.config), name)

    return act


def _fit(arguments: argparse.Namespace) -> None:
    from launch.plan import run_one

    config = load_config(arguments.config)
    if arguments.stage not in config.stages:
        hint = nearest(arguments.stage, config.stages)
        raise UserError(
            f"--stage must name a stage of the plan, one of {list(config.stages)}, found "
            f"{arguments.stage!r}{hint}"
        )
    if arguments.dry_run:
        _try(config, arguments.stage)
    else:
        run_one(config, arguments.stage, restart=arguments.restart)


def _sample(arguments: argparse.Namespace) -> None:
    from launch.sample import sample

    sample(arguments)


def _evaluate(arguments: argparse.Namespace) -> None:
    from launch.evaluate import evaluate

    ckpts = [Path(word) for word in arguments.arguments if not is_override(word)]
    overrides = [word for word in arguments.arguments if is_override(word)]
    if not ckpts:
        raise UserError("evaluate needs at least one checkpoint, found none; give stage folders")
    evaluate(_run_config(ckpts[0], arguments.config, overrides), ckpts, arguments.out)


def _run_config(ckpt: Path, file: str | None, overrides: list[str]) -> RunConfig:
    """The config in `file`, or that of the run which made the checkpoint."""
    from launch.export import find_export

    found = file or str(find_export(ckpt).parent / "config.yaml")
    if not Path(found).is_file():
        raise UserError(
            f"the config of the run must be known, found no file {found!r}; give --config FILE"
        )
    return load_config([found, *overrides])


def _report(arguments: argparse.Namespace) -> None:
    from launch.report import write_report
    from launch.steps import say

    if not arguments.run.is_dir():
        raise UserError(
            f"run folder {str(arguments.run)!r} must exist, found none"
            f"{nearest(str(arguments.run), map(str, arguments.run.parent.glob('*')))}"
        )
    say(str(write_report(arguments.run)))


def _export(arguments: argparse.Namespace) -> None:
    from launch.publish import run

    run(arguments)


def _import_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.importing import add_arguments

    add_arguments(parser)


def _import(arguments: argparse.Namespace) -> None:
    from launch.importing import run

    run(arguments)


def _plan_arguments(parser: argparse.ArgumentParser) -> None:
    from launch.forecast import add_arguments

    _config_arguments(parser)
    add_arguments(parser)


def _plan(arguments: argparse.Namespace) -> None:
    from launch.forecast import run

    run(arguments)


def _show(arguments: argparse.Namespace) -> None:
    from launch.show import describe
    from launch.steps import say

    say(describe(load_config(arguments.config)))


VERBS: dict[str, Verb] = {
    "run": Verb(
        "Carry out a whole plan; skip what is complete, continue what was interrupted.",
        "run configs/demo.yaml",
        _run_arguments,
        _run,
    ),
    "world": Verb(
        "Render the built-in world to mp4 files with captions and ground truth.",
        "world configs/demo.yaml source.world.clips=100",
        _config_arguments,
        _run_data_step("world"),
    ),
    "ingest": Verb(
        "Check videos with captions and pack them into shards.",
        "ingest configs/clips.yaml source.path=my_videos",
        _config_arguments,
        _run_data_step("ingest"),
    ),
    "encode": Verb(
        "Decode the shards of videos and write shards of latents.",
        "encode configs/demo.yaml",
        _config_arguments,
        _run_data_step("encode"),
    ),
    "fit": Verb(
        "Train one stage of a plan; what torchrun calls.",
        "fit configs/demo.yaml --stage teacher stages.teacher.steps=50",
        _fit_arguments,
        _fit,
    ),
    "slurm": Verb(
        "Check a plan and write the sbatch script that carries it out on many nodes.",
        "slurm configs/demo.yaml configs/cluster.yaml --nodes 2 --gpus-per-node 8 "
        "--time 24:00:00 --out demo.sbatch",
        _slurm_arguments,
        _slurm,
    ),
    "replay": Verb(
        "Repeat the steps up to one that was not finite and take it apart, sample by sample.",
        "replay runs/demo/distill",
        _replay_arguments,
        _replay,
    ),
    "sample": Verb(
        "Generate a video of any length, under the cache policy of training or another.",
        'sample runs/demo/streaming --prompt "..." --frames 240 --budget 128 --out x.mp4',
        _sample_arguments,
        _sample,
    ),
    "evaluate": Verb(
        "Compare the cache policies on long rollouts.",
        "evaluate runs/demo/causal runs/demo/streaming --out runs/demo/again evaluate.seeds=[3]",
        _evaluate_arguments,
        _evaluate,
    ),
    "report": Verb(
        "Write the page that shows a run's evaluation.",
        "report runs/demo",
        _report_arguments,
        _report,
    ),
    "export": Verb(
        "Write a trained transformer and its head for diffusers, ComfyUI or Self-Forcing.",
        "export runs/tiny/streaming weights --format diffusers --verify",
        _export_arguments,
        _export,
    ),
    "import": Verb(
        "Bring in a Wan2.1 checkpoint or one of its causal descendants, to start stages from.",
        "import Wan2.1-T2V-1.3B weights/teacher --role teacher",
        _import_arguments,
        _import,
    ),
    "show": Verb(
        "Print the resolved config, parameter counts, cache sizes and the steps of the plan.",
        "show configs/demo.yaml model.num_layers=30",
        _config_arguments,
        _show,
    ),
    "plan": Verb(
        "Work out memory, time, disk and traffic of a run before anything is allocated.",
        "plan configs/wan_14b.yaml --nodes 8 --gpus-per-node 8 --gpu h200 --figure plan.png",
        _plan_arguments,
        _plan,
    ),
    "bench": Verb(
        "Measure the speed and memory of one part on this machine.",
        "bench targets --length 2048 --dtype bfloat16 --out targets.json",
        _bench_arguments,
        _bench,
    ),
}


if __name__ == "__main__":
    sys.exit(main())
