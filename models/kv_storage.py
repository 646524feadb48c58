"""How cached keys and values are stored: in the model's precision, or in 8 or 4 bits.

A storage holds no state: what it measures once per layer is a dictionary that the layer keeps.
Every part of a token has its token axis at dim 2, so one gather, cat or copy serves them all.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

NARROWEST = 1 / 16
"""Narrowest channel of a head against its median one, our choice. A channel that hardly moves in
the first block may move later, and the gain it would then need coarsens the whole token; at a
sixteenth of the others' step its own error does not count in a dot product."""

HALF_STEP = 2.0**-10  # float16 numbers are at most this far apart, relative to themselves,
HALF_TINY = 2.0**-24  # or this far where they are subnormal; also the smallest of them


class Storage(ABC):
    """Turns keys and values into what the cache holds, and back.

    Keys come before rotation, after the norm of keys: there their channels have a range of their
    own that lasts over a video; rotation would mix channels and break it.
    """

    name: ClassVar[str]

    @abstractmethod
    def calibrate(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """What the layer keeps for all later blocks, measured once on the first one.

        Args:
            keys: Before rotation.  [B, N, S, D]
            values: [B, N, S, D]

        Returns:
            float32, per sample, never with a token axis; empty if nothing is to be measured.

        Raises:
            ValueError: If there is no token, or these heads cannot be stored.
        """

    @abstractmethod
    def encode(
        self, keys: Tensor, values: Tensor, calibration: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """What is held of each token.  Every part [B, N, S, *].

        Args:
            keys: Before rotation.  [B, N, S, D]
            values: [B, N, S, D]
            calibration: From `calibrate`, of the same samples and layer.
        """

    @abstractmethod
    def decode(
        self, parts: dict[str, Tensor], calibration: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Keys and values as attention reads them, in `dtype`.  [B, N, S, D]."""

    @abstractmethod
    def token_bytes(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Bytes that one token of one layer holds, all parts together; `dtype` is the model's."""


@dataclass(frozen=True)
class ModelPrecision(Storage):
    """Keeps the tensors themselves, without a copy."""

    name: ClassVar[str] = "model"

    def calibrate(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Nothing to measure."""
        return {}

    def encode(
        self, keys: Tensor, values: Tensor, calibration: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The same two tensors."""
        return {"keys": keys, "values": values}

    def decode(
        self, parts: dict[str, Tensor], calibration: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The same two tensors; converted only if they are of another type."""
        return parts["keys"].to(dtype), parts["values"].to(dtype)

    def token_bytes(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Two vectors per head."""
        return 2 * num_heads * head_dim * dtype.itemsize


class Quantised(Storage):
    """Keys per channel, values per token, as integers of `bits` bits, rounded to nearest.

    That keys want a range per channel and values one per token is from KIVI (arXiv:2402.02750)
    and KVQuant (arXiv:2401.18079), where a few channels of the keys are far larger than the rest.
    With c the middle and r half the range of a channel over the first block, per sample and head:

        key:   code = round(Q (k - c) / (r g)),     Q = 2^(bits - 1) - 1,  g = max_d |k - c| / r
        value: code = round((v - zero) / scale),    scale = (max_d v - zero) / (2^bits - 1)

    Ours is the gain g, one float16 per token and head: a range fixed by the first block would clip
    later outliers, and a range per group of tokens, as in KIVI, would need a table per group once
    tokens are evicted one by one. Its price: one outlier coarsens the other channels of its own
    token. g and scale are rounded so that no code is beyond the last one, and zero down: nothing is
    ever clipped and every error is at most half a step. Codes of keys are centred, so a channel
    that stays at c is exact.

    g, scale and zero are float16. Values are first divided by a power of two near the largest
    value of their head in the first block, hence any magnitude fits; a later token 2^15 times
    larger becomes infinite or NaN in `decode`, and shows. `decode` computes in float32 (codes
    times a rounded scale would err by more than a step of 8 bits in bfloat16), for which it needs
    4 bytes per number for a moment.
    """

    bits: ClassVar[int]

    def calibrate(self, keys: Tensor, values: Tensor) -> dict[str, Tensor]:
        """Middle and half range of every channel of the keys, unit of every head of the values.

        Returns:
            `middle` and `reach`, [B, N, 1, D], of the keys; `unit`, [B, N, 1, 1], of the values.

        Raises:
            ValueError: If there is no token, or 4 bits meet an odd number of channels.
        """
        self._check_head_dim(keys.shape[-1])
        if not keys.shape[2]:
            raise ValueError("calibration must see at least one token, got none; use a whole block")
        low, high = keys.float().aminmax(dim=2, keepdim=True)  # [B, N, 1, D]
        reach = high / 2 - low / 2
        largest = values.float().abs().amax(dim=(2, 3), keepdim=True)  # [B, N, 1, 1]
        exponent = torch.frexp(largest).exponent - 1  # 0 has exponent 0
        return {
            "middle": high / 2 + low / 2,
            "reach": reach.maximum(_narrowest(reach, torch.maximum(-low, high))),
            "unit": torch.ldexp(torch.ones_like(largest), exponent),
        }

    def encode(
        self, keys: Tensor, values: Tensor, calibration: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Codes, and what they are relative to.

        Returns:
            `keys` and `values`, uint8, [B, N, S, D] or half of that; `ranges`, float16: gain of
            the key, scale and zero of the value in units.  [B, N, S, 3]

        Raises:
            ValueError: If 4 bits meet an odd number of channels.
        """
        self._check_head_dim(keys.shape[-1])
        middle_code, last_code = 2 ** (self.bits - 1) - 1, 2**self.bits - 1
        normal = (keys.float() - calibration["middle"]) / calibration["reach"]
        gain = _half_positive(normal.abs().amax(dim=-1, keepdim=True))
        key_codes = normal.mul_(middle_code / gain).round_().add_(middle_code)
        scaled = values.float() / calibration["unit"]
        low, high = scaled.aminmax(dim=-1, keepdim=True)
        zero = _half_below(low)
        scale = _half_positive((high - zero) / last_code)
        value_codes = scaled.sub_(zero).div_(scale).round_()
        return {
            "keys": self._pack(key_codes.to(torch.uint8)),
            "values": self._pack(value_codes.to(torch.uint8)),
            "ranges": torch.cat([gain, scale, zero], dim=-1).half(),
        }

    def decode(
        self, parts: dict[str, Tensor], calibration: dict[str, Tensor], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """The nearest keys and values that the codes can tell."""
        middle_code = 2 ** (self.bits - 1) - 1
        gain, scale, zero = parts["ranges"].float().split(1, dim=-1)  # each [B, N, S, 1]
        keys = self._unpack(parts["keys"]).float().sub_(middle_code).mul_(gain / middle_code)
        keys = keys.mul_(calibration["reach"]).add_(calibration["middle"]).to(dtype)
        values = self._unpack(parts["values"]).float().mul_(scale).add_(zero)
        return keys, values.mul_(calibration["unit"]).to(dtype)

    def token_bytes(self, num_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """Two vectors of codes per head, and three float16.

        Raises:
            ValueError: If 4 bits meet an odd number of channels.
        """
        self._check_head_dim(head_dim)
        return num_heads * (2 * head_dim * self.bits // 8 + 3 * torch.float16.itemsize)

    def _check_head_dim(self, head_dim: int) -> None:
        if self.bits == 4 and head_dim % 2:
            raise ValueError(
                f"4 bits pack two channels into a byte, so a head must have an even number of "
                f"channels, got {head_dim}; use int8"
            )

    def _pack(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        low, high = codes.chunk(2, dim=-1)
        return low | high << 4  # [B, N, S, D / 2]

    def _unpack(self, codes: Tensor) -> Tensor:
        if self.bits == 8:
            return codes
        return torch.cat([codes & 15, codes >> 4], dim=-1)  # [B, N, S, D]


@dataclass(frozen=True)
class Int8(Quantised):
    """A byte per channel: steps of 1/254 of a key's range and 1/255 of a value's."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8


@dataclass(frozen=True)
class Int4(Quantised):
    """Two channels per byte: steps of 1/14 of a key's range and 1/15 of a value's."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4


STORAGES: dict[str, Storage] = {s.name: s for s in (ModelPrecision(), Int8(), Int4())}


def storage_named(name: str) -> Storage:
    """The storage of that name.

    Raises:
        ValueError: If there is none.
    """
    if name not in STORAGES:
        raise ValueError(f"cache storage must be one of {sorted(STORAGES)}, got '{name}'")
    return STORAGES[name]


def _narrowest(reach: Tensor, magnitude: Tensor) -> Tensor:
    """Smallest half range a channel may have; positive, even for keys that are all the same."""
    typical = reach.median(dim=-1, keepdim=True).values  # the median ignores outlier channels
    for wider in (reach.amax(-1, keepdim=True), magnitude.amax(-1, keepdim=True)):
        typical = torch.where(typical > 0, typical, wider)
    typical = torch.where(typical > 0, typical, torch.ones_like(typical))
    return (typical * NARROWEST).clamp(min=torch.finfo(torch.float32).tiny)


def _half_positive(x: Tensor) -> Tensor:
    """The float16 number next to each x >= 0, never 0, as float32; infinite beyond its range.

    What is divided by it may end 2^-11 beyond the last code (255.1), which rounds back onto it.
    """
    return (x + HALF_TINY).half().float()


def _half_below(x: Tensor) -> Tensor:
    """A float16 number at or just below x, as float32; infinite beyond its range."""
    nearest = x.half().float()
    # Three quarters of the largest distance between neighbours always round to a lower one.
    lower = (nearest - (nearest.abs() * HALF_STEP * 0.75).clamp(min=HALF_TINY)).half().float()
    return torch.where(nearest > x, lower, nearest)
