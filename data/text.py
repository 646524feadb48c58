"""From captions to vectors: what a text encoder is, and the built-in one, without weights."""

import hashlib
import re
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import TextConfig
from data.umt5 import load_umt5_text, text_files


class TextEncoder(Protocol):
    """What the rest of the project asks of a text encoder."""

    dim: int
    length: int

    def __call__(self, text: str) -> tuple[Tensor, int]:
        """Vectors of a text, padded with zeros to [length, dim], and how many of them are real.

        They are float32 and on the CPU.
        """
        ...

    def count(self, text: str) -> int:
        """How many vectors a text has; raises `UserError` if more than `length`. Cheap."""
        ...


class HashedText:
    """One fixed pseudo-random unit vector per word: equal words equal vectors, nothing to train.

    Words are runs of letters and digits, in lower case.
    """

    def __init__(self, dim: int, length: int) -> None:
        """Keep the sizes.

        Args:
            dim: Size of a word's vector.
            length: Most words of a text.
        """
        self.dim = dim
        self.length = length

    def __call__(self, text: str) -> tuple[Tensor, int]:
        """Encode one text.

        Returns:
            The words' vectors in order, then zeros, float32 [length, dim]; and the number of words.

        Raises:
            UserError: If the text has more than `length` words.
        """
        words = self._words(text)
        rows = torch.zeros(self.length, self.dim)
        for row, word in zip(rows, words, strict=False):
            row.copy_(self._vector(word))
        return rows, len(words)

    def count(self, text: str) -> int:
        """Words of a text.

        Raises:
            UserError: If there are more than `length`.
        """
        return len(self._words(text))

    def _words(self, text: str) -> list[str]:
        words = re.findall(r"[^\W_]+", text.lower())
        if len(words) > self.length:
            raise UserError(
                f"a text must have at most text.length = {self.length} words, found {len(words)} "
                f"in {text[:80]!r}; shorten it or encode with a larger text.length"
            )
        return words

    def _vector(self, word: str) -> Tensor:
        """The unit vector of a word, float32 [dim]."""
        key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], dtype=np.uint64)
        values = np.random.Generator(np.random.Philox(key=key)).standard_normal(self.dim)
        return torch.from_numpy(values / np.linalg.norm(values)).float()


def build_text(config: TextConfig, device: torch.device | str = "cpu") -> TextEncoder:
    """The text encoder that a config names.

    Args:
        config: Its section.
        device: Where an encoder with weights computes.

    Raises:
        UserError: If the weights are not there or others.
    """
    if config.name == "umt5":
        return load_umt5_text(config, device)
    return HashedText(config.dim, config.length)


def text_identity(config: TextConfig) -> dict[str, Any]:
    """All that vectors of a text depend on: the settings, and which files the weights are.

    Raises:
        UserError: If there are no weights where the config says.
    """
    others = ("path", "negative")
    settings = {key: value for key, value in asdict(config).items() if key not in others}
    return settings | ({"files": text_files(config)} if config.name == "umt5" else {})
