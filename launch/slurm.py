"""An sbatch script that trains on many nodes and queues up again until the training is done."""

import argparse
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.load import load_config, nearest
from configs.schema import RunConfig
from launch.plan import check_stages, plan_steps, run_folder
from launch.steps import say, step_keys
from train.world import SLURM, World, check_world

NOTICE_SECONDS = 300
"""Before the time limit, SLURM sends SIGUSR1: enough for a step and a checkpoint."""
FIRST_PORT, NUM_PORTS = 10000, 20000
"""Below the ports that Linux hands out by itself."""

TEMPLATE = """\
#!/bin/bash
{directives}

# SIGUSR1 comes before the time limit, SIGTERM at a preemption. Both are passed on to the tasks,
# which write a whole checkpoint and end with 0. Then the job queues up again, unless it is done or
# was cancelled.

set -u
cd {folder} || exit 1
export MASTER_PORT=$(({first_port} + SLURM_JOB_ID % {num_ports}))

tasks=""
missed=""
was_notified=no
was_woken=no

pass_on() {{
  was_woken=yes
  was_notified=yes
  if [ -n "$tasks" ]; then kill -s "$1" "$tasks" 2>/dev/null; else missed="$1"; fi
}}
trap 'pass_on USR1' USR1
trap 'pass_on TERM' TERM

# The last record of another plan, with other settings, has another key.
is_done() {{ grep -qsF {key} {done}; }}
is_cancelled() {{ scontrol show job "$SLURM_JOB_ID" | grep -q JobState=CANCELLED; }}

srun --nodes={nodes} --ntasks-per-node={devices} --cpus-per-task={cpus} --kill-on-bad-exit=1 \\
  {command} &
tasks=$!
# What came while the tasks were started and had no name yet.
if [ -n "$missed" ]; then pass_on "$missed"; fi

# A signal ends `wait` early; then the tasks are still at work.
while :; do
  was_woken=no
  wait "$tasks"
  status=$?
  if [ "$was_woken" = no ]; then break; fi
done

# 138, 143: the signal ended a task outside of training, in a step that continues next time.
can_continue=no
case "$status" in 0 | 138 | 143) can_continue=yes ;; esac
if [ "$was_notified$can_continue" = yesyes ] && ! is_done && ! is_cancelled; then
  echo "out of time or preempted, and not done; job $SLURM_JOB_ID queues up again"
  scontrol requeue "$SLURM_JOB_ID"
  exit $?
fi
exit "$status"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of the verb, besides the config."""
    number = {"type": int, "required": True, "metavar": "N"}
    parser.add_argument("--nodes", **number)  # type: ignore[arg-type]
    parser.add_argument("--gpus-per-node", **number, help="tasks, too")  # type: ignore[arg-type]
    parser.add_argument("--verb", choices=("run", "fit"), default="run", help="run by default")
    parser.add_argument("--stage", metavar="NAME", help="of --verb fit")
    parser.add_argument("--time", metavar="LIMIT", help="such as 24:00:00")
    parser.add_argument("--partition", metavar="NAME")
    parser.add_argument("--account", metavar="NAME")
    parser.add_argument("--job-name", metavar="NAME", help="the run's name by default")
    parser.add_argument("--cpus-per-task", type=int, metavar="N", help="threads and workers")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the script; standard output")


def write_script(arguments: argparse.Namespace) -> None:
    """Check the config and write or print the script.

    Raises:
        UserError: If the config, or what is asked of SLURM, cannot work.
    """
    config = load_config(arguments.config)
    _check(config, arguments)
    steps = plan_steps(config, last=arguments.stage)
    last = steps[-1]
    logs = run_folder(config) / "slurm"
    if re.search(r'["%\\\s]', str(logs.resolve())):
        raise UserError(
            f"runs_dir must lie where SLURM can write a log, found {str(logs.resolve())!r}; choose "
            "a path without spaces, quotes, backslashes and '%'"
        )
    logs.mkdir(parents=True, exist_ok=True)  # SLURM makes no folders, and loses the log
    script = build_script(
        _command(arguments),
        nodes=arguments.nodes,
        devices=arguments.gpus_per_node,
        cpus=arguments.cpus_per_task or cpus_per_task(config),
        uses_gpus=config.trainer.accelerator != "cpu",
        job_name=arguments.job_name or config.name,
        logs=logs.resolve(),
        done=last.done_file.resolve(),
        key=step_keys(steps)[last.name],
        limits={key: getattr(arguments, key) for key in ("time", "partition", "account")},
    )
    if arguments.out is None:
        sys.stdout.write(script)
        return
    part = arguments.out.with_name(f"{arguments.out.name}.part")
    part.write_text(script)
    part.chmod(0o755)
    part.replace(arguments.out)
    say(f"sbatch {shlex.quote(str(arguments.out))}")


def cpus_per_task(config: RunConfig) -> int:
    """CPUs of a process: its threads, its loader workers, and one for all that runs beside."""
    return (config.trainer.threads or 4) + config.data.workers + 1


def build_script(
    command: Sequence[str],
    *,
    nodes: int,
    devices: int,
    cpus: int,
    uses_gpus: bool,
    job_name: str,
    logs: Path,
    done: Path,
    key: str,
    limits: dict[str, str | None],
) -> str:
    """The text of the script.

    Args:
        command: What every task runs.
        nodes: Nodes.
        devices: Tasks per node, and GPUs.
        cpus: Of each task.
        uses_gpus: Whether to ask for GPUs at all.
        job_name: Of the job.
        logs: Folder of its log, which must exist.
        done: Record that holds `key` when the work is done.
        key: Of the last step of the work.
        limits: Further options by name; None = left out.
    """
    options = {
        "job-name": job_name,
        "nodes": str(nodes),
        "ntasks-per-node": str(devices),
        "cpus-per-task": str(cpus),
        "gpus-per-node": str(devices) if uses_gpus else None,
        **limits,
        "signal": f"B:USR1@{NOTICE_SECONDS}",
        "requeue": "",
        "open-mode": "append",
        "output": f'"{logs}/%x-%j.log"',
    }
    given = {key: value for key, value in options.items() if value is not None}
    directives = [f"#SBATCH --{key}={value}".removesuffix("=") for key, value in given.items()]
    return TEMPLATE.format(
        directives="\n".join(directives),
        done=shlex.quote(str(done)),
        key=shlex.quote(key),
        folder=shlex.quote(str(Path.cwd())),
        first_port=FIRST_PORT,
        num_ports=NUM_PORTS,
        nodes=nodes,
        devices=devices,
        cpus=cpus,
        command=shlex.join(command),
    )


def _command(arguments: argparse.Namespace) -> list[str]:
    words = [
        str(Path(sys.executable).absolute()),
        "-m",
        "launch",
        arguments.verb,
        *arguments.config,
    ]
    return words + (["--stage", arguments.stage] if arguments.stage else [])


def _check(config: RunConfig, arguments: argparse.Namespace) -> None:
    for name in ("nodes", "gpus_per_node", "cpus_per_task"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} must be 1 or more, found {value}")
    world = World(SLURM, 0, arguments.gpus_per_node, arguments.nodes)
    check_world(config.trainer, world)
    check_stages(config, ranks=world.size)
    if (arguments.verb == "fit") != (arguments.stage is not None):
        raise UserError("--stage belongs to --verb fit, and that needs it; give both or neither")
    if arguments.stage is not None and arguments.stage not in config.stages:
        raise UserError(
            f"--stage must name a stage of the plan, one of {list(config.stages)}, found "
            f"{arguments.stage!r}{nearest(arguments.stage, config.stages)}"
        )
    for name in ("time", "partition", "account", "job_name"):
        value = getattr(arguments, name)
        if value is not None and re.fullmatch(r"[\w.:,@+-]+", value) is None:
            raise UserError(
                f"--{name.replace('_', '-')} must be letters, digits and any of '.:,@+_-', found "
                f"{value!r}"
            )
