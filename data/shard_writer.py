"""Writing of sets of webdataset shards: whole or not at all, continued after an interruption."""

import contextlib
import json
import os
import re
import tarfile
import zlib
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import webdataset

from data.files import (
    STARTED,
    claim_folder,
    file_sha256,
    is_started,
    is_whole,
    json_sha256,
    write_atomically,
)
from data.shards import MANIFEST, VERSION, BadSample, BadShard, SampleEntry


class ShardSetWriter:
    """Writes a set of shards; use it in a `with` statement.

    A shard gets its name when it is full, flushed and read back; the manifest is written when the
    `with` block ends without an error. After an interruption, write the same samples in the same
    order again, but leave out the first `completed`: whole shards are kept.
    """

    def __init__(
        self,
        root: Path,
        *,
        samples_per_shard: int,
        source_hash: str,
        properties: dict[str, Any] | None = None,
    ) -> None:
        """See what is there; nothing is changed before the `with` block.

        Args:
            root: Folder of the set; an older set in it, of another source, is deleted.
            samples_per_shard: Samples of each shard but the last.
            source_hash: Names what the samples are made from; `is_complete` compares it.
            properties: What readers need to know of all samples; stored in the manifest.
        """
        self.root = root
        self.samples_per_shard = samples_per_shard
        self.source_hash = source_hash
        self.properties = properties or {}
        self.is_complete = is_whole(root, source_hash, marker=MANIFEST)
        self._shards: list[dict[str, Any]] = []
        if is_started(root, source_hash, marker=MANIFEST):
            while (sealed := self._sealed(len(self._shards))) is not None:
                self._shards.append(sealed)
        self._keys = {entry["key"] for shard in self._shards for entry in shard["samples"]}
        self._pending: list[SampleEntry] = []
        self._writer: Any = None

    @property
    def completed(self) -> int:
        """Samples in the whole shards that an interrupted writer left."""
        return sum(len(shard["samples"]) for shard in self._shards)

    def write(self, key: str, members: dict[str, bytes], *, caption: str, frames: int) -> None:
        """Append a sample.

        Args:
            key: Name of the sample, unique in the set: letters, digits, _ and -.
            members: Content by extension, such as `json` or `latents.safetensors`.
            caption: Stored in the manifest only.
            frames: Length of the sample, stored in the manifest only.

        Raises:
            BadSample: If the key or an extension could not be read back, or the key is taken.
        """
        if not re.fullmatch(r"[A-Za-z0-9_-]+", key):
            raise BadSample(
                f"the key of a sample must consist of letters, digits, _ and -, found {key!r}: "
                f"webdataset splits names at the first dot; rename it"
            )
        if key in self._keys:
            raise BadSample(f"keys must be unique in a set, found {key!r} twice; rename one")
        if not members or not all(re.fullmatch(r"[a-z0-9_.]*[a-z0-9_]", name) for name in members):
            raise BadSample(f"sample {key!r} must have lower-case extensions, found {[*members]}")
        if self._writer is None:
            self._open()
        self._writer.write({"__key__": key, **members})
        self._keys.add(key)
        checks = {name: [0, len(data), zlib.crc32(data)] for name, data in members.items()}
        self._pending.append(SampleEntry(key, checks, caption, frames))
        if len(self._pending) == self.samples_per_shard:
            self._seal()

    def __enter__(self) -> Self:
        """Make the folder ready.

        Raises:
            UserError: If the folder holds other files.
        """
        owned = ("shard-*.tar", ".shard-*.json")
        claim_folder(self.root, self.source_hash, marker=MANIFEST, owned=owned)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Write the last shard and the manifest, or drop the unfinished shard after an error."""
        if self.is_complete:
            return
        if kind is not None:
            if self._writer is not None:
                with contextlib.suppress(OSError):  # a full disk, already being reported
                    self._writer.close()
                    self._stream.close()
                self._temporary.unlink(missing_ok=True)
            return
        if self._pending:
            self._seal()
        manifest = {
            "version": VERSION,
            "properties": self.properties,
            "shards": self._shards,
        }
        manifest["hash"] = json_sha256(manifest)
        manifest["source_hash"] = self.source_hash
        write_atomically(self.root / MANIFEST, json.dumps(manifest).encode())
        for number in range(len(self._shards)):
            self._record(number).unlink()
        (self.root / STARTED).unlink()

    def _record(self, number: int) -> Path:
        """Where a whole shard's part of the manifest waits for the others."""
        return self.root / f".shard-{number:06d}.json"

    def _sealed(self, number: int) -> dict[str, Any] | None:
        """The manifest's part of a shard that an interrupted writer finished, if it is whole."""
        record = self._record(number)
        if not record.exists():
            return None
        shard: dict[str, Any] = json.loads(record.read_bytes())
        path = self.root / shard["name"]
        is_full = len(shard["samples"]) == self.samples_per_shard
        whole = is_full and path.exists() and file_sha256(path) == shard["sha256"]
        return shard if whole else None

    def _open(self) -> None:
        """Start the next shard under a temporary name."""
        name = f"shard-{len(self._shards):06d}.tar"
        self._temporary = self.root / f".{name}.part-{os.getpid()}"
        self._stream = self._temporary.open("wb")
        self._writer = webdataset.TarWriter(self._stream, encoder=False, mtime=0)

    def _seal(self) -> None:
        """Finish the shard: flush it, read it back, compare, and give it its name."""
        self._writer.close()
        self._writer = None
        self._stream.flush()
        os.fsync(self._stream.fileno())
        self._stream.close()
        samples = []
        for wanted, (key, members) in zip(self._pending, _index_tar(self._temporary), strict=True):
            written = {name: numbers[1:] for name, numbers in wanted.members.items()}
            found = {name: numbers[1:] for name, numbers in members.items()}
            if key != wanted.key or found != written:
                raise BadShard(
                    f"{self._temporary} must hold sample {wanted.key!r} as it was written, reading "
                    f"it back found something else; check the disk and start again"
                )
            samples.append({**asdict(wanted), "members": members})
        path = self.root / f"shard-{len(self._shards):06d}.tar"
        shard = {
            "name": path.name,
            "bytes": self._temporary.stat().st_size,
            "sha256": file_sha256(self._temporary),
            "samples": samples,
        }
        self._temporary.replace(path)
        write_atomically(self._record(len(self._shards)), json.dumps(shard).encode())
        self._shards.append(shard)
        self._pending = []


def _index_tar(path: Path) -> list[tuple[str, dict[str, list[int]]]]:
    """Key and members ([offset, size, crc32] by extension) of each sample, in file order."""
    samples: list[tuple[str, dict[str, list[int]]]] = []
    with tarfile.open(path, "r:") as archive, path.open("rb") as file:
        for member in archive:
            key, extension = member.name.split(".", 1)
            file.seek(member.offset_data)
            checksum = zlib.crc32(file.read(member.size))
            if not samples or samples[-1][0] != key:
                samples.append((key, {}))
            samples[-1][1][extension] = [member.offset_data, member.size, checksum]
    return samples
