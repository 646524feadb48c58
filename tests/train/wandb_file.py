"""Reads what W&B writes offline: a `.wandb` file of protobuf records.

After a header of seven bytes the file is a LevelDB log: blocks of 32 KiB that hold chunks of
records, each behind crc32 (4 bytes), length (2) and kind (1: whole, 2: first, 3: middle, 4: last).
Less than a chunk's header at the end of a block is padding.
"""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 1 << 15, struct.Struct("<IHB")
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Record]:
    """Every record of a file, in order."""
    content = path.read_bytes()
    assert content.startswith(b":W&B"), f"{path} is no file of W&B"
    place, collected = 7, b""
    while place + HEADER.size <= len(content):
        left = BLOCK - place % BLOCK
        if left < HEADER.size:
            place += left
            continue
        _, size, kind = HEADER.unpack_from(content, place)
        place += HEADER.size
        chunk = content[place : place + size]
        place += size
        collected = chunk if kind in (WHOLE, FIRST) else collected + chunk
        if kind in (WHOLE, LAST):
            yield Record.FromString(collected)


class OfflineRun:
    """The run that a file holds.

    Attributes:
        id: Of the run.
        name: Shown for it.
        group: Of the run.
        config: As it was given.
        rows: What was logged, in order: metric to value.
        files: Paths of media, relative to the run's `files`.
        artifacts: Every artifact record.
        alerts: Title and text of each.
    """

    def __init__(self, path: Path) -> None:
        self.config: dict[str, Any] = {}
        self.rows: list[dict[str, Any]] = []
        self.files: list[str] = []
        self.artifacts: list[Any] = []
        self.alerts: list[tuple[str, str]] = []
        for record in records(path):
            kind = record.WhichOneof("record_type")
            take = getattr(self, f"_take_{kind}", None)
            if take is not None:
                take(getattr(record, kind))

    def _take_run(self, run: Any) -> None:
        self.id, self.name, self.group = run.run_id, run.display_name, run.run_group
        for item in run.config.update:
            self.config[item.key] = json.loads(item.value_json)

    def _take_history(self, history: Any) -> None:
        names = ((item.key or "/".join(item.nested_key), item) for item in history.item)
        self.rows.append({name: json.loads(item.value_json) for name, item in names})

    def _take_files(self, files: Any) -> None:
        self.files += [file.path for file in files.files]

    def _take_artifact(self, artifact: Any) -> None:
        self.artifacts.append(artifact)

    def _take_alert(self, alert: Any) -> None:
        self.alerts.append((alert.title, alert.text))

    def values(self) -> dict[int, dict[str, Any]]:
        """Metrics by step, without what W&B adds."""
        found: dict[int, dict[str, Any]] = {}
        for row in self.rows:
            own = {key: row[key] for key in row if not key.startswith(("_", "trainer/"))}
            found.setdefault(row["trainer/global_step"], {}).update(own)
        return found


def offline_runs(folder: Path) -> list[OfflineRun]:
    """All runs below the `wandb` folder of a stage, oldest first."""
    return read_runs(folder, "offline-run")


def read_runs(folder: Path, prefix: str) -> list[OfflineRun]:
    """The same for folders that begin with `prefix`: `run` where there was a server."""
    wandb.teardown()  # ends the process that still writes
    paths = folder.glob(f"wandb/{prefix}-*/run-*.wandb")
    return [OfflineRun(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]
