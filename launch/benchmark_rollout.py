"""Benchmark `rollout`: streaming generation under every cache policy at the same budget."""

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

from configs.errors import UserError
from configs.load import nearest
from launch import benchmark
from launch.benchmark_targets import DTYPES
from launch.measured_rollout import (
    SAMPLER,
    STORAGES,
    MeasuredRollout,
    Scene,
    shares,
    unavoidable,
)
from launch.steps import say
from models.kv_policies import POLICIES, build_policy

REFERENCE, STORED = "full", "salience"
"""The policy that others are compared with, and the one that also runs in other storages."""
SIZES = ("layers", "heads", "head_dim", "block", "budget_frames", "blocks")
COUNTED = (
    "tokens_per_second: denoise and refresh, without decoding; ratio_to_bound: matrix products and "
    "attention alone; peak_bytes: cache, activations and decoded frames, without weights"
)


@dataclass(frozen=True)
class Entry:
    """A policy, and how its cache stores: a name in `STORAGES`."""

    policy: str
    storage: str = "model"

    @property
    def label(self) -> str:
        """For people."""
        return self.policy if self.storage == "model" else f"{self.policy} {self.storage}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the shape; by default that of Wan2.1 1.3B with a sixth of width, tokens and text.

    Where 1.3B has 12 heads of 128 channels and 1560 tokens in a frame, these are 2 heads and 260
    tokens, so that linear layers, attention and S-MLP have the same shares of a block.
    """
    benchmark.add_arguments(parser)
    parser.set_defaults(repeats=3)
    for name, default, about in (
        ("layers", 5, "layers of the network; 1.3B: 30"),
        ("heads", 2, "attention heads; 1.3B: 12"),
        ("head-dim", 128, "channels of a head"),
        ("block", 3, "frames of a block"),
        ("budget-frames", 9, "frames whose tokens the cache keeps"),
        ("blocks", 18, "blocks of the video, of which the last are timed"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=about)
    parser.add_argument(
        "--grid",
        nargs="+",
        default=["10x26"],
        metavar=("ROWS", "COLUMNS"),
        help="tokens of a frame, 10 26 or 10x26; 1.3B: 30 52",
    )
    parser.add_argument("--dtype", default="float32", metavar="NAME", help=", ".join(DTYPES))
    parser.add_argument(
        "--policies",
        default="all",
        metavar="A,B",
        help=f"some of {', '.join(POLICIES)}; {REFERENCE} runs in any case",
    )


def run(arguments: argparse.Namespace) -> None:
    """Generate a video of the same length under every policy, all in turn, and write the record.

    Each cache is filled, then a block at a time is made under every policy: `repeats` rounds with
    the clock inside the block (`share`), one to warm up, and `repeats` rounds timed as a whole.
    `full` keeps growing meanwhile, so that it is timed at the end of a video of `blocks` blocks;
    the speed of the others does not depend on the length. For every policy and storage:

    - `tokens_per_second`: tokens of a block over the median seconds of denoising and refresh,
      without decoding; `ratio_to_full`: over that of `full`; `ratio_to_bound`: seconds of
      `measured_rollout.unavoidable`, over as many past tokens, over the seconds measured;
    - `budget_tokens`, null where everything is kept; `past_tokens`: what a timed block reads;
    - `peak_bytes`: of all tensors that it takes to fill the cache until it evicts, then to make and
      decode a block, without the weights; with `full`, memory for the whole video is among them;
      `kv_bytes` and `host_bytes`: kept tokens in the end, without memory for more;
    - `share`: see `MeasuredRollout.block_parts`.

    Raises:
        UserError: If an argument does not fit, before anything runs.
    """
    entries = _check(arguments)
    scene = _scene(arguments)
    torch.set_num_threads(arguments.threads)
    network, text = scene.network(), scene.text()
    rollouts = {
        entry: MeasuredRollout(
            network,
            scene.cache(network, policy=entry.policy, storage=entry.storage),
            scene.block_shape,
            text,
        )
        for entry in entries
    }
    say(f"rollout: {len(rollouts)} caches, {scene.blocks} blocks each")
    blocks = len(rollouts) * (1 + _blocks_after_filling(arguments))
    with torch.no_grad(), tqdm(total=blocks, unit="block", file=sys.stderr) as bar:
        rows = _measure(rollouts, arguments, bar)
    for row in rows:
        say(
            f"{row['policy']} {row['storage']}: {row['tokens_per_second']:.0f} tokens/s, "
            f"{row['ratio_to_full']:.2f} of full, {row['ratio_to_bound']:.2f} of the bound, score "
            f"and evict {row['share']['score'] + row['share']['evict']:.1%}, peak "
            f"{row['peak_bytes'] / 1e6:.0f} MB"
        )
    shared = {
        "settings": _settings(scene, arguments.dtype),
        "counted": COUNTED,
        "gpu": torch.cuda.get_device_name() if scene.device == "cuda" else "unmeasured",
    }
    in_one_word = argparse.Namespace(
        **vars(arguments) | {"grid": "x".join(str(count) for count in scene.grid)}
    )
    benchmark.write_result(in_one_word, [shared | row for row in rows], verb="rollout")


def _settings(scene: Scene, dtype: str) -> dict[str, Any]:
    """What a reader must know of the network, the video and the cache."""
    spec = scene.cache_spec("low")
    return (
        asdict(scene)
        | scene.sizes()
        | {
            "dtype": dtype,
            "sigmas": SAMPLER.sigmas,
            "video_frames": scene.blocks * scene.block,
            "sink_frames": spec.sink_frames,
            "protected_frames": spec.protected_frames,
            "evicted_tokens": spec.evicted_tokens,
        }
    )


def _check(arguments: argparse.Namespace) -> list[Entry]:
    """What is to be run; raises `UserError` if an argument does not fit."""
    benchmark.check_arguments(arguments, positive=SIZES)
    if arguments.head_dim % 2:
        raise UserError(f"--head-dim must be even, found {arguments.head_dim}; add a channel")
    if arguments.dtype not in DTYPES:
        raise UserError(f"--dtype must be one of {list(DTYPES)}, found {arguments.dtype!r}")
    filling = _blocks_until_eviction(arguments)
    needed = filling + _blocks_after_filling(arguments)
    if arguments.blocks < needed:
        raise UserError(
            f"--blocks must be at least {needed}, {filling} to fill the cache and the rest to "
            f"measure, found {arguments.blocks}; raise it or lower --repeats"
        )
    entries, scene = _entries(arguments.policies), _scene(arguments)
    for entry in entries:
        try:
            scene.cache_spec(entry.storage).check(build_policy(entry.policy), scene.layers)
        except ValueError as error:
            raise UserError(f"--budget-frames, policy {entry.policy!r}: {error}") from error
    return entries


def _entries(policies: str) -> list[Entry]:
    named = list(POLICIES) if policies == "all" else policies.split(",")
    for name in named:
        if name not in POLICIES:
            hint = nearest(name, POLICIES) or f"; choose some of {list(POLICIES)}"
            raise UserError(f"--policies must name cache policies, found {name!r}{hint}")
    entries = [Entry(name) for name in dict.fromkeys([REFERENCE, *named])]
    if STORED in named:
        entries += [Entry(STORED, storage) for storage in STORAGES if storage != "model"]
    return entries


def _scene(arguments: argparse.Namespace) -> Scene:
    sizes = {name: getattr(arguments, name) for name in SIZES}
    return Scene(
        **sizes,
        grid=_grid(arguments.grid),
        dtype=DTYPES[arguments.dtype],
        device=arguments.device,
    )


def _grid(words: list[str]) -> tuple[int, int]:
    parts = "x".join(words).split("x")
    numbers = [int(part) if part.isdecimal() else 0 for part in parts]
    if len(numbers) != 2 or min(numbers) < 1:
        raise UserError(
            f"--grid must be rows and columns of at least 1, found {' '.join(words)!r}; "
            "give two numbers such as 10 26"
        )
    return numbers[0], numbers[1]


def _blocks_until_eviction(arguments: argparse.Namespace) -> int:
    return -(-arguments.budget_frames // arguments.block) + 1


def _blocks_after_filling(arguments: argparse.Namespace) -> int:
    """Of one video: rounds for the shares, one to warm up, rounds that are timed as a whole."""
    return 2 * arguments.repeats + 1


def _measure(
    rollouts: dict[Entry, MeasuredRollout], arguments: argparse.Namespace, bar: "tqdm[Any]"
) -> list[dict[str, Any]]:
    """The row of each entry."""
    repeats, device = arguments.repeats, arguments.device
    first = _blocks_until_eviction(arguments)
    more = arguments.blocks - first - _blocks_after_filling(arguments)
    peaks: dict[Entry, int] = {}
    for entry, rollout in rollouts.items():
        start = partial(rollout.start, first)
        peaks[entry] = benchmark.peak_allocated(start, device=device)
        rollout.fill(more)
        bar.update()
    parts: dict[Entry, list[dict[str, float]]] = {entry: [] for entry in rollouts}
    for _ in range(repeats):
        for entry, rollout in rollouts.items():
            parts[entry].append(rollout.block_parts())
            bar.update()
    pasts = {entry: _timed_past(rollout, repeats) for entry, rollout in rollouts.items()}
    functions: dict[str, Callable[[], Any]] = {
        f"bound of {past} tokens": unavoidable(next(iter(rollouts.values())), past_tokens=past)
        for past in pasts.values()
    }
    for entry, rollout in rollouts.items():
        functions[entry.label] = partial(_advance, rollout, bar)
    seconds = benchmark.time_interleaved(functions, repeats=repeats, device=device)
    reference = seconds[Entry(REFERENCE).label]
    rows = []
    for entry, rollout in rollouts.items():
        cache, taken = rollout.cache, seconds[entry.label]
        rows.append(
            {
                "policy": entry.policy,
                "storage": entry.storage,
                "budget_tokens": cache.spec.budget_tokens if cache.policy.is_bounded else None,
                "past_tokens": pasts[entry],
                "seconds": taken,
                "bound_seconds": seconds[f"bound of {pasts[entry]} tokens"],
                "tokens_per_second": cache.spec.block_len / taken,
                "ratio_to_full": reference / taken,
                "ratio_to_bound": seconds[f"bound of {pasts[entry]} tokens"] / taken,
                "peak_bytes": peaks[entry],
                "kv_bytes": cache.num_bytes,
                "host_bytes": cache.host_bytes,
                "share": shares(parts[entry]),
            }
        )
    return rows


def _advance(rollout: MeasuredRollout, bar: "tqdm[Any]") -> None:
    rollout.advance()
    bar.update()


def _timed_past(rollout: MeasuredRollout, repeats: int) -> int:
    """Tokens that the next block but one reads; if all are kept, the middle one of those timed."""
    now, block_len = rollout.past_tokens(), rollout.cache.spec.block_len
    if rollout.cache.policy.is_bounded:
        return now
    return now + block_len + (repeats - 1) * block_len // 2
