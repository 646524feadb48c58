"""What `config.json` says of a Wan2.1 transformer, in Wan's own words and in those of diffusers."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

HEAD_DIM = 128
"""Of every published Wan2.1; weights do not show it."""
ROPE_THETA = 10000.0
"""Fixed in the code of Wan and of diffusers; no config names it."""
TEXT_LEN = 512
"""Rows that every caption is padded to."""
_TEXT_DIM, _PATCH_SIZE = 4096, (1, 2, 2)
"""Fixed in Wan's code; native configs leave them out, and it ignores them there."""

_BLOCK = re.compile(r"blocks\.(0|[1-9][0-9]{0,8})\..+")
_REPAIR = "repair the config, or take it from where the weights come from"

_NATIVE = {
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "num_heads": "num_heads",
    "num_layers": "num_layers",
    "in_dim": "in_channels",
    "out_dim": "out_channels",
    "eps": "eps",
}
_DIFFUSERS = {
    "num_attention_heads": "num_heads",
    "attention_head_dim": "head_dim",
    "num_layers": "num_layers",
    "ffn_dim": "ffn_dim",
    "freq_dim": "freq_dim",
    "text_dim": "text_dim",
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "eps": "eps",
}
_FIXED_IN_DIFFUSERS: dict[str, Any] = {
    "qk_norm": "rms_norm_across_heads",
    "cross_attn_norm": True,
    "image_dim": None,
    "added_kv_proj_dim": None,
    "pos_embed_seq_len": None,
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of a network, by the arguments of `models.transformer.VideoTransformer`."""

    num_layers: int
    num_heads: int
    head_dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    in_channels: int = 16
    out_channels: int = 16
    patch_size: tuple[int, int, int] = _PATCH_SIZE
    rope_theta: float = ROPE_THETA
    eps: float = 1e-6

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.num_heads * self.head_dim


def native_config(geometry: Geometry, *, text_len: int = TEXT_LEN) -> dict[str, Any]:
    """`config.json` of a native Wan folder.

    Args:
        geometry: Of the network.
        text_len: Rows that captions are padded to.

    Raises:
        ValueError: If no code but ours can compute the network.
    """
    _require_wans_rotation(geometry)
    config = {theirs: getattr(geometry, ours) for theirs, ours in _NATIVE.items()}
    config |= {"_class_name": "WanModel", "model_type": "t2v", "dim": geometry.width}
    return config | {"text_len": text_len} | beyond_wan(asdict(geometry))


def beyond_wan(sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Sizes that are others than Wan's own code has, which takes them from no config.

    Wan's class therefore cannot load weights of these sizes; diffusers' can, and so do we.

    Args:
        sizes: With the keys `text_dim` and `patch_size`, as in `Geometry` or as in a manifest.
    """
    found = {"text_dim": sizes["text_dim"], "patch_size": list(sizes["patch_size"])}
    fixed = {"text_dim": _TEXT_DIM, "patch_size": list(_PATCH_SIZE)}
    return {key: value for key, value in found.items() if value != fixed[key]}


def diffusers_config(geometry: Geometry) -> dict[str, Any]:
    """`config.json` of diffusers' `WanTransformer3DModel`.

    Raises:
        ValueError: If that class cannot build the network.
    """
    _require_wans_rotation(geometry)
    config = {theirs: getattr(geometry, ours) for theirs, ours in _DIFFUSERS.items()}
    config |= {"_class_name": "WanTransformer3DModel", "patch_size": list(geometry.patch_size)}
    return config | _FIXED_IN_DIFFUSERS | {"rope_max_seq_len": 1024}


def is_diffusers_config(config: Mapping[str, Any]) -> bool:
    """Whether a `config.json` speaks diffusers' words; decided by its keys."""
    return "attention_head_dim" in config


def read_native_config(config: Mapping[str, Any]) -> Geometry:
    """Geometry of a native `config.json`.

    Raises:
        ValueError: If a key is missing or no size, or it is another kind of model.
    """
    kind = config.get("model_type", "t2v")
    if kind != "t2v":
        raise ValueError(
            f"model_type must be 't2v', found {kind!r}; take a text-to-video checkpoint"
        )
    sizes = _renamed(config, {**_NATIVE, "dim": "width"})
    width, num_heads = sizes.pop("width"), sizes["num_heads"]
    if width % num_heads:
        raise ValueError(
            f"dim must be a multiple of num_heads={num_heads}, found {width}; repair the config"
        )
    return Geometry(
        **sizes,
        head_dim=width // num_heads,
        text_dim=_size("text_dim", config.get("text_dim", _TEXT_DIM)),
        patch_size=_patch(config.get("patch_size", _PATCH_SIZE)),
    )


def read_diffusers_config(config: Mapping[str, Any]) -> Geometry:
    """Geometry of diffusers' `config.json`.

    Raises:
        ValueError: If a key is missing or no size, or it is another kind of model.
    """
    kind = config.get("_class_name", "WanTransformer3DModel")
    if kind != "WanTransformer3DModel":
        raise ValueError(
            f"_class_name must be 'WanTransformer3DModel', found {kind!r}; take the folder of a "
            "text-to-video transformer"
        )
    for key, wanted in _FIXED_IN_DIFFUSERS.items():
        found = config.get(key, wanted)
        if found != wanted:
            raise ValueError(
                f"{key} must be {wanted!r}, as in text-to-video models, found {found!r}; take "
                "another checkpoint"
            )
    if "patch_size" not in config:
        raise ValueError("patch_size must be there, found no such key; repair the config")
    return Geometry(**_renamed(config, _DIFFUSERS), patch_size=_patch(config["patch_size"]))


def geometry_of_shapes(
    shapes: Mapping[str, Sequence[int]], *, num_heads: int | None = None, eps: float = 1e-6
) -> Geometry:
    """Geometry that the shapes of native tensors show.

    Args:
        shapes: Native name to shape.
        num_heads: Which shapes do not show; None = as many as there are with `HEAD_DIM`.
        eps: Which they do not show, either.

    Raises:
        ValueError: If a tensor that shows a size is missing or has another number of axes, or the
            width is no multiple of the heads, or the numbers of the blocks have gaps.
    """
    patch = _shape(shapes, "patch_embedding.weight", 5)
    width, size = patch[0], _patch(tuple(patch[2:]))
    heads = num_heads or width // HEAD_DIM
    if not heads or width % heads:
        raise ValueError(
            f"the width of a token, {width}, must be a multiple of the number of heads, found "
            f"{num_heads or f'heads of {HEAD_DIM} channels'}; name the number of heads"
        )
    return Geometry(
        num_layers=_num_layers(shapes),
        num_heads=heads,
        head_dim=width // heads,
        ffn_dim=_shape(shapes, "blocks.0.ffn.0.weight", 2)[0],
        freq_dim=_shape(shapes, "time_embedding.0.weight", 2)[1],
        text_dim=_shape(shapes, "text_embedding.0.weight", 2)[1],
        in_channels=patch[1],
        out_channels=_shape(shapes, "head.head.weight", 2)[0] // math.prod(size),
        patch_size=size,
        eps=eps,
    )


def _require_wans_rotation(geometry: Geometry) -> None:
    if geometry.rope_theta != ROPE_THETA:
        raise ValueError(
            f"model.rope_theta must be {ROPE_THETA:g}, which Wan and diffusers have in their code, "
            f"found {geometry.rope_theta:g}; this network can only be used here"
        )


def _renamed(config: Mapping[str, Any], words: Mapping[str, str]) -> dict[str, Any]:
    missing = [key for key in words if key not in config]
    if missing:
        raise ValueError(f"{', '.join(missing)} must be there, found {sorted(config)[:12]}")
    return {
        ours: _eps(config[theirs]) if ours == "eps" else _size(theirs, config[theirs])
        for theirs, ours in words.items()
    }


def _size(key: str, value: object) -> int:
    if not _is_size(value):
        raise ValueError(f"{key} must be a whole number above 0, found {value!r}; {_REPAIR}")
    return cast(int, value)


def _eps(value: object) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < cast(float, value) < math.inf:
        raise ValueError(f"eps must be a number above 0, found {value!r}; {_REPAIR}")
    return cast(float, value)


def _patch(values: object) -> tuple[int, int, int]:
    if not isinstance(values, list | tuple) or len(values) != 3 or not all(map(_is_size, values)):
        raise ValueError(
            f"patch_size must be [time, height, width], whole numbers above 0, found {values!r}; "
            f"{_REPAIR}"
        )
    return values[0], values[1], values[2]


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _shape(shapes: Mapping[str, Sequence[int]], name: str, axes: int) -> Sequence[int]:
    shape = shapes.get(name, ())
    if len(shape) != axes or 0 in shape:
        found = list(shape) if name in shapes else "no such tensor"
        raise ValueError(
            f"{name} must have {axes} axes, none of them empty, found {found}; take a whole "
            "checkpoint"
        )
    return shape


def _num_layers(shapes: Mapping[str, Sequence[int]]) -> int:
    """How many blocks there are; names whose number is none do not count."""
    numbers = {int(found[1]) for found in map(_BLOCK.fullmatch, shapes) if found}
    if numbers and max(numbers) >= len(numbers):
        raise ValueError(
            f"blocks must be numbered from 0 without gaps, found {len(numbers)} of them and "
            f"blocks.{max(numbers)}; take a whole checkpoint"
        )
    return len(numbers)
