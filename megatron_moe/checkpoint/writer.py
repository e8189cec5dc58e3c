"""torch's files of shards, whose size and CRC-32 are known when they are written: nothing is read back for them.

    torch --memory of a tensor--> CountedFile --> the file
                                      |
                                      +--> a thread: CRC-32 of the same memory, while it is copied to the file

The checksum is of what torch had in memory, not of what a reading of the file would give: what goes wrong in between is found when the
checkpoint is verified.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem

Seen = dict[str, dict[str, int]]  # file name -> {"size": bytes, "crc32": number}

BESIDE_FROM = 1 << 18  # bytes from which a checksum takes longer than to ask a thread for it
ON_ITS_WAY_FROM = 1 << 25  # bytes from which the disk is given something to do, while more is copied


class CountedFile:
    """A new file that is written from its beginning to its end."""

    def __init__(self, path: str | os.PathLike):
        self._file = open(path, "wb")  # noqa: SIM115 - closed by close
        self._thread: ThreadPoolExecutor | None = None
        self.size = self.crc32 = self._on_its_way = 0

    def write(self, data: Any) -> int:
        """All of `data`, anything with a contiguous buffer; it is not looked at any more when this returns."""
        view = memoryview(data).cast("B")
        checksum = self._checksum(view)
        try:
            self._file.write(view)
        finally:
            self.crc32 = checksum()
        self.size += len(view)
        if self.size - self._on_its_way >= ON_ITS_WAY_FROM:
            self._send_on()
        return len(view)

    def _send_on(self) -> None:
        """Let the kernel begin to write what it would else first look at when a sync waits for it. That sync is made all the same."""
        if hasattr(os, "posix_fadvise"):
            # "no need of it" makes Linux write pages that are not on the disk; it drops only those that are
            os.posix_fadvise(self.fileno(), self._on_its_way, self.size - self._on_its_way, os.POSIX_FADV_DONTNEED)
        self._on_its_way = self.size

    def _checksum(self, view: memoryview) -> Any:
        """A function that waits for the checksum of all so far, `view` included."""
        if len(view) < BESIDE_FROM:
            value = zlib.crc32(view, self.crc32)
            return lambda: value
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "checksum")
        return self._thread.submit(zlib.crc32, view, self.crc32).result

    def tell(self) -> int:
        return self.size

    def flush(self) -> None:
        self._file.flush()

    def fileno(self) -> int:
        """For fsync, which knows nothing of what is still in a buffer: torch asks without a flush."""
        self._file.flush()
        return self._file.fileno()

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
        self._file.close()

    @property
    def entry(self) -> dict[str, int]:
        return {"size": self.size, "crc32": self.crc32}


class CountingWriter(FileSystemWriter):
    """Notes in `seen` what it has written, by the name under which it was written."""

    def __init__(self, path: str | os.PathLike, seen: Seen, **options: Any):
        super().__init__(path, **options)
        self.fs = _CountingFiles(seen)


class _CountingFiles(FileSystem):
    def __init__(self, seen: Seen):
        self._seen = seen

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        assert mode == "wb", f"{mode=}"
        file = CountedFile(path)
        try:
            yield file
        finally:
            file.close()
        self._seen[Path(path).name] = file.entry
