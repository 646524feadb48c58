"""`python -m launch evaluate`: compare cache policies on rollouts of held-out clips.

out/
  clips/            held-out clips, by way of mp4 files, shards and codec like the training data
  rows.jsonl        what is finished; a killed evaluation continues behind it
  videos/, kept.safetensors, salience.safetensors    material of the report
  results.json      written last
"""

import json
import os
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from configs.errors import UserError
from configs.schema import RunConfig
from data.files import write_atomically
from launch.arena import Arena, check_budgets, load_arena
from launch.claims import claims_of
from launch.contest import Job, contestants, plan_jobs
from launch.exhibits import examine_heads, shown_contestants, write_videos
from launch.held_out import prepare
from launch.lock import hold_lock
from launch.steps import say
from launch.workers import run_jobs
from train.fit import prepare_process

TEST_FIELDS = ("policies", "forms", "quality", "prefix_free")


def evaluate(config: RunConfig, ckpts: Sequence[Path], out: Path) -> None:
    """Roll out every student with its cache policies and write `out/results.json`.

    The result depends on nothing but config and checkpoints, `frames_per_second` aside.

    Args:
        config: Of the run; `config.evaluate` says what to compare.
        ckpts: Stage folders or exports of students; the first is compared with all policies.
        out: Folder of the results; what an interrupted evaluation left there is used.

    Raises:
        UserError: If a checkpoint, a budget or a length does not fit, or the videos have no truth.
    """
    if not ckpts:
        raise UserError("an evaluation needs at least one checkpoint of a student, found none")
    prepare_process(config)
    with hold_lock(out):
        _evaluate(config, ckpts, out)


def _evaluate(config: RunConfig, ckpts: Sequence[Path], out: Path) -> None:
    clips = out / "clips"
    prepare(config, clips)
    arena = load_arena(config, ckpts, clips)
    jobs = plan_jobs(config.evaluate, has_head=arena.has_head, has_teacher=arena.has_teacher)
    check_budgets(arena, jobs)
    record = Record(out / "rows.jsonl")
    with tqdm(total=len(jobs), desc="evaluate", unit="rollout") as bar:
        tuning = [job for job in jobs if job.section == "tuning"]
        _work(arena, tuning, record, bar, ckpts=ckpts, clips=clips)
        ages = choose_age_weights([(job, record.rows(arena.key(job))) for job in tuning])
        rest = [resolve_age(job, ages) for job in jobs if job.section != "tuning"]
        _work(arena, rest, record, bar, ckpts=ckpts, clips=clips)
    results = {
        "name": config.name,
        "plan": list(config.stages),
        "stages": list(arena.students),
        "world": arena.world(),
        "device": arena.clips.latents.device.type,
        **_rows_by_section(arena, rest, record),
        "tuning": [_without_rollout(row) for job in tuning for row in record.rows(arena.key(job))],
        "head": examine_heads(arena, out / "salience.safetensors"),
    }
    write_videos(arena, _shown_jobs(arena, ages), out / "videos")
    write_atomically(out / "results.json", json.dumps(results, indent=1).encode())
    for claim in claims_of(results):
        say(str(claim))


class Record:
    """Rows of finished jobs, by the key of the job, in a file that survives a kill.

    A torn last line is dropped, rows of other settings stay and are not used.

    Raises:
        UserError: If another line is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._rows: dict[str, list[dict[str, Any]]] = {}
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")[0]
            for number, line in enumerate(whole.splitlines(), 1):
                try:
                    entry = json.loads(line)
                    self._rows[entry["key"]] = entry["rows"]
                except (KeyError, TypeError, ValueError) as error:
                    raise UserError(
                        f"line {number} of {path} must be a finished rollout, found {line[:40]!r}; "
                        "delete that line, and its rollout is made again"
                    ) from error
            write_atomically(path, whole + b"\n" if whole else b"")

    def __contains__(self, key: str) -> bool:
        """Whether the job is finished."""
        return key in self._rows

    def rows(self, key: str) -> list[dict[str, Any]]:
        """Of a finished job."""
        return self._rows[key]

    def add(self, key: str, rows: list[dict[str, Any]]) -> None:
        """Take in a finished job; it is on the disk when this returns."""
        with self.path.open("ab") as file:
            file.write(json.dumps({"key": key, "rows": rows}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows[key] = rows


def _work(
    arena: Arena,
    jobs: Sequence[Job],
    record: Record,
    bar: "tqdm[Any]",
    *,
    ckpts: Sequence[Path],
    clips: Path,
) -> None:
    """Run what is not yet on record."""
    todo = [job for job in jobs if arena.key(job) not in record]
    bar.update(len(jobs) - len(todo))
    for job, rows in run_jobs(arena, todo, ckpts=ckpts, clips=clips):
        record.add(arena.key(job), rows)
        bar.set_postfix_str(f"{job.stage} {job.contestant.name}", refresh=False)
        bar.update()


def choose_age_weights(
    tried: Sequence[tuple[Job, list[dict[str, Any]]]],
) -> dict[str, float]:
    """The age weight of highest accuracy for each scored policy and budget; the first of equals.

    Args:
        tried: Tuning jobs in the order of the grid, with their rows.
    """
    best: dict[str, tuple[float, float]] = {}
    for job, rows in tried:
        assert job.age_weight is not None
        accuracy = statistics.fmean(row["identity_accuracy"]["mean"] for row in rows)
        key = str(job.tuned_by)
        if key not in best or accuracy > best[key][0]:
            best[key] = (accuracy, job.age_weight)
    return {key: age_weight for key, (_, age_weight) in best.items()}


def resolve_age(job: Job, ages: dict[str, float]) -> Job:
    """The job with its tuned age weight, if its policy has one."""
    if not job.contestant.is_scored:
        return job
    return replace(job, age_weight=ages[str(job.tuned_by)])


def _rows_by_section(
    arena: Arena, jobs: Sequence[Job], record: Record
) -> dict[str, list[dict[str, Any]]]:
    sections: dict[str, list[dict[str, Any]]] = {name: [] for name in TEST_FIELDS}
    for job in jobs:
        sections[job.section] += record.rows(arena.key(job))
    return sections


def _without_rollout(row: dict[str, Any]) -> dict[str, Any]:
    """Of a tuning row, what was tried and how right it was."""
    names = ("stage", "policy", "weights", "age_weight", "budget_tokens", "identity_accuracy")
    return {name: row[name] for name in names}


def _shown_jobs(arena: Arena, ages: dict[str, float]) -> dict[str, Job]:
    """Rollouts of the first stage that the videos show, at the largest budget."""
    settings = arena.config.evaluate
    stage = next(iter(arena.students))
    everyone = contestants(
        settings, has_head=arena.has_head[stage], has_teacher=arena.has_teacher[stage]
    )
    frames = (min(settings.frames),)
    return {
        contestant.name: resolve_age(
            Job("policies", stage, contestant, settings.budgets[-1], frames), ages
        )
        for contestant in shown_contestants(everyone)
    }
