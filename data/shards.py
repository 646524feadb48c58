"""Sets of webdataset shards with a manifest: read exactly, or refused.

The tar files are plain webdataset shards. The manifest adds what a tar lacks: where each member
lies, how long it is and its crc32, so that a sample is one positioned read and damage is an error
that names the sample. A folder without a manifest is not a data set.
"""

import bisect
import json
import os
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from data.files import file_sha256, json_sha256

MANIFEST = "manifest.json"
VERSION = 1
OPEN_SHARDS = 32
"""Shards a reader keeps open at most."""


class BadShard(UserError):
    """A set of shards cannot be used; the message names the file."""


class BadSample(UserError):
    """A sample cannot be written or read; the message names shard, key and member."""


@dataclass(frozen=True)
class SampleEntry:
    """What the manifest holds about one sample."""

    key: str
    members: dict[str, list[int]]
    """Offset, size and crc32 of each member's content, by extension."""
    caption: str
    frames: int


class ShardSet:
    """Reads a set of shards sample by sample; may be used from forked worker processes."""

    def __init__(self, root: Path) -> None:
        """Read the manifest and check that every shard is there, at its size.

        Raises:
            BadShard: If there is no manifest, it is damaged, or a shard is missing or cut short.
        """
        self.root = root
        manifest = _read_manifest(root)
        self.hash: str = manifest["hash"]
        """Changes with any byte of any sample."""
        self.properties: dict[str, Any] = manifest["properties"]
        self.shards: list[dict[str, Any]] = manifest["shards"]
        self.sizes = [len(shard["samples"]) for shard in self.shards]
        """Samples in each shard."""
        self._starts = [0, *np.cumsum(self.sizes).tolist()]
        self._open: OrderedDict[tuple[int, int], int] = OrderedDict()
        for shard in self.shards:
            path = root / shard["name"]
            if not path.exists():
                raise BadShard(f"{path} must exist, found nothing; write the set again")
            if path.stat().st_size != shard["bytes"]:
                raise BadShard(
                    f"{path} must have {shard['bytes']} bytes as in the manifest, found "
                    f"{path.stat().st_size}; copy or write it again"
                )

    def __len__(self) -> int:
        """Samples in all shards."""
        return int(self._starts[-1])

    def entry(self, index: int) -> SampleEntry:
        """The manifest's entry of a sample, 0 <= index < len."""
        shard, place = self._locate(index)
        return SampleEntry(**self.shards[shard]["samples"][place])

    def read(self, index: int, *extensions: str) -> dict[str, bytes]:
        """The members of a sample, by extension; all if none is named.

        Raises:
            BadSample: If a member is cut short or its crc32 is not the manifest's.
        """
        shard, _ = self._locate(index)
        entry = self.entry(index)
        result = {}
        for extension in extensions or entry.members:
            offset, size, checksum = entry.members[extension]
            content = os.pread(self._descriptor(shard), size, offset)
            if len(content) != size or zlib.crc32(content) != checksum:
                raise BadSample(
                    f"{self.root / self.shards[shard]['name']}::{entry.key}.{extension} must be "
                    f"{size} bytes with crc32 {checksum}, found {len(content)} bytes with crc32 "
                    f"{zlib.crc32(content)}; copy or write the shard again"
                )
            result[extension] = content
        return result

    def verify(self) -> None:
        """Compare the sha256 of every shard with the manifest.

        Raises:
            BadShard: If one differs.
        """
        for shard in self.shards:
            path = self.root / shard["name"]
            if file_sha256(path) != shard["sha256"]:
                raise BadShard(
                    f"{path} must have the sha256 {shard['sha256']} as in the manifest, found "
                    f"another; copy or write it again"
                )

    def __getstate__(self) -> dict[str, Any]:
        """Without open files, for worker processes that are spawned."""
        return {**self.__dict__, "_open": OrderedDict()}

    def _locate(self, index: int) -> tuple[int, int]:
        """Number of the shard of a sample, and the sample's place in it."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of a set of {len(self)}")
        shard = bisect.bisect_right(self._starts, index) - 1
        return shard, index - self._starts[shard]

    def _descriptor(self, shard: int) -> int:
        """An open file of this process; a forked worker opens its own."""
        name = (os.getpid(), shard)
        if name not in self._open:
            if len(self._open) >= OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[name] = os.open(self.root / self.shards[shard]["name"], os.O_RDONLY)
        self._open.move_to_end(name)
        return self._open[name]


def _read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of a set, checked against its own hash."""
    path = root / MANIFEST
    if not path.exists():
        raise BadShard(
            f"{root} must be a complete set of shards, found no {MANIFEST}; "
            f"run the command that writes it, it goes on where it stopped"
        )
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        hashed = {name: manifest[name] for name in ("version", "properties", "shards")}
        is_whole = manifest["hash"] == json_sha256(hashed) and manifest["version"] == VERSION
    except (KeyError, TypeError, ValueError):
        is_whole = False
    if not is_whole:
        raise BadShard(
            f"{path} must be an undamaged manifest of version {VERSION}, found a damaged or "
            f"foreign file; write the set again"
        )
    return manifest
