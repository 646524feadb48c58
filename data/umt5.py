"""The text encoder of Wan2.1: transformers' `UMT5EncoderModel` with its tokenizer."""

import html
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from configs.errors import UserError
from configs.schema import TextConfig
from data.pretrained import (
    PRECISIONS,
    PretrainedError,
    find_network,
    fingerprint,
    load_network,
    require_packages,
    require_sizes,
)

TOKENIZER = ("tokenizer.json", "spiece.model")
"""Files of which a tokenizer's folder has at least one."""


class UMT5Text:
    """Captions to vectors, one caption at a time, so that no other takes part in its rounding."""

    def __init__(self, network: Any, tokenizer: Any, *, length: int) -> None:
        """Keep the parts.

        Args:
            network: A `UMT5EncoderModel` in evaluation mode.
            tokenizer: Of the same vocabulary; ends every text with its end token.
            length: Most tokens of a text.
        """
        self.dim = int(network.config.d_model)
        self.length = length
        self._network = network
        self._tokenizer = tokenizer

    @torch.no_grad()
    def __call__(self, text: str) -> tuple[Tensor, int]:
        """Encode one text.

        Returns:
            A vector per token, then zeros, float32 [length, dim]; and the number of tokens.

        Raises:
            UserError: If the text has more than `length` tokens.
        """
        tokens = torch.tensor([self._tokens(text)], device=self._network.device)
        hidden = self._network(tokens, attention_mask=torch.ones_like(tokens)).last_hidden_state
        rows = torch.zeros(self.length, self.dim)
        rows[: tokens.shape[1]] = hidden[0].float().cpu()
        return rows, tokens.shape[1]

    def count(self, text: str) -> int:
        """Tokens of a text, its end among them; the network does not run.

        Raises:
            UserError: If there are more than `length`.
        """
        return len(self._tokens(text))

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self._tokenizer(clean(text)).input_ids
        if len(tokens) > self.length:
            raise UserError(
                f"a text must have at most text.length = {self.length} tokens, found {len(tokens)} "
                f"in {text[:80]!r}; shorten it or encode with a larger text.length"
            )
        return tokens


def clean(text: str) -> str:
    """A text as Wan2.1 was trained on: mended, without HTML escapes, its white space single.

    Broken encodings are mended by ftfy; escapes are resolved twice, as pages that were escaped
    twice need.
    """
    from ftfy import fix_text

    return " ".join(html.unescape(html.unescape(fix_text(text))).split())


def find_text(config: TextConfig) -> tuple[Path, Path]:
    """The folders of the network and the tokenizer that a config names; no weights are read.

    Raises:
        PretrainedError: If one is missing, or a package is.
    """
    require_packages(f"text.name={config.name}", ("transformers", "accelerate", "ftfy"))
    network = find_network("text.path", config.path, "text_encoder", marks=("umt5",))
    tokenizer = Path(config.path) / "tokenizer"
    folder = tokenizer if tokenizer.is_dir() else network
    if not any((folder / name).is_file() for name in TOKENIZER):
        raise PretrainedError(
            f"{folder} must hold a tokenizer, {' or '.join(TOKENIZER)}, found neither; copy it "
            "there, or give as text.path a folder around `text_encoder` and `tokenizer`"
        )
    return network, folder


def text_files(config: TextConfig) -> list[Any]:
    """Fingerprint of network and tokenizer."""
    network, tokenizer = find_text(config)
    return [fingerprint(network), fingerprint(tokenizer, [*TOKENIZER, "tokenizer_config.json"])]


def load_umt5_text(config: TextConfig, device: torch.device | str) -> UMT5Text:
    """The text encoder that a config names, its weights on a device.

    Raises:
        PretrainedError: If a folder, its content or the sizes in the config do not fit.
    """
    network_folder, tokenizer_folder = find_text(config)
    from transformers import UMT5EncoderModel

    tokenizer = load_tokenizer(tokenizer_folder)
    dtype = PRECISIONS[config.precision]
    network = load_network(
        UMT5EncoderModel,
        network_folder,
        key="text.path",
        device=device,
        ignored=("decoder.", "lm_head."),
        dtype=dtype,
    )
    if len(tokenizer) > network.config.vocab_size:
        raise PretrainedError(
            f"{network_folder} must know the {len(tokenizer)} tokens of {tokenizer_folder}, found "
            f"a vocabulary of {network.config.vocab_size}; take both from the same model"
        )
    require_sizes("text", network_folder, dim=(config.dim, network.config.d_model))
    return UMT5Text(network, tokenizer, length=config.length)


def load_tokenizer(folder: Path) -> Any:
    """A tokenizer that ends every text, as the network was trained.

    Raises:
        PretrainedError: If it cannot be read, or does not end a text with its end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (KeyError, OSError, TypeError, ValueError) as error:
        raise PretrainedError(
            f"{folder} must hold a whole tokenizer, loading it found: "
            f"{' '.join(str(error).split())[:300]}; copy the folder again, or correct text.path"
        ) from error
    tokens = tokenizer("a").input_ids
    if tokenizer.eos_token_id is None or tokens[-1:] != [tokenizer.eos_token_id]:
        raise PretrainedError(
            f"{folder} must hold a tokenizer that ends a text with its end token, found the tokens "
            f"{tokens} for 'a' and the end token {tokenizer.eos_token_id}; take that of the network"
        )
    return tokenizer
