"""The secret with which the digests of clients' keys are keyed: made once, kept beside the store.

With it, and with nothing else, a digest can be held against a key. All workers share the file.
"""

import contextlib
import logging
import os
import secrets
from pathlib import Path

from cache.disk.store import StoreError

FILE = "client-keys.secret"
"""The name of the file, in the folder of the store."""
SIZE = 32
"""Bytes."""

log = logging.getLogger("embedding_proxy.keys")


def load(folder: Path) -> bytes:
    """Return the secret, made now if there is none. Raises StoreError for one that is damaged.

    Where it cannot be kept it is this process's own: what is bought then is found by nobody later.
    """
    file = folder / FILE
    try:
        if not file.exists():
            _make(file)
        secret = file.read_bytes()
    except OSError as error:
        log.warning(
            "%s: cannot be kept (%s): what is bought with clients' keys will be bought anew after"
            " a restart",
            *(file, error.strerror),
        )
        return secrets.token_bytes(SIZE)
    if len(secret) != SIZE:
        raise StoreError(
            f"{file}: is damaged: bring it back from a backup; or delete it, and what was bought"
            " with clients' keys is bought anew"
        )
    return secret


def _make(file: Path) -> None:
    """Write a new secret, whole or not at all; if another process is first, its own stays."""
    part = file.with_suffix(f".{os.getpid()}.part")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    try:
        part.touch(mode=0o600, exist_ok=False)
        with part.open("r+b") as writing:
            writing.write(secrets.token_bytes(SIZE))
            writing.flush()
            os.fsync(writing.fileno())
        # Unlike a rename, a link never takes the place of another.
        with contextlib.suppress(FileExistsError):
            os.link(part, file)
    finally:
        part.unlink(missing_ok=True)
