"""The small transformer that tests share, and the sizes of the published ones."""

import dataclasses
from typing import Any

import torch

from models.transformer import VideoTransformer
from models.wan_config import Geometry

SIZES: dict[str, Any] = {
    "num_layers": 2,
    "num_heads": 2,
    "head_dim": 12,
    "ffn_dim": 32,
    "freq_dim": 16,
    "text_dim": 8,
    "patch_size": (1, 1, 1),
}

WAN_1_3B = Geometry(
    num_layers=30, num_heads=12, head_dim=128, ffn_dim=8960, freq_dim=256, text_dim=4096
)
WAN_14B = dataclasses.replace(WAN_1_3B, num_layers=40, num_heads=40, ffn_dim=13824)


def small_transformer(seed: int = 0, **changes: Any) -> VideoTransformer:
    """Seeded, with an output layer that starts small but not at zero."""
    torch.manual_seed(seed)
    made = VideoTransformer(**SIZES | changes)
    torch.nn.init.normal_(made.head.head.weight, std=0.1)
    return made


def random_transformer(**changes: Any) -> VideoTransformer:
    """All weights random and large enough to be seen, in `eval` mode."""
    torch.manual_seed(0)
    made = VideoTransformer(**SIZES | changes)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()
