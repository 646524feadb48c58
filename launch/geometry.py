"""What an export says of the networks of a run, enough to build them and to sample from them."""

from typing import Any

from configs.load import to_dict
from configs.schema import RunConfig


def token_grid(config: RunConfig) -> tuple[int, int]:
    """Token rows and columns of a frame."""
    rows, columns = (
        pixels // (config.codec.stride * patch)
        for pixels, patch in zip(config.source.size, config.model.patch_size[1:], strict=True)
    )
    return rows, columns


def network_config(
    config: RunConfig, *, log: bool = False, per_block: bool = False
) -> dict[str, Any]:
    """What an export says about its networks, enough to build them again.

    Args:
        config: Of the run.
        log: As in `train.salience.SalienceParams`.
        per_block: The same.
    """
    rows, columns = token_grid(config)
    return {
        "model": to_dict(config.model),
        "head": to_dict(config.head),
        "head_log": log,
        "head_block_len": config.model.frames_per_block * rows * columns if per_block else 0,
        "grid": [rows, columns],
    }


def sampling_config(
    config: RunConfig, *, frames: int, log: bool = False, per_block: bool = False
) -> dict[str, Any]:
    """What an export says so that videos can be sampled from it, the same way as in training.

    Args:
        config: Of the run.
        frames: Latent frames of the clips that the network was trained on.
        log: As in `network_config`.
        per_block: The same.
    """
    return {
        **network_config(config, log=log, per_block=per_block),
        "codec": to_dict(config.codec),
        "text": to_dict(config.text),
        "size": list(config.source.size),
        "fps": config.fps,
        "every": config.source.every,
        "frames": frames,
        "precision": config.trainer.precision,
    }
