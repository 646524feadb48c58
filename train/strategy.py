"""How engines are spread over processes: one process, DDP, or DeepSpeed ZeRO over many.

The only file that knows DeepSpeed, and it imports it only where a DeepSpeed strategy is built.
Weights stay float32 everywhere; bfloat16 is autocast.
"""

import argparse
import atexit
import logging
import os
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.distributed import _destroy_dist_connection
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch import Tensor, nn

from configs.schema import OptimConfig, TrainerConfig
from train.engine import (
    Engine,
    Piece,
    ReplicatedEngine,
    SingleEngine,
    build_engines,
    build_optimizer,
    host_copy,
)
from train.memory import settle
from train.ranks import rank
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
    if config.strategy == "ddp":
        return ReplicatedStrategy(timeout=patience(config))
    if not uses_gpu(config):
        os.environ["DS_ACCELERATOR"] = "cpu"  # read when deepspeed is imported
    return DeepSpeedEngines(config)


def patience(config: TrainerConfig) -> timedelta:
    """Longest wait for another rank: above that of the watchdog, which can say what is wrong."""
    return timedelta(seconds=2 * config.hang_seconds) if config.hang_seconds else timedelta(days=7)


class SingleStrategy(SingleDeviceStrategy):
    """One process, one device, one plain AdamW per network."""

    def model_to_device(self) -> None:
        """Settle all networks there."""
        stage = _bare_stage(self)
        settle(stage, self.root_device)
        stage.to(self.root_device)

    def setup_optimizers(self, trainer: Trainer) -> None:
        """Build the engines of the stage; Lightning sees no optimiser."""
        stage = _bare_stage(self)
        stage.engines = build_engines(stage.engine_specs(), SingleEngine)


class ReplicatedStrategy(DDPStrategy):
    """Every rank holds every network whole, and its optimiser; ranks average their gradients."""

    def setup(self, trainer: Trainer) -> None:
        """Move all networks to the device and build the engines; Lightning sees no optimiser."""
        stage = _bare_stage(self)
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        settle(stage, self.root_device)
        stage.to(self.root_device)
        stage.engines = build_engines(stage.engine_specs(), ReplicatedEngine)

    def teardown(self) -> None:
        """Leave the networks on their device, for `Engine.weights`."""
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()


class DeepSpeedEngines(DeepSpeedStrategy):
    """One DeepSpeed engine per trainable network, ZeRO 0 to 3, on CPU with gloo or on CUDA.

    The stage itself is not wrapped: its `update` runs as it is and calls the engines. Several
    engines in place of one are exact where one is not: clipping, moments and gradients of a
    network that sits out a step stay untouched. Under ZeRO-3, frozen networks are sharded, too.
    """

    def __init__(self, settings: TrainerConfig) -> None:
        zero: dict[str, Any] = {"stage": settings.zero_stage}
        if settings.zero_stage == 3:
            zero["stage3_param_persistence_threshold"] = settings.persistent_params
        if settings.offload_optimizer:
            zero["offload_optimizer"] = {"device": "cpu", "pin_memory": uses_gpu(settings)}
        config = {
            "train_micro_batch_size_per_gpu": 1,  # only a label: batches are counted in Stage
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "zero_optimization": zero,
            "torch_autocast": {
                "enabled": settings.precision == "bf16",
                "dtype": "bfloat16",
                "lower_precision_safe_modules": [],  # what ranks exchange stays float32
            },
        }
        super().__init__(config=config, logging_level=logging.WARNING, timeout=patience(settings))
        self._settings = settings

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
        stage = _bare_stage(self)
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        for name, spec in stage.engine_specs().items():
            # One after the other: under ZeRO-3 only one network is ever whole on the device.
            settle(spec.module, self.root_device)
            if spec.optim is not None:
                stage.engines[name] = self._build_engine(name, spec.module, spec.optim)
            elif self._settings.zero_stage == 3 and self._is_large(spec.module):
                engine = self._start(spec.module, self._config(clip=0.0), None)
                stage.closing.append(partial(_destroy, engine))
        stage.to(self.root_device)
        self.barrier()

    def teardown(self) -> None:
        """Leave the networks on their device: the engines still hold slices of them."""
        if self.cluster_environment is not None:
            self.cluster_environment.teardown()

    def _is_large(self, module: nn.Module) -> bool:
        threshold = self._settings.persistent_params
        return any(parameter.numel() > threshold for parameter in module.parameters())

    def _config(self, *, clip: float) -> dict[str, Any]:
        assert isinstance(self.config, dict)
        return self.config | {"gradient_clipping": clip}

    def _build_engine(self, name: str, module: nn.Module, settings: OptimConfig) -> Engine:
        stage = self._settings.zero_stage
        optimizer = build_optimizer(module, settings, is_fused=False)
        config = self._config(clip=settings.clip if stage > 0 else 0.0)
        engine = self._start(module, config, optimizer)
        kind = (WholeZero, SplitZero, SplitZero, ShardedZero)[stage]
        return kind(name, engine, settings)

    def _start(
        self, module: nn.Module, config: dict[str, Any], optimizer: torch.optim.Optimizer | None
    ) -> Any:
        import deepspeed

        # DeepSpeed's own autocast, around every pass, would cache weights: see `Stage.autocast`.
        module.register_forward_pre_hook(lambda *_: torch.set_autocast_cache_enabled(False))
        index = self.root_device.index if self.root_device.type == "cuda" else self.local_rank
        trained = optimizer.param_groups[0]["params"] if optimizer is not None else []
        engine, *_ = deepspeed.initialize(
            args=argparse.Namespace(device_rank=index),
            config=config,
            model=module,
            model_parameters=trained,
            optimizer=optimizer,
            dist_init_required=False,
        )
        return engine


class WholeZero(Engine):
    """A network under DeepSpeed, ZeRO-0: every rank holds it and its optimiser whole."""

    def __init__(self, name: str, engine: Any, settings: OptimConfig) -> None:
        super().__init__(name, engine.module, settings)
        self._engine = engine
        self._start_average()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The AdamW inside."""
        optimizer = self._engine.basic_optimizer
        assert isinstance(optimizer, torch.optim.Optimizer)
        return optimizer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward pass of the network."""
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; ranks average theirs."""
        self._engine.backward(loss)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the parameters; they would keep everything alive."""
        _destroy(self._engine)

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        """DeepSpeed counts micro-batches by itself only when it is asked to."""
        self._engine.set_gradient_accumulation_boundary(last)
        return nullcontext()

    def _update(self) -> float:
        norm = self._clip()
        self._engine.step()
        return norm


class SplitZero(WholeZero):
    """The same under ZeRO-1 or 2: a rank's only master is its slice of all parameters in a row."""

    def layout(self) -> list[Piece]:
        """The parameters that this rank's slice crosses."""
        pieces = []
        for name, parameter in self.module.named_parameters():
            # Where DeepSpeed links a parameter to the masters, for its own checkpoints.
            link = getattr(parameter, "_hp_mapping", None)
            if link is not None:
                here, there = link.lp_fragment_address, link.hp_fragment_address
                pieces.append(
                    Piece(name, here.start, here.numel, link.param_group_index, there.start)
                )
        return pieces

    @property
    def is_written_here(self) -> bool:
        """Every rank holds masters of its own."""
        return True

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.single_partition_of_fp32_groups)

    def _update(self) -> float:
        self._engine.step()
        # Steps with an invalid gradient are skipped; the norm kept is then that of another step.
        is_skipped = bool(self._engine.optimizer.overflow)
        norm = float("nan") if is_skipped else float(self._engine.get_global_grad_norm())
        return self._check_finite(norm)

    def _masters_changed(self) -> None:
        self._engine.optimizer.update_lp_params()


class ShardedZero(SplitZero):
    """The same under ZeRO-3: a rank holds its share of every parameter, and nothing else."""

    def close(self) -> None:
        """Free all tensors, too: some of DeepSpeed's objects outlive their engine."""
        zero = self._engine.optimizer
        super().close()
        self.optimizer.state.clear()
        self._ema = []
        zero.lp_param_buffer = None
        for kept in (
            zero.fp32_partitioned_groups_flat,
            zero.fp16_partitioned_groups_flat,
            zero.fp16_partitioned_groups,
        ):
            kept.clear()

    def layout(self) -> list[Piece]:
        """This rank's share of every parameter; padding belongs to none."""
        zero, pieces = self._engine.optimizer, []
        for name, parameter in self.module.named_parameters():
            if not parameter.requires_grad:
                continue
            group, offset, size = zero.grad_position[zero.get_param_id(parameter)]
            start = rank() * size
            length = min(size, parameter.ds_numel - start)
            if length > 0:
                pieces.append(Piece(name, start, length, group, offset))
        return pieces

    def _masters(self) -> list[Tensor]:
        return list(self._engine.optimizer.fp32_partitioned_groups_flat)

    def _masters_changed(self) -> None:
        zero = self._engine.optimizer
        for group in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(group)
        if zero.persistent_parameters:
            first = zero.persistent_parameters[0]
            first.partition(zero.persistent_parameters)  # one that is whole is not gathered anew
            first.all_gather(zero.persistent_parameters)

    def _state_copy(self) -> dict[str, Tensor]:
        import deepspeed

        state: dict[str, Tensor] = {}
        for prefix, module in self.module.named_modules():
            own = dict(module.named_parameters(recurse=False))
            with deepspeed.zero.GatheredParameters(list(own.values())):
                if rank() == 0:
                    state |= {
                        f"{prefix}.{name}" if prefix else name: host_copy(parameter)
                        for name, parameter in own.items()
                    }
        if rank() != 0:
            return {}
        state |= {key: host_copy(buffer) for key, buffer in self._buffers()}
        return {key: state[key] for key in self.module.state_dict()}


def _destroy(engine: Any) -> None:
    """Take the hooks off a DeepSpeed engine's network, free shares, empty a list that names it."""
    from deepspeed.runtime.zero import parameter_offload

    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if module is not engine.module]
    engine.destroy()
    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data = parameter.ds_tensor.data.new_empty(0)


def _bare_stage(strategy: Strategy) -> Stage:
    """The stage of a strategy, after telling Lightning that there is no optimiser."""
    stage = strategy.lightning_module
    assert isinstance(stage, Stage)
    strategy.optimizers = []
    strategy.lr_scheduler_configs = []
    return stage
