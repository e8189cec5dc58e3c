"""Files that appear whole or not at all: write beside, then rename."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


def temporary_name(path: str | Path) -> str:
    """A name in the same folder (a rename across file systems is not atomic), different for every process."""
    return f"{path}.tmp-{os.getpid()}"


@contextmanager
def atomic_write(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that replaces `path` when the block ends well and vanishes when it raises."""
    temporary = temporary_name(path)
    encoding = None if "b" in mode else "utf-8"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            sync(file)
        os.replace(temporary, path)
    except BaseException:
        remove_if_there(temporary)
        raise


def sync(file: IO) -> None:
    """Push the bytes to the disk, so that a rename never publishes a file whose contents are still in flight."""
    file.flush()
    os.fsync(file.fileno())


def remove_if_there(path: str | Path) -> None:
    """Delete a file that may not exist."""
    with suppress(FileNotFoundError):
        os.unlink(path)
