"""Configs that say what the stages of `tests.train.small_stages` are made of."""

from configs.schema import CodecConfig, HeadConfig, ModelConfig, RunConfig, SourceConfig, TextConfig
from tests.models.small import SIZES
from train.stage import Stage


def small_run(kind: str, stage: Stage, params: dict) -> RunConfig:
    """The config of a run whose stage `test` is this one."""
    stage.config.kind, stage.config.params = kind, params
    model = {key: value for key, value in SIZES.items() if key != "patch_size"}
    return RunConfig(
        name="small",
        source=SourceConfig(size=[32, 48]),
        codec=CodecConfig(stride=16),
        text=TextConfig(dim=8, length=3),
        model=ModelConfig(**model, patch_size=[1, 1, 1], frames_per_block=2),
        head=HeadConfig(hidden=8),
        stages={"test": stage.config},
    )
