"""Benchmark `targets`: what salience targets cost beside the attention that they come from."""

import argparse
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from launch import benchmark
from launch.steps import say
from models.salience_targets import BACKENDS, attend_with_targets

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BASELINE = "torch.nn.functional.scaled_dot_product_attention"
FLOOR = 0.5
"""Extra time of one more Q K^T, in attentions: attention is Q K^T and as many products for P V."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shape; one video."""
    benchmark.add_arguments(parser)
    for name, default, about in (
        ("length", 8192, "tokens of the video"),
        ("heads", 12, "attention heads"),
        ("head-dim", 64, "channels of a head"),
        ("block", 512, "tokens of a block"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=about)
    parser.add_argument("--dtype", default="float32", metavar="NAME", help=", ".join(DTYPES))
    parser.add_argument("--backend", default="auto", metavar="NAME", help=", ".join(BACKENDS))


def run(arguments: argparse.Namespace) -> None:
    """Time attention with and without targets in turn, and write the record.

    It holds `seconds_attention` and `seconds_with_targets` (medians), their `ratio`,
    `ratio_to_floor`: (ratio - 1) / 0.5, the extra time over that of one more Q K^T at attention's
    own speed, and `peak_extra_bytes`: the peak with targets above the peak without.

    Raises:
        UserError: If an argument does not fit, before anything runs.
    """
    sizes = ("length", "heads", "head_dim", "block")
    benchmark.check_arguments(arguments, positive=sizes)
    for name, known in (("dtype", DTYPES), ("backend", BACKENDS)):
        if (value := getattr(arguments, name)) not in known:
            raise UserError(f"--{name} must be one of {list(known)}, found {value!r}; choose one")
    torch.set_num_threads(arguments.threads)
    result = _measure(arguments)
    result |= {name: getattr(arguments, name) for name in (*sizes, "dtype", "backend")}
    benchmark.write_result(arguments, result, verb="targets")


def _measure(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = (3, 1, arguments.heads, arguments.length, arguments.head_dim)
    generator = torch.Generator().manual_seed(0)
    made = torch.randn(shape, generator=generator).to(arguments.device, DTYPES[arguments.dtype])
    queries, keys, values = made.unbind(0)

    def attention() -> Tensor:
        return F.scaled_dot_product_attention(queries, keys, values)

    def with_targets() -> tuple[Tensor, Tensor]:
        return attend_with_targets(
            queries, keys, values, arguments.block, backend=arguments.backend
        )

    say(f"targets: {BASELINE} and attention with targets, {arguments.repeats} rounds")
    seconds = benchmark.time_interleaved(
        {"attention": attention, "with targets": with_targets},
        repeats=arguments.repeats,
        device=arguments.device,
    )
    plain, extended = (
        benchmark.peak_allocated(f, device=arguments.device) for f in (attention, with_targets)
    )
    ratio = seconds["with targets"] / seconds["attention"]
    say(f"ratio {ratio:.3f}, {(extended - plain) / 1e6:.1f} MB more at the peak")
    return {
        "baseline": BASELINE,
        "seconds_attention": seconds["attention"],
        "seconds_with_targets": seconds["with targets"],
        "ratio": ratio,
        "ratio_to_floor": (ratio - 1) / FLOOR,
        "peak_extra_bytes": extended - plain,
    }
