"""Kill -9 at any moment, in any stage, on any rank: the restarted run gives the same bits."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.train.forks import run_cases
from tests.train.small_stages import KINDS
from train.tracking import MACHINE_KEYS

STEPS = 7
EVENTS = {"mid-step": "kill", "mid-save": "save", "saved": "saved", "before-pointer": "pointer"}
"""In `saved`, the rank has written its file, but the checkpoint is not whole."""
COMMON = f"--steps {STEPS} --checkpoint_every 2 --layers 1 --silence_seconds 4"

FEW = {
    "teacher": ("mid-step", 1),
    "causal": ("mid-save", 0),
    "distill": ("mid-step", 0),
    "salience": ("saved", 1),
    "streaming": ("mid-save", 1),
}
# The three moments on either rank; but only rank 0 moves the pointer.
ALL = [
    (kind, moment, rank)
    for kind in KINDS
    for moment in ("mid-step", "mid-save", "before-pointer")
    for rank in (0, 1)
    if (moment, rank) != ("before-pointer", 1)
]
ALL += [("lora", "mid-step", 1), ("lora", "mid-save", 0)]


def strategy_of(kind: str, rank: int) -> str:
    """Another strategy for each: what is tested is the same in all of them."""
    which = ((*KINDS, "lora").index(kind) + rank) % 3
    return ("--strategy ddp", "--zero_stage 2", "--zero_stage 3")[which]


def step_of_event(kind: str, moment: str) -> int:
    """In `streaming` only the starts of streams can be saved: steps 0, 3 and 6."""
    return 5 if moment == "mid-step" else 3 if kind == "streaming" else 4


def run_all(cases, folder):
    """The three runs of each case: undisturbed, killed, and started again."""
    waves = []
    for phase in ("whole", "killed", "again"):
        given = {}
        for kind, moment, rank in cases:
            words = f"{COMMON} --kind {kind} {strategy_of(kind, rank)}".split()
            if phase == "killed":
                words += ["--event", f"{EVENTS[moment]}:{step_of_event(kind, moment)}:{rank}"]
            name = f"{kind}-{moment}-{rank}"
            path = folder / f"{name}-{'whole' if phase == 'whole' else 'run'}.safetensors"
            given[f"{name}-{phase}"] = {"program": "exact", "words": words, "folder": str(path)}
        # A few at a time: they share the cores, and watch each other for silence.
        names = list(given)
        waves += [
            {name: given[name] for name in names[start : start + 3]}
            for start in range(0, len(names), 3)
        ]
    return folder, run_cases(*waves, folder=folder)


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    cases = [(kind, moment, rank) for kind, (moment, rank) in FEW.items()]
    return run_all(cases, tmp_path_factory.mktemp("few"))


@pytest.fixture(scope="module")
def every(tmp_path_factory):
    return run_all(ALL, tmp_path_factory.mktemp("all"))


def check(runs, kind, moment, rank):
    folder, found = runs
    name = f"{kind}-{moment}-{rank}"
    assert [one["status"] for one in found[f"{name}-whole"]] == [0, 0]
    killed = [one["status"] for one in found[f"{name}-killed"]]
    assert killed[rank] == -9
    assert killed[1 - rank] != 0, "the other rank does not take the job for finished"
    assert [one["status"] for one in found[f"{name}-again"]] == [0, 0]
    whole, again = (load_file(folder / f"{name}-{end}.safetensors") for end in ("whole", "run"))
    first = min(int(key.split("/")[0]) for key in again if key[0].isdigit())
    before, at = (0, 3) if kind == "streaming" else (2, 4)
    assert first in {"mid-step": (before, at), "before-pointer": (at,)}.get(moment, (before,))
    last = {key for key in whole if key.startswith((f"{STEPS - 1}/", "ema/"))}
    assert last <= again.keys()
    assert all(torch.equal(whole[key], again[key]) for key in again)
    assert rows(folder / f"{name}-whole") == rows(folder / f"{name}-run")


def rows(folder):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert found
    return [{k: v for k, v in row.items() if not k.startswith(MACHINE_KEYS)} for row in found]


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_rank_changes_no_bit_of_the_result(few, kind):
    check(few, kind, *FEW[kind])


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "moment", "rank"), ALL)
def test_no_moment_of_a_kill_changes_a_bit_of_the_result(every, kind, moment, rank):
    check(every, kind, moment, rank)
