"""Steps of a plan: which are complete, and which continue.

A step leaves two records. STARTED.json, written before it runs, says with which settings and
inputs; DONE.json, written last and in one rename, says that it is complete. Both hold the step's
key: a hash of its settings and of the keys of the steps it reads. A folder that was made with
another key is set aside under `superseded/`, never deleted; one that holds unfinished work worth
keeping, only when that is asked for.
"""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.load import config_hash, to_dict
from launch.lock import PlanError, hold_lock, wait_for_leader
from train.world import process_rank

RESULTS_VERSION = 3
"""Part of every key; raise it when a step gives other results from the same settings."""

STARTED, DONE = "STARTED.json", "DONE.json"


@dataclass(frozen=True)
class Step:
    """One piece of work with a folder of its own.

    Attributes:
        name: Unique in the plan.
        folder: Everything it writes; set aside as a whole if it was made with other settings.
        settings: What its result depends on besides its parents; plain values.
        run: Does the work or continues it; leaves nothing partial under a final name.
        parents: Names of the steps whose output it reads.
        outputs: Paths that exist when it is complete.
        records: Folder of STARTED.json and DONE.json; `folder` if None.
        on_all_ranks: Whether every process of a distributed launch takes part.
        protect: Called before anything runs if the step was begun with other settings and has not
            ended, with the names of the steps that will run; raises if that is worth keeping.
    """

    name: str
    folder: Path
    settings: Any
    run: Callable[[], None]
    parents: tuple[str, ...] = ()
    outputs: tuple[Path, ...] = ()
    records: Path | None = None
    on_all_ranks: bool = False
    protect: Callable[[Sequence[str]], None] | None = None

    @property
    def started_file(self) -> Path:
        """Record of the last start."""
        return (self.records or self.folder) / STARTED

    @property
    def done_file(self) -> Path:
        """Record of completion."""
        return (self.records or self.folder) / DONE


def step_keys(steps: Sequence[Step]) -> dict[str, str]:
    """Key of each step by name; equal keys mean equal results.

    Args:
        steps: Every step after the steps that it reads.
    """
    keys: dict[str, str] = {}
    for step in steps:
        parents = {parent: keys[parent] for parent in step.parents}
        content = {"step": step.name, "settings": to_dict(step.settings), "parents": parents}
        keys[step.name] = config_hash(content | {"version": RESULTS_VERSION})
    return keys


def is_complete(step: Step, key: str) -> bool:
    """Whether the step has run to its end with this key and its outputs are still there."""
    outputs = (step.done_file, *step.outputs)
    return recorded_key(step.done_file) == key and all(path.exists() for path in outputs)


def recorded_key(record: Path) -> str | None:
    """The key in a record, or None if there is no readable one."""
    try:
        return json.loads(record.read_text())["key"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
        return None


def run_steps(
    steps: Sequence[Step],
    *,
    root: Path,
    check: Callable[[], None] | None = None,
    restart: bool = False,
) -> None:
    """Run every step that is not complete, in order, and say which.

    In a distributed launch every rank calls this: rank 0 holds the lock and writes the records,
    the others follow them and take part in the steps that want all ranks.

    Args:
        steps: Every step after the steps that it reads.
        root: The run folder.
        check: Called once before the first step that has to run; raises if the plan cannot work.
        restart: Set unfinished steps with other settings aside, whatever they hold.

    Raises:
        PlanError: If another process works in `root`.
        UserError: If unfinished work with other settings is protected.
    """
    with hold_lock(root) if is_leader() else nullcontext():
        keys = step_keys(steps)
        if all(is_complete(step, keys[step.name]) for step in steps):
            say(f"all {len(steps)} steps complete in {root}")
            return
        if check is not None:
            check()
        if not restart:
            _protect_unfinished(steps, keys)
        for number, step in enumerate(steps, start=1):
            label = f"step {number}/{len(steps)} {step.name}"
            if is_complete(step, keys[step.name]):
                say(f"{label}: complete")
            else:
                _run_step(step, keys[step.name], root=root, label=label)
        say(f"all {len(steps)} steps complete in {root}")


def run_one_step(
    steps: Sequence[Step],
    name: str,
    *,
    root: Path,
    check: Callable[[], None] | None = None,
    restart: bool = False,
) -> None:
    """Run the step `name` alone, as `run_steps` would.

    Raises:
        PlanError: If a step that it reads is not complete, or another process works in `root`.
        UserError: If unfinished work with other settings is protected.
    """
    with hold_lock(root) if is_leader() else nullcontext():
        keys = step_keys(steps)
        by_name = {step.name: step for step in steps}
        step, label = by_name[name], f"step {name}"
        if is_complete(step, keys[name]):
            say(f"{label}: complete in {step.folder}")
            return
        require_parents(step, by_name, keys, root=root)
        if check is not None:
            check()
        if not restart:
            _protect_unfinished([step], keys)
        _run_step(step, keys[name], root=root, label=label)
        say(f"{label}: complete in {step.folder}")


def require_parents(
    step: Step, by_name: Mapping[str, Step], keys: Mapping[str, str], *, root: Path
) -> None:
    """Raise `PlanError` unless every step that `step` reads is complete."""
    missing = [p for p in step.parents if not is_complete(by_name[p], keys[p])]
    if missing:
        raise PlanError(
            f"step {step.name!r} needs {missing} complete with the same settings, found otherwise "
            f"in {str(root)!r}; run them first, or use the verb `run`"
        )


def _protect_unfinished(steps: Sequence[Step], keys: Mapping[str, str]) -> None:
    coming = [step.name for step in steps if not is_complete(step, keys[step.name])]
    for step in steps:
        is_unfinished = step.name in coming and not step.done_file.exists()
        is_other = recorded_key(step.started_file) != keys[step.name]
        if step.protect is not None and is_unfinished and is_other:
            step.protect(coming)


def is_leader() -> bool:
    """Whether this process writes the records."""
    return process_rank() == 0


def say(text: str) -> None:
    """Tell the user one line, once per launch."""
    if is_leader():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def write_record(path: Path, content: Mapping[str, Any] | Sequence[Mapping[str, Any]]) -> None:
    """Write a JSON record that is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    with part.open("w") as file:
        json.dump(content, file, indent=2, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def _run_step(step: Step, key: str, *, root: Path, label: str) -> None:
    if not is_leader():
        _wait_for(key, step.started_file, step.done_file, root=root)
        if step.on_all_ranks and not is_complete(step, key):
            step.run()
        _wait_for(key, step.done_file, root=root)
        return
    continues = recorded_key(step.started_file) == key
    if not continues:
        _set_aside(step, root=root)
        write_record(step.started_file, {"step": step.name, "key": key})
    say(f"{label}: {'continuing' if continues else 'running'}")
    step.run()
    absent = [str(path) for path in step.outputs if not path.exists()]
    assert not absent, f"step {step.name!r} ended without {absent}"
    settings = to_dict(step.settings)
    write_record(step.done_file, {"step": step.name, "key": key, "settings": settings})


def _set_aside(step: Step, *, root: Path) -> None:
    """Move what was made with other settings out of the way."""
    if not step.folder.is_dir() or not any(step.folder.iterdir()):
        return
    old = recorded_key(step.started_file) or recorded_key(step.done_file) or "unknown"
    shelf = root / "superseded"
    shelf.mkdir(exist_ok=True)
    taken = {path.name for path in shelf.iterdir()}
    names = (f"{step.name}-{old[:8]}-{number}" for number in range(len(taken) + 1))
    target = shelf / next(name for name in names if name not in taken)
    step.done_file.unlink(missing_ok=True)
    step.folder.rename(target)
    say(f"{step.name}: settings or inputs have changed; the old folder is kept as {target}")


def _wait_for(key: str, *records: Path, root: Path) -> None:
    """Return when rank 0 has written one of the records; raises as `wait_for_leader`."""
    wait_for_leader(root, lambda _: any(recorded_key(record) == key for record in records))
