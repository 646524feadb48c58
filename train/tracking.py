"""Where metrics go: metrics.jsonl is the record, Weights & Biases mirrors it."""

import json
import logging
import math
import netrc
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from lightning.pytorch.loggers import Logger, WandbLogger

from configs.schema import TrackingConfig
from train.ranks import gather_objects, rank

log = logging.getLogger(__name__)

PUBLIC_SERVER = "https://api.wandb.ai"
CONNECT_SECONDS = 5.0
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
        """What `load_state` needs."""
        return {key: list(entry) for key, entry in self._sums.items()}

    def load_state(self, state: Mapping[str, list[float]]) -> None:
        """Continue a window where `state` was taken."""
        self._sums = {key: list(entry) for key, entry in state.items()}


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


def build_wandb(
    tracking: TrackingConfig, *, folder: Path, name: str, config: dict[str, Any]
) -> WandbLogger | None:
    """A W&B logger that never stops training, or None if tracking is off; for rank 0.

    The run keeps its id, in `folder`, across restarts. Without a key, or if the server cannot be
    reached, it is written offline below `folder`/wandb, for `wandb sync`.

    Args:
        tracking: Mode, project and group.
        folder: Of the stage.
        name: That the run has in W&B.
        config: What W&B shows as the configuration.
    """
    if tracking.wandb == "off":
        return None
    import wandb  # takes a second, so only where it is used

    offline = not _can_go_online(tracking.wandb)
    folder.mkdir(parents=True, exist_ok=True)
    arguments: dict[str, Any] = {
        "project": tracking.project,
        "group": tracking.group or None,
        "name": name,
        "id": _run_id(folder / RUN_ID_FILE),
        "dir": str(folder),
        "config": config,
        "resume": "allow",
        "settings": wandb.Settings(silent=True, console="off", init_timeout=30),
    }
    try:
        run = wandb.init(mode="offline" if offline else "online", **arguments)
    except wandb.errors.Error as error:
        log.warning("W&B refused the run (%s); it is written offline below %s", error, folder)
        wandb.teardown()
        run = wandb.init(mode="offline", **arguments)
    return WandbLogger(experiment=run, save_dir=str(folder))


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
    address = urlsplit(server)
    port = address.port or (80 if address.scheme == "http" else 443)
    socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS).close()


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
