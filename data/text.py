"""From captions to vectors, without weights."""

import hashlib
import re
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import TextConfig


class TextEncoder(Protocol):
    """What the rest of the project asks of a text encoder."""

    dim: int
    length: int

    def __call__(self, text: str) -> tuple[Tensor, int]:
        """Vectors of a text, padded with zeros to [length, dim], and how many of them are real."""
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
        words = re.findall(r"[^\W_]+", text.lower())
        if len(words) > self.length:
            raise UserError(
                f"a text must have at most text.length = {self.length} words, found {len(words)} "
                f"in {text[:80]!r}; shorten it or encode with a larger text.length"
            )
        rows = torch.zeros(self.length, self.dim)
        for row, word in zip(rows, words, strict=False):
            row.copy_(self._vector(word))
        return rows, len(words)

    def _vector(self, word: str) -> Tensor:
        """The unit vector of a word, float32 [dim]."""
        key = np.frombuffer(hashlib.sha256(word.encode()).digest()[:16], dtype=np.uint64)
        values = np.random.Generator(np.random.Philox(key=key)).standard_normal(self.dim)
        return torch.from_numpy(values / np.linalg.norm(values)).float()


def build_text(config: TextConfig) -> TextEncoder:
    """The text encoder that a config names.

    Raises:
        UserError: If the name is unknown.
    """
    if config.name != "hashed":
        raise UserError(f"text.name={config.name!r} is unknown; choose one of ['hashed']")
    return HashedText(config.dim, config.length)
