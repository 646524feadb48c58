"""Where metrics go: metrics.jsonl is the record, Weights & Biases mirrors it."""

import json
import logging
import math
import netrc
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from lightning.pytorch.loggers import Logger, WandbLogger

from configs.schema import TrackingConfig
from train.ranks import gather_objects, rank

log = logging.getLogger(__name__)

PUBLIC_SERVER = "https://api.wandb.ai"
CONNECT_SECONDS, INIT_SECONDS = 5.0, 30.0
RUN_ID_FILE = "wandb_id"
MACHINE_KEYS = ("speed/", "memory/")
"""Beginnings of the metrics that differ from run to run."""


class MetricWindow:
    """Sums of what was reported since the last row; part of a checkpoint, so rows are exact."""

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        """Values of the last step."""
        self._sums: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, float]) -> None:
        """Take in the values of one step; a key need not come at every step."""
        self.latest = dict(values)
        for key, value in values.items():
            entry = self._sums.setdefault(key, [0.0, 0])
            entry[0] += value
            entry[1] += 1

    def close(self, peaks: Mapping[str, float] | None = None) -> dict[str, float]:
        """Mean of each key over steps and ranks since the last call.  All ranks must call it.

        Args:
            peaks: Values of this rank of which the largest of any rank joins the means.
        """
        total: dict[str, list[float]] = {}
        largest: dict[str, float] = {}
        for sums, highest in gather_objects((self._sums, dict(peaks or {}))):
            for key, (value, count) in sums.items():
                entry = total.setdefault(key, [0.0, 0])
                entry[0] += value
                entry[1] += count
            for key, value in highest.items():
                largest[key] = max(value, largest.get(key, value))
        self._sums = {}
        return {key: value / count for key, (value, count) in total.items()} | largest

    def state(self) -> dict[str, list[float]]:
        """What `load_states` needs of each rank."""
        return {key: list(entry) for key, entry in self._sums.items()}

    def load_states(self, states: Sequence[Mapping[str, list[float]]]) -> None:
        """Continue a window where `states` were taken: one, or those of several ranks, or none."""
        self._sums = {}
        for state in states:
            for key, (value, count) in state.items():
                entry = self._sums.setdefault(key, [0.0, 0])
                entry[0] += value
                entry[1] += count


class JsonlLogger(Logger):
    """One JSON object per row of metrics; a value that is not finite is written as null.

    What clock and machine decide has keys that start with one of `MACHINE_KEYS`. All other values
    of a run that was interrupted and continued equal those of a run that was not.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self._file: TextIO | None = None

    def open(self, *, resumed_step: int) -> None:
        """Start appending on rank 0, after dropping rows beyond `resumed_step`."""
        if rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            truncate_rows(self.path, last_step=resumed_step)
            self._file = self.path.open("a")

    @property
    def name(self) -> str:
        """Of the logger."""
        return "metrics"

    @property
    def version(self) -> str:
        """There is one file per stage, so nothing to tell apart."""
        return ""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        if self._file is not None:
            row = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
            self._file.write(json.dumps({"step": step} | row) + "\n")
            self._file.flush()

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing: the resolved config stands beside the file."""

    def save(self) -> None:
        """Bring all rows to the disk; called before each checkpoint."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Write everything and close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def truncate_rows(path: Path, *, last_step: int) -> None:
    """Rewrite a file of rows without those after `last_step` and without a torn last line."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        step = _step_of(line)
        if step is not None and step <= last_step:
            kept.append(line)
    temporary = path.with_name(f"{path.name}.part")
    with temporary.open("w") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _step_of(line: str) -> int | None:
    if not line.endswith("\n"):
        return None
    try:
        return int(json.loads(line)["step"])
    except (json.JSONDecodeError, KeyError, TypeError):
        return None


@dataclass(frozen=True)
class RunInfo:
    """What W&B is told of the training of a stage.

    Attributes:
        name: That the run has in W&B.
        group: Of runs that belong together.
        folder: Of the stage; the run keeps its id there across restarts, and offline files.
        config: What W&B shows as the configuration.
    """

    name: str
    group: str
    folder: Path
    config: dict[str, Any]


def build_wandb(
    tracking: TrackingConfig, about: RunInfo, *, finish_seconds: int | None = None
) -> WandbLogger | None:
    """A W&B logger that never stops training, or None if tracking is off; for rank 0.

    Without a key, or if the server cannot be reached, the run is written offline below the stage's
    folder, for `wandb sync`. If the server is lost later, everything is still on disk.

    Args:
        tracking: Mode, project and limits of patience.
        about: The run.
        finish_seconds: In place of `tracking.finish_seconds`.
    """
    if tracking.wandb == "disabled":
        return None
    import wandb  # takes a second, so only where it is used

    offline = not _can_go_online(tracking.wandb)
    about.folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "project": tracking.project,
        "group": about.group,
        "name": about.name,
        "id": _run_id(about.folder / RUN_ID_FILE),
        "dir": str(about.folder),
        "config": about.config,
        "resume": "allow",
        "settings": wandb.Settings(
            silent=True,
            console="off",
            init_timeout=INIT_SECONDS,
            finish_timeout=finish_seconds or tracking.finish_seconds,
            finish_timeout_raises=True,
        ),
    }
    try:
        run = wandb.init(mode="offline" if offline else "online", **arguments)
    except wandb.errors.Error as error:
        log.warning("W&B refused the run (%s); it is written offline below %s", error, about.folder)
        wandb.teardown()
        run = wandb.init(mode="offline", **arguments)
    return WandbLogger(experiment=run, save_dir=str(about.folder))


def close_wandb(logger: WandbLogger) -> None:
    """End the run; if the server does not take the rest in time, say where that lies."""
    run = logger.experiment
    try:
        run.finish()
    except TimeoutError:
        log.warning(
            "the W&B server did not take all of run %s in time; nothing is lost: send the rest "
            "with `wandb sync %s`",
            run.id,
            Path(run.dir).parent,
        )


def log_export(
    tracking: TrackingConfig, about: RunInfo, *, export: Path, metadata: Mapping[str, Any]
) -> None:
    """Give the files of an export to the run of its stage, as an artifact of type `model`.

    The run, which ended with the training, is opened once more; for rank 0.

    Args:
        tracking: As in `build_wandb`; `artifacts` false = do nothing.
        about: The run.
        export: Folder of the files; they are not copied, so it must stay until W&B has them.
        metadata: What W&B shows beside them.
    """
    if not tracking.artifacts:
        return
    logger = build_wandb(tracking, about, finish_seconds=tracking.upload_seconds)
    if logger is None:
        return
    import wandb

    name = about.name.replace("/", "-")
    artifact = wandb.Artifact(name, type="model", metadata=dict(metadata))
    for path in sorted(export.iterdir()):
        artifact.add_file(str(path), name=path.name, skip_cache=True, policy="immutable")
    logger.experiment.log_artifact(artifact)
    close_wandb(logger)


def alert(loggers: Iterable[Logger], *, title: str, text: str) -> None:
    """Have W&B notify whoever follows the run, if it mirrors this one; for rank 0."""
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.alert(title=title, text=text)


def _can_go_online(mode: str) -> bool:
    """Whether to use the server: a key is there (or `online` is asked for) and it answers."""
    server = os.environ.get("WANDB_BASE_URL", PUBLIC_SERVER)
    if mode == "offline" or os.environ.get("WANDB_MODE") in ("offline", "disabled"):
        return False
    if not _has_key(urlsplit(server).hostname or ""):
        if mode == "online":
            log.warning("tracking.wandb=online needs WANDB_API_KEY; the run is written offline")
        return False
    try:
        _connect(server)
    except OSError as error:
        log.warning("the W&B server %s cannot be reached (%s); writing offline", server, error)
        return False
    return True


def _connect(server: str) -> None:
    """Raise `OSError` if the server does not take a connection; behind a proxy W&B finds out."""
    address = urlsplit(server)
    host = address.hostname or ""
    if getproxies().get(address.scheme) and not proxy_bypass(host):
        return
    port = address.port or (80 if address.scheme == "http" else 443)
    socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(path: Path) -> str:
    """The id in `path`; a new one is drawn and written if there is none."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.part")
        temporary.write_text(os.urandom(4).hex())
        temporary.replace(path)
    return path.read_text().strip()
