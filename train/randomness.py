"""Random numbers that follow from what they belong to: a sample, or a step that all ranks share.

Draws are made on the CPU and then moved, so that they are the same on every device. They never
touch the global generators, whose states can be taken and set here, for what libraries draw.
"""

import hashlib
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def generators_of(device: torch.device) -> list[torch.device]:
    """`devices` of `torch.random.fork_rng` in a process that computes on `device`.

    By default it saves and sets the generators of all GPUs, and wakes up those of other ranks.
    """
    return [device] if device.type == "cuda" else []


def derive_seed(seed: int, *tags: int | str) -> int:
    """A seed in [0, 2**63) that depends on every bit of `seed` and of all `tags`."""
    text = "/".join(str(part) for part in (int(seed), *tags))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def sample_generator(seed: int, *tags: int | str) -> torch.Generator:
    """A CPU generator of its own for one purpose (`tags`) of the sample with seed `seed`."""
    return torch.Generator().manual_seed(derive_seed(seed, *tags))


def step_generator(seed: int, step: int, tag: str) -> torch.Generator:
    """A CPU generator for a choice that all ranks make alike at step `step` of a stage."""
    return sample_generator(seed, "step", step, tag)


def sample_noise(
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    *tags: int | str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal noise in which each sample depends on its own seed only.

    Args:
        shape: Shape of the noise of one sample, without the batch axis.
        seeds: One seed per sample.  [B]
        tags: What the noise is for, such as a name and a block index: other tags, other noise.
        device: Where the result goes.

    Returns:
        Float32 noise.  [B, *shape]
    """
    values = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    rows = [torch.randn(tuple(shape), generator=sample_generator(seed, *tags)) for seed in values]
    return torch.stack(rows).to(device)


def sample_uniform(
    shape: Sequence[int],
    seeds: Tensor | Sequence[int],
    *tags: int | str,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Uniform draws from [0, 1), one stream per sample; arguments as in `sample_noise`.

    Returns:
        Float32 numbers.  [B, *shape]
    """
    values = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    rows = [torch.rand(tuple(shape), generator=sample_generator(seed, *tags)) for seed in values]
    return torch.stack(rows).to(device)


def derive_seeds(seeds: Tensor, *tags: int | str) -> Tensor:
    """A seed per sample for another purpose, int64 on the CPU: [B] to [B]."""
    return torch.tensor([derive_seed(seed, *tags) for seed in seeds.tolist()], dtype=torch.int64)


def step_integer(seed: int, step: int, tag: str, *, high: int) -> int:
    """A number in 0 .. high - 1 that all ranks draw alike at a step of a stage."""
    return int(torch.randint(high, (), generator=step_generator(seed, step, tag)))


def step_choice(choices: Sequence[int], seed: int, step: int, tag: str) -> int:
    """One of `choices` that all ranks draw alike at a step of a stage."""
    return choices[step_integer(seed, step, tag, high=len(choices))]


GENERATORS = ("torch", "cuda", "numpy")
"""Global generators of a process whose states are tensors; Python's own is plain numbers."""


def seed_generators(seed: int) -> None:
    """Start all global generators of this process from `seed`."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def generator_states() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """States of the global generators: words by name as in `GENERATORS`, the rest as JSON."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else torch.empty(0)
    words = {
        "torch": torch.get_rng_state(),
        "cuda": cuda,
        "numpy": torch.from_numpy(np.asarray(keys).astype(np.int64)),
    }
    return words, {
        "python": random.getstate(),
        "numpy": [name, int(position), int(has_gauss), float(cached)],
    }


def set_generator_states(words: Mapping[str, Tensor], rest: Mapping[str, Any]) -> None:
    """Bring back what `generator_states` returned, through JSON or not."""
    torch.set_rng_state(words["torch"])
    if torch.cuda.is_available() and words["cuda"].numel():
        torch.cuda.set_rng_state(words["cuda"])
    kind, numbers, gauss = rest["python"]
    random.setstate((kind, tuple(numbers), gauss))
    name, position, has_gauss, cached = rest["numpy"]
    keys = words["numpy"].numpy().astype(np.uint32)
    np.random.set_state((name, keys, position, has_gauss, cached))
