"""One writer at a time, across processes: a lock on a file, waited for with a limit.

SQLite before 3.51.3 can corrupt a write-ahead log when a write and a checkpoint of two connections
overlap. Whoever holds this lock is the only one that does either.
"""

import os
import sys
import threading
import time
from pathlib import Path
from types import TracebackType

if sys.platform != "win32":
    import fcntl

_POLL_SECONDS = 0.001


class WriterLock:
    """A context manager, for one thread of one process at a time; not reentrant.

    The kernel releases the lock when its holder dies. Threads of one process share one open file,
    which the kernel locks once for all of them, so a second lock excludes the threads from each
    other.
    """

    def __init__(self, path: Path, patience_s: float) -> None:
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._patience_s = patience_s
        self._threads = threading.Lock()

    @property
    def stale(self) -> bool:
        """Whether the file was deleted or replaced, so that other processes lock another one."""
        try:
            return not os.path.samestat(os.fstat(self._file), self._path.stat())
        except FileNotFoundError:
            return True

    def __enter__(self) -> None:
        """Take the lock. Raises TimeoutError if another holder keeps it for too long."""
        deadline = time.monotonic() + self._patience_s
        if not self._threads.acquire(timeout=self._patience_s):
            raise TimeoutError("another thread keeps writing to the store")
        try:
            self._wait_until(deadline)
        except BaseException:
            self._threads.release()
            raise

    def _wait_until(self, deadline: float) -> None:
        while not self._try_lock():
            if time.monotonic() >= deadline:
                raise TimeoutError("another process keeps writing to the store")
            time.sleep(_POLL_SECONDS)

    def _try_lock(self) -> bool:
        if sys.platform == "win32":
            return True  # one process only
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if sys.platform != "win32":
                fcntl.flock(self._file, fcntl.LOCK_UN)
        finally:
            self._threads.release()

    def close(self) -> None:
        """Close the file. The lock cannot be taken afterwards."""
        os.close(self._file)
