"""The step before a stage that reads stored targets: its teacher is asked about every clip."""

import torch
from torch import Tensor

from configs.schema import RunConfig
from data.batches import LatentBatch
from data.shards import ShardSet
from data.targets import write_targets
from launch.build import latents_folder, new_stage, target_source
from launch.inputs import load_inputs
from launch.plan import targets_folder
from train.fit import prepare_process
from train.memory import settle
from train.salience import SalienceStage
from train.strategy import uses_gpu


def write_stage_targets(config: RunConfig, stage_name: str) -> None:
    """Ask the teacher of a stage about every clip, for the stage to read; needs no student.

    Raises:
        UserError: If the teacher or the data set does not fit.
    """
    prepare_process(config)
    exports = load_inputs(config, stage_name, roles=("teacher",))
    stage = new_stage(config, stage_name, exports, frozen=("teacher",))
    assert isinstance(stage, SalienceStage), "no other stage has targets"
    stage.uses_bf16 = config.trainer.precision == "bf16"
    device = torch.device("cuda", 0) if uses_gpu(config.trainer) else torch.device("cpu")
    settle(stage, device)
    stage.to(device)

    def ask(batch: LatentBatch) -> Tensor:
        with stage.autocast():
            return stage.ask_teacher(batch.to(stage.device))

    write_targets(
        ShardSet(latents_folder(config)),
        targets_folder(config, stage_name),
        source=target_source(config, stage, exports["teacher"]),
        ask=ask,
        samples_per_shard=config.data.samples_per_shard,
    )
