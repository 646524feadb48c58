"""The processes of a run, as the launcher that started them says before any process group exists.

A launcher is torchrun (or anything that sets its variables) or SLURM's `srun`. Without one, this
process is alone, or Lightning starts the others of this node as its children.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import ConfigError
from configs.schema import TrainerConfig

TORCHRUN, SLURM, NONE = "torchrun", "SLURM", "none"
FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""SLURM numbers the shells of a batch script and of an interactive allocation from here."""


@dataclass(frozen=True)
class World:
    """All processes of a run, and which one this is.

    Attributes:
        launcher: `TORCHRUN`, `SLURM` or `NONE`.
        rank: Number of this process.
        devices: Processes per node.
        num_nodes: Nodes.
    """

    launcher: str
    rank: int
    devices: int
    num_nodes: int

    @property
    def size(self) -> int:
        """Number of processes."""
        return self.devices * self.num_nodes


def process_rank(environ: Mapping[str, str] = os.environ) -> int:
    """Number of this process; right also where the launcher's other variables make no sense."""
    if "RANK" in environ:
        return int(environ["RANK"])
    if _is_srun(environ):
        return int(environ["SLURM_PROCID"])
    return int(environ.get("LOCAL_RANK", 0))  # of a child that Lightning started


def launched_world(environ: Mapping[str, str] = os.environ) -> World:
    """What the launcher says; without a launcher, one process on one node.

    Raises:
        ConfigError: If it says that nodes have different numbers of processes, or only a part.
    """
    rank = process_rank(environ)
    if _is_torchrun(environ):
        size, devices = int(environ["WORLD_SIZE"]), int(environ["LOCAL_WORLD_SIZE"])
        return _even_world(TORCHRUN, rank, size, devices, size // devices)
    if _is_srun(environ):
        return _slurm_world(environ, rank)
    if "RANK" in environ and int(environ.get("WORLD_SIZE", 1)) > 1 and "LOCAL_RANK" not in environ:
        raise ConfigError(
            "a launcher must set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE, found RANK and "
            "WORLD_SIZE alone; start with torchrun, or set the other two in every process"
        )
    return World(NONE, rank, 1, 1)


def resolve_world(trainer: TrainerConfig, environ: Mapping[str, str] = os.environ) -> World:
    """The processes of this run: what the config says agrees with the launcher, or is left to it.

    Raises:
        ConfigError: If the config and the launcher contradict each other, or the strategy cannot
            use so many processes.
    """
    return check_world(trainer, launched_world(environ))


def check_world(trainer: TrainerConfig, launched: World) -> World:
    """`launched` if the config agrees with it; without a launcher, what the config asks for.

    Raises:
        ConfigError: As in `resolve_world`.
    """
    if launched.launcher == NONE:
        if trainer.num_nodes > 1:
            raise ConfigError(
                f"trainer.num_nodes={trainer.num_nodes} needs a launcher on every node, found "
                "none; start with torchrun or srun, and leave trainer.num_nodes out"
            )
        world = World(NONE, launched.rank, max(1, trainer.devices), 1)
    else:
        for key in ("devices", "num_nodes"):
            wanted, found = getattr(trainer, key), getattr(launched, key)
            if wanted not in (0, found):
                raise ConfigError(
                    f"trainer.{key}={wanted} must be what the launcher started, found {found} "
                    f"({launched.launcher}); leave trainer.{key} out, or start that many"
                )
        world = launched
    if trainer.strategy == "single" and world.size > 1:
        raise ConfigError(
            f"trainer.strategy=single runs one process, found {world.size} (launcher: "
            f"{world.launcher}); set trainer.strategy to ddp or deepspeed"
        )
    return world


def _is_torchrun(environ: Mapping[str, str]) -> bool:
    # All four: DeepSpeed leaves the first three behind in any process that has trained.
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    return all(name in environ for name in names)


def _is_srun(environ: Mapping[str, str]) -> bool:
    """Whether `srun` started this process as a task, and not SLURM a shell that started it."""
    if "SLURM_PROCID" not in environ or "SLURM_NTASKS" not in environ:
        return False
    if "SLURM_STEP_ID" in environ:
        return int(environ["SLURM_STEP_ID"]) < FIRST_SPECIAL_STEP
    return environ.get("SLURM_JOB_NAME") not in ("bash", "interactive")


def _slurm_world(environ: Mapping[str, str], rank: int) -> World:
    size = int(environ.get("SLURM_STEP_NUM_TASKS", environ["SLURM_NTASKS"]))
    nodes = environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "1"))
    spread = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_NTASKS_PER_NODE")
    if spread is None:
        return _even_world(SLURM, rank, size, -(-size // int(nodes)), int(nodes))
    if re.fullmatch(r"\d+(\(x\d+\))?", spread) is None:
        raise ConfigError(
            f"every node must run as many tasks, found {spread} (SLURM); give srun "
            "--ntasks-per-node"
        )
    return _even_world(SLURM, rank, size, int(spread.partition("(")[0]), int(nodes))


def _even_world(launcher: str, rank: int, size: int, devices: int, num_nodes: int) -> World:
    if devices * num_nodes != size:
        raise ConfigError(
            f"every node must run as many processes, found {size} in all on {num_nodes} nodes with "
            f"{devices} on this one ({launcher}); start the same number on each"
        )
    return World(launcher, rank, devices, num_nodes)
