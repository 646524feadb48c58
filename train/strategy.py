"""How engines are spread over processes: one process, or DeepSpeed ZeRO over many.

The only file that knows DeepSpeed, and it imports it only where a DeepSpeed strategy is built.
Weights stay float32 in both; bfloat16 is autocast.
"""

import argparse
import atexit
import logging
import os
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import DeepSpeedStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor, nn

from configs.schema import OptimConfig, TrainerConfig
from train.engine import Engine, build_optimizer, build_single_engines
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
    if not uses_gpu(config):
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    return DeepSpeedEngines(zero_stage=config.zero_stage, bf16=config.precision == "bf16")


class SingleStrategy(SingleDeviceStrategy):
    """One process, one device, one plain AdamW per network."""

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the engines of the stage; Lightning sees no optimiser."""
        stage = self.lightning_module
        assert isinstance(stage, Stage)
        self.optimizers = []
        self.lr_scheduler_configs = []
        stage.engines = build_single_engines(stage.engine_specs())


class DeepSpeedEngines(DeepSpeedStrategy):
    """One DeepSpeed engine per trainable network, ZeRO 0 to 2, on CPU with gloo or on CUDA.

    The stage itself is not wrapped: its `update` runs as it is and calls the engines. Several
    engines in place of one are exact where one is not: clipping, moments and gradients of a
    network that sits out a step stay untouched.
    """

    def __init__(self, *, zero_stage: int, bf16: bool) -> None:
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only a label: batches are counted in Stage
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": {"stage": zero_stage},
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16"},
        }
        super().__init__(config=config, logging_level=logging.WARNING)

    def setup_environment(self) -> None:
        """As Lightning does, but also on a CPU, which it refuses."""
        if not isinstance(self.accelerator, CPUAccelerator):
            super().setup_environment()
            return
        import deepspeed.ops

        # Read as the number of devices; the number of NUMA nodes otherwise.
        os.environ.setdefault("LOCAL_SIZE", str(self.num_processes))
        # Needs a C++ compiler at run time, and serves nothing but inference.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        super(DeepSpeedStrategy, self).setup_environment()

    def setup_distributed(self) -> None:
        """As Lightning does, but a CPU has no device index to check."""
        if self.root_device.type == "cuda":
            super().setup_distributed()
        else:
            reset_seed()
            self.set_world_ranks()
            self._init_deepspeed_distributed()
        # DeepSpeed's start of the process group goes past Lightning's exit hook; without it
        # gloo's threads abort the interpreter at its end, in one run out of ten.
        atexit.register(_destroy_dist_connection)

    def setup(self, trainer: Trainer) -> None:
        """Move all networks to the device and build the engines; Lightning sees no optimiser."""
        stage = self.lightning_module
        assert isinstance(stage, Stage)
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        stage.to(self.root_device)
        self.optimizers = []
        self.lr_scheduler_configs = []
        stage.engines = {
            name: self._build_engine(name, spec.module, spec.optim)
            for name, spec in stage.engine_specs().items()
            if spec.optim is not None
        }
        self.barrier()

    def teardown(self) -> None:
        """Leave the networks on their device: the engines still hold slices of them."""
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    def _build_engine(self, name: str, module: nn.Module, settings: OptimConfig) -> Engine:
        import deepspeed

        assert isinstance(self.config, dict)
        index = self.root_device.index if self.root_device.type == "cuda" else self.local_rank
        is_partitioned = self.config["zero_optimization"]["stage"] > 0
        clip = {"gradient_clipping": settings.clip if is_partitioned else 0.0}
        optimizer = build_optimizer(module, settings, is_fused=False)
        engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=index),
            config=self.config | clip,
            model=module,
            model_parameters=optimizer.param_groups[0]["params"],
            optimizer=optimizer,
            dist_init_required=False,
        )
        return DeepSpeedEngine(name, engine, settings, is_partitioned=is_partitioned)


class DeepSpeedEngine(Engine):
    """A network trained by all ranks together; with ZeRO, each rank holds a slice of masters."""

    def __init__(
        self, name: str, engine: Any, settings: OptimConfig, *, is_partitioned: bool
    ) -> None:
        super().__init__(name, engine.module, settings)
        self._engine = engine
        self._is_partitioned = is_partitioned
        self._start_average()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside; under ZeRO its only tensor is this rank's slice of all parameters."""
        optimizer = self._engine.basic_optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the network."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool = True) -> None:
        """Add the gradient of `loss`; ranks average theirs."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def _update(self) -> float:
        if self._is_partitioned:
            self._engine.step()
            return self._check_finite(float(self._engine.get_global_grad_norm()))
        masters = self._masters()
        norm = torch.nn.utils.get_total_norm([master.grad for master in masters])  # type: ignore[misc]
        length = self._check_finite(float(norm))
        if self.settings.clip > 0:
            torch.nn.utils.clip_grads_with_norm_(masters, self.settings.clip, norm)
        self._engine.step()
        return length

    def _masters_changed(self) -> None:
        if self._is_partitioned:
            self._engine.optimizer.update_lp_params()
