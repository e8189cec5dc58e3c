"""One job per run directory: two would sweep each other's unfinished saves and mix their metrics.

The kernel holds the lock, not the file: it ends with the process, however that ends, so there is no stale lock to clear
away. Data workers, which are forked, do not inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import socket
from pathlib import Path

from megatron_moe.checkpoint.files import CheckpointError

log = logging.getLogger(__name__)

LOCK = "lock"
_HELD = (errno.EACCES, errno.EAGAIN)


class DirectoryLock:
    """Held from here until `close`, or until the process is gone. CheckpointError names the process that holds it."""

    def __init__(self, directory: Path):
        directory.mkdir(parents=True, exist_ok=True)
        self._file = open(directory / LOCK, "a+")  # noqa: SIM115 - open for the whole run
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _HELD:  # some network file systems have no locks
                log.warning("%s cannot be locked (%s): see to it that no second job saves there", directory, error.strerror)
                return
            self._file.seek(0)
            holder = self._file.read().strip() or "another process"
            self._file.close()
            raise CheckpointError(
                f"--save {directory} is in use by {holder}; wait until that job has ended, end it, or choose another --save"
            ) from None
        self._file.truncate(0)
        self._file.write(f"host {socket.gethostname()}, pid {os.getpid()}")
        self._file.flush()

    def close(self) -> None:
        self._file.close()
