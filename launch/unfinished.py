"""A stage that has begun with other settings is not thrown away without being asked to."""

import json
from collections.abc import Sequence
from pathlib import Path

from configs.errors import UserError
from configs.load import config_hash
from configs.schema import RunConfig
from launch.build import stage_seed
from launch.export import find_export, read_manifest
from launch.inputs import input_paths
from train import checkpoint
from train.fit import CHECKPOINTS, identity
from train.restore import differences

UNNAMED = "none of the config (the data or the version of this program has changed)"


class OtherSettings(UserError):
    """A stage holds checkpoints that were made with other settings than the config's."""


def require_same_settings(
    config: RunConfig, stage_name: str, folder: Path, *, remade: Sequence[str]
) -> None:
    """Refuse to set aside what has been trained of a stage.

    Args:
        config: Of the run.
        stage_name: Of a stage that is not complete and was begun with other settings or inputs.
        folder: Of the stage.
        remade: Stages that will be made anew before this one.

    Raises:
        OtherSettings: If the stage holds a whole checkpoint; names the settings that differ.
    """
    newest = checkpoint.newest_whole(folder / CHECKPOINTS)
    if newest is None:
        return
    described = checkpoint.read_marker(newest)
    own = identity(config, stage_name, seed=stage_seed(config, stage_name))
    own["inputs"] = _input_hashes(config, stage_name, remade=remade)
    differing = differences(described["identity"], json.loads(json.dumps(own)))
    raise OtherSettings(
        f"stage {stage_name!r} must be continued with the settings it was begun with, it has done "
        f"{checkpoint.step_of(newest)} of {described['identity']['stage']['steps']} steps with "
        f"others: {'; '.join(differing) or UNNAMED}; set them back, choose another "
        f"name=..., or give --restart to set {folder} aside and start it anew"
    )


def _input_hashes(config: RunConfig, stage_name: str, *, remade: Sequence[str]) -> dict[str, str]:
    """Hash of every input as it is now, or why there is none."""
    stage = config.stages[stage_name]
    hashes = {}
    for role, path in input_paths(config, stage).items():
        if stage.inputs[role] in remade:
            hashes[role] = "to be made anew"
        else:
            hashes[role] = config_hash(read_manifest(find_export(path)))
    return hashes
