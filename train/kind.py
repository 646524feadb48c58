"""The base of all kinds of stages: what a config must know of a stage before anything is built."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from configs.checks import require, require_blocks, require_choice
from configs.errors import ConfigError
from configs.schema import StageConfig


class StageKind:
    """What stages of one kind have in common.

    Attributes:
        params_type: Dataclass that checks `StageConfig.params`.
        network_sources: Trainable network to the (input role, file stem) pairs that it may start
            from, the first that is there; none = fresh weights.
        frozen_sources: The same for networks that are only read.
        export_role: What the export of this stage is used as.
        exported: File stem in the export to the name of a network.
        shared_geometry: Keys of `model` in which a teacher must agree with the run, even if only
            what it says of latents is read.
        takes_lora: Whether adapters may be trained in place of whole networks.
        restarts_at_snapshot: Whether checkpoints hold the last `mark_restart_point` and not the
            present, for stages whose running state cannot be written down.
    """

    params_type: ClassVar[type]
    network_sources: ClassVar[Mapping[str, tuple[tuple[str, str], ...]]]
    frozen_sources: ClassVar[Mapping[str, tuple[tuple[str, str], ...]]] = {}
    export_role: ClassVar[str] = "student"
    exported: ClassVar[Mapping[str, str]] = {}
    shared_geometry: ClassVar[Sequence[str]] = (
        "in_channels",
        "out_channels",
        "text_dim",
        "patch_size",
    )
    takes_lora: ClassVar[bool] = False
    restarts_at_snapshot: ClassVar[bool] = False

    @classmethod
    def check(cls, config: StageConfig, params: Any, *, key: str, block: int) -> None:
        """Raise `ConfigError` if settings contradict each other, before anything runs.

        Args:
            config: Of the stage.
            params: Its own settings, a `params_type`.
            key: Where the stage stands in the config.
            block: Frames per block.
        """
        require_blocks(f"{key}.frames", [config.frames], block)
        if config.lora is not None:
            require(
                cls.takes_lora,
                f"{key}.lora must be left out: a {config.kind!r} stage trains whole networks; "
                "stages of kind 'distill' and 'streaming' can train adapters",
            )
            for name in config.lora.networks:
                require_choice(f"{key}.lora.networks", name, cls.network_sources)


def rank_share(config: StageConfig, world: int) -> int:
    """Samples of one step that each rank sees.

    Raises:
        ConfigError: If a step cannot be shared out among `world` ranks in whole micro-batches.
    """
    unit = world * max(1, config.micro_batch)
    if config.batch % unit:
        raise ConfigError(
            f"batch of a {config.kind!r} stage must be a multiple of ranks x micro_batch = {world} "
            f"x {max(1, config.micro_batch)}, found {config.batch}; change one of the three"
        )
    return config.batch // world
