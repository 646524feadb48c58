"""The prompt that guidance leads away from, encoded once, in a set of its own beside the clips.

A set of its own, so that another prompt encodes no clip again.
"""

from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from configs.schema import TextConfig
from data.batches import padded_text
from data.files import json_sha256
from data.shard_writer import ShardSetWriter
from data.shards import BadShard, ShardSet
from data.text import build_text, text_identity

VERSION = 1
"""Part of the source hash: raise it whenever the vectors change for the same prompt."""


def write_negative(out: Path, *, text: TextConfig, device: torch.device | str = "cpu") -> None:
    """Encode `text.negative` as captions are.

    The result is a set of one sample with the member `text.safetensors` (`text`, float32
    [words, dim], without padding); its properties are `text` (see `text_identity`) and `negative`,
    the prompt. A complete one is left alone.

    Args:
        out: Folder of the result.
        text: Encoder and prompt.
        device: Where an encoder with weights computes.

    Raises:
        UserError: If the encoder cannot be built, the prompt is too long, or `out` holds other
            files.
    """
    properties = {"text": text_identity(text), "negative": text.negative}
    writer = ShardSetWriter(
        out,
        samples_per_shard=1,
        source_hash=json_sha256([VERSION, properties]),
        properties=properties,
    )
    if writer.is_complete:
        return
    vectors, words = build_text(text, device)(text.negative)
    members = {"text.safetensors": save({"text": vectors[:words].contiguous()})}
    with writer:
        if not writer.completed:
            writer.write("negative", members, caption=text.negative, frames=0)


def read_negative(root: Path, *, clips: ShardSet, negative: str) -> Tensor:
    """Vectors of the negative prompt, made as those of the captions are.

    Args:
        root: Folder that `write_negative` wrote.
        clips: What `encode` wrote.
        negative: The prompt that it must be.

    Returns:
        Padded with zeros, float32 [T, E].

    Raises:
        BadShard: If the set is missing or damaged, holds another prompt, or another encoder made
            it than the captions of the clips.
        BadSample: If the stored bytes are damaged.
    """
    remedy = "run `encode` again, which encodes text.negative and no clip that is there"
    try:
        shards = ShardSet(root)
    except BadShard as error:
        raise BadShard(
            f"a guidance_scale other than 1 needs the encoded text.negative: {error}; {remedy}"
        ) from error
    wanted = {"text": clips.properties.get("text"), "negative": negative}
    wrong = [
        f"{name} {shards.properties.get(name)!r} in place of {value!r}"
        for name, value in wanted.items()
        if shards.properties.get(name) != value
    ]
    if wrong:
        raise BadShard(
            f"{root} must hold text.negative, encoded as the captions of {clips.root} are, found "
            f"{', '.join(wrong)}; {remedy}"
        )
    return padded_text(shards, shards.read(0))
