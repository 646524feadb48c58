"""A step whose loss or gradient is not finite: training stops and leaves what a replay needs."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L

from configs.errors import UserError
from configs.load import config_hash
from data.files import write_atomically
from train import checkpoint
from train.ranks import gather_objects, rank
from train.stage import NonFiniteError, Stage

PATTERN = "failure-*.json"


class TrainingFailure(UserError):
    """Training stopped at a step that was not finite; the message names the record of it."""


@dataclass(frozen=True)
class Failure:
    """What a record of a failed step says, as far as a replay needs it.

    Attributes:
        step: Its number, from 1: of the checkpoint that would have followed.
        quantity: `loss/NETWORK` or `grad_norm/NETWORK`.
        value: Of that quantity: nan, inf or -inf.
        ranks: One entry per rank: its loss, and keys, seeds and meta of its samples.
    """

    step: int
    quantity: str
    value: str
    ranks: list[dict[str, Any]]


def failure_path(folder: Path, step: int) -> Path:
    """Record of the failed step number `step` (from 1) of the stage in `folder`."""
    return folder / f"failure-{step:08d}.json"


def read_failure(path: Path) -> Failure:
    """The record in `path`.

    Raises:
        UserError: If it is damaged.
    """
    try:
        record = json.loads(path.read_text())
        return Failure(**{name: record[name] for name in Failure.__dataclass_fields__})
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} must be the record of a failed step, it is damaged ({error}); remove it and "
            "give --step N"
        ) from error


class Failures(L.Callback):
    """Writes the record of a step that was not finite, before anything else is written."""

    def __init__(self, folder: Path, *, checkpoints: Path) -> None:
        self.folder = folder
        self.checkpoints = checkpoints
        self._batch: Any = None
        self._record: dict[str, Any] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Remember the batch of the step."""
        self._batch = batch

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """All ranks come here together: the norm of a gradient is the same on all of them."""
        if not isinstance(exception, NonFiniteError):
            return
        assert isinstance(pl_module, Stage)
        batch = pl_module.batch_at_work(self._batch)
        own = {"loss": repr(exception.loss)} | describe_samples(batch)
        self._record = self._describe(pl_module, exception, gather_objects(own))
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            path = failure_path(self.folder, self._record["step"])
            write_atomically(path, json.dumps(self._record, indent=2).encode())

    def error(self) -> TrainingFailure:
        """What the user is told, the same on all ranks, after `on_exception`."""
        record = self._record
        return TrainingFailure(
            f"losses and gradients must be finite, {record['quantity']} was {record['value']} in "
            f"step {record['step']}; nothing was updated with it, "
            f"{failure_path(self.folder, record['step'])} names the samples; take the step apart "
            f"with: python -m launch replay {self.folder}"
        )

    def _describe(
        self, stage: Stage, failure: NonFiniteError, ranks: list[dict[str, Any]]
    ) -> dict[str, Any]:
        losses = [entry["loss"] for entry in ranks]
        bad = [loss for loss in losses if not math.isfinite(float(loss))]
        quantity = "loss" if bad else "grad_norm"
        newest = checkpoint.newest_whole(self.checkpoints)
        return {
            "step": stage.completed + 1,
            "network": failure.network,
            "quantity": f"{quantity}/{failure.network}",
            "value": bad[0] if bad else repr(failure.norm),
            "ranks": [entry | {"rank": number} for number, entry in enumerate(ranks)],
            "checkpoint": None if newest is None else newest.name,
            "identity_hash": config_hash(stage.identity),
        }


def step_number(path: Path) -> int:
    """The step, from 1, that the record `path` is of, by its name."""
    return int(path.stem.removeprefix("failure-"))


def newest_failure(folder: Path) -> Path | None:
    """The record of the latest step that failed in the stage in `folder`, if one did."""
    return max(folder.glob(PATTERN), key=step_number, default=None)


def describe_samples(batch: Any) -> dict[str, Any]:
    """Keys, seeds and meta of the samples of a batch, as JSON; what it has of them."""
    return {
        name: value.tolist() if hasattr(value, "tolist") else value
        for name in ("keys", "seeds", "meta")
        if (value := getattr(batch, name, None)) is not None
    }
