"""Whether the tensors of a checkpoint are those of one network, and of which."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields

import torch
from torch import Tensor

from launch.formats import LISTED, Checkpoint, worded
from launch.weight_files import WeightsError
from models.transformer import VideoTransformer
from models.wan_config import Geometry, geometry_of_shapes


def network_geometry(checkpoint: Checkpoint, *, num_heads: int | None = None) -> Geometry:
    """Sizes of the network, from its config.json and from its tensors, which must agree.

    Args:
        checkpoint: As read.
        num_heads: If known; without it and without a config.json, heads have 128 channels.

    Raises:
        WeightsError: If config, tensors and `num_heads` contradict each other.
    """
    where, config = str(checkpoint.files[0].parent), checkpoint.config
    shapes = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    if config is None:
        return worded(where, lambda: geometry_of_shapes(shapes, num_heads=num_heads))
    if num_heads not in (None, config.num_heads):
        raise WeightsError(
            f"--heads must be that of config.json in {where!r}, {config.num_heads}, found "
            f"{num_heads}; leave it out"
        )
    try:
        shown = geometry_of_shapes(shapes, num_heads=1)  # shapes do not show the number of heads
    except ValueError:
        return config  # whoever lists what is missing says more
    sizes = ["width", *(field.name for field in fields(Geometry))]
    hidden = ("num_heads", "head_dim", "rope_theta", "eps")
    wrong = [
        f"{size} {getattr(config, size)} where the weights have {getattr(shown, size)}"
        for size in sizes
        if size not in hidden and getattr(config, size) != getattr(shown, size)
    ]
    if wrong:
        raise WeightsError(
            f"config.json in {where!r} must describe the weights beside it, found "
            f"{', '.join(wrong)}; one of the two belongs to another model"
        )
    return config


def require_tensors(checkpoint: Checkpoint, geometry: Geometry) -> None:
    """Raise `WeightsError`, with a list, unless the tensors are exactly those of the network."""
    found = checkpoint.tensors
    wanted = _tensors_of(geometry, checkpoint)
    unknown = [*checkpoint.unknown, *(name for name in found if name not in wanted)]
    misshaped = [
        f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in found and found[name].shape != tensor.shape
    ]
    plain = {name: tensor for name, tensor in found.items() if _is_plain(tensor)}
    places = Counter(tensor.data_ptr() for tensor in plain.values())
    tied = [name for name, tensor in plain.items() if places[tensor.data_ptr()] > 1]
    problems = [
        _listed("missing", [name for name in wanted if name not in found]),
        _listed("not in the network", unknown),
        _listed("misshaped", misshaped),
        _listed("tied to each other", tied),
        _listed("sparse, quantized or without values", [n for n in found if n not in plain]),
        _listed(
            "not of floating point", [n for n, t in plain.items() if not t.is_floating_point()]
        ),
    ]
    if any(problems):
        raise WeightsError(
            f"{str(checkpoint.files[0])!r} must hold the {len(wanted)} tensors of a Wan2.1 "
            f"text-to-video transformer, found {'; '.join(filter(None, problems))}; take a whole "
            "checkpoint of that model"
        )


def _tensors_of(geometry: Geometry, checkpoint: Checkpoint) -> Mapping[str, Tensor]:
    """What the network of a checkpoint holds, on the meta device.

    Raises:
        WeightsError: If the checkpoint cannot fill so many layers, or no network has such sizes.
    """
    where, count = str(checkpoint.files[0]), len(checkpoint.tensors)
    if geometry.num_layers > count:
        raise WeightsError(
            f"{where!r} must hold 27 tensors for each of {geometry.num_layers} layers, found "
            f"{count} tensors; take a whole checkpoint, or the config.json that belongs to it"
        )
    try:
        with torch.device("meta"):
            return VideoTransformer(**asdict(geometry)).state_dict()
    except (ValueError, TypeError, RuntimeError) as error:  # the latter two for sizes above 2^63
        raise WeightsError(
            f"{where!r} must be of a network that can be built, found {geometry}: "
            f"{str(error).splitlines()[0]}; take another checkpoint, or repair its config.json"
        ) from error


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is an array of values in memory."""
    return tensor.layout == torch.strided and not (tensor.is_quantized or tensor.is_meta)


def _listed(what: str, names: Sequence[str]) -> str:
    """`3 missing: a, b, c`, with at most ten of them; empty if there are none."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{len(names)} {what}: {', '.join(names[:LISTED])}{more}" if names else ""
