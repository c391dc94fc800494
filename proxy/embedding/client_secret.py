"""The secret with which the digests of clients' keys are keyed: made once, kept beside the store.

With it, and with nothing else, a digest can be held against a key. All workers share the file.
"""

import contextlib
import logging
import secrets
from pathlib import Path

from embedding_proxy.cache import atomic_file
from embedding_proxy.cache.disk.store import StoreError

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
    with contextlib.suppress(FileExistsError):
        atomic_file.write(file, secrets.token_bytes(SIZE), exclusive=True)
