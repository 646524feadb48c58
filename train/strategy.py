"""How engines are spread over processes: one process, or DeepSpeed ZeRO over many.

The only file that knows DeepSpeed, and it imports it only where a DeepSpeed strategy is built.
"""

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

from configs.schema import TrainerConfig
from train.engine import build_single_engines
from train.stage import Stage


def uses_gpu(config: TrainerConfig) -> bool:
    """Whether this run computes on CUDA devices."""
    if config.accelerator == "auto":
        return torch.cuda.is_available()
    return config.accelerator == "gpu"


def build_strategy(config: TrainerConfig) -> Strategy:
    """The Lightning strategy that `config` describes."""
    if config.strategy == "single":
        return SingleStrategy(torch.device("cuda", 0) if uses_gpu(config) else torch.device("cpu"))
    from train.deepspeed_engine import DeepSpeedEngines

    return DeepSpeedEngines(config)


class SingleStrategy(SingleDeviceStrategy):
    """One process, one device, one plain AdamW per network."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the engines of the stage; Lightning sees no optimiser."""
        stage = self.lightning_module
        assert isinstance(stage, Stage)
        self.optimizers = []
        self.lr_scheduler_configs = []
        stage.engines = build_single_engines(stage.engine_specs())
