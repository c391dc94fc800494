"""Sessions of the dashboard: a signed cookie in place of an admin's key.

The cookie holds when it ends and a tag of the key that was shown at the login, both signed. Neither
tells anything of the key. Each use looks the tag up among the keys, so a session ends at once when
its key is revoked, expires or is an admin's no longer. The signing key is 32 bytes of chance in a
private file beside the store: all workers share it, and it survives a restart and a reload. Where
it cannot be written, each process has its own.
"""

import hmac
import logging
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from embedding_proxy.cache import atomic_file

log = logging.getLogger("embedding_proxy.dashboard")

COOKIE = "embedding_proxy_session"
SESSION_S = 12 * 3600
"""Seconds after which one has to log in again."""
SIGNING_KEY_FILE = "dashboard.secret"
"""The name of the file with the signing key, in the folder of the store."""
_SECRET_BYTES = 32
_TAG_BYTES = 16
_SIGNATURE_BYTES = 32
_TIME_BYTES = 8
_PROCESS_SECRET = secrets.token_bytes(_SECRET_BYTES)
"""For want of a file."""


class Session(NamedTuple):
    """What a valid cookie says."""

    expires: int
    """Seconds since 1970."""
    tag: bytes
    """Stands for the key, see `Sessions.tag_of`."""


class Sessions:
    """Signs cookies, and reads them."""

    def __init__(self, file: Path, *, clock: Callable[[], float] = time.time) -> None:
        """`file` holds the signing key; it is made where it is missing, when one is needed."""
        self._file = file
        self._clock = clock
        self._secret: bytes | None = None

    def load(self) -> None:
        """Read the signing key, or make one. Blocks; never raises."""
        if self._secret is not None:
            return
        try:
            with suppress(FileExistsError):
                if not self._file.exists():
                    secret = secrets.token_bytes(_SECRET_BYTES)
                    atomic_file.write(self._file, secret, exclusive=True)
            content = self._file.read_bytes()
        except OSError as error:
            log.warning("sessions of the dashboard end with this process: %s", error)
            content = b""
        self._secret = content if len(content) == _SECRET_BYTES else _PROCESS_SECRET

    def tag_of(self, digest: bytes) -> bytes:
        """Return what stands for a key in a cookie, from the digest of the key."""
        return hmac.digest(self._key, b"tag" + digest, "sha256")[:_TAG_BYTES]

    def sign(self, digest: bytes) -> str:
        """Return the value of a new cookie for a key, given its digest."""
        expires = int(self._clock()) + SESSION_S
        content = expires.to_bytes(_TIME_BYTES) + self.tag_of(digest)
        return (content + self._signature(content)).hex()

    def read(self, cookie: str) -> Session | None:
        """Return what a cookie says; None if it was not signed here, or its time is over."""
        try:
            raw = bytes.fromhex(cookie)
        except ValueError:
            return None
        content, signature = raw[:-_SIGNATURE_BYTES], raw[-_SIGNATURE_BYTES:]
        if not hmac.compare_digest(signature, self._signature(content)):
            return None
        expires = int.from_bytes(content[:_TIME_BYTES])
        return Session(expires, content[_TIME_BYTES:]) if self._clock() < expires else None

    def _signature(self, content: bytes) -> bytes:
        return hmac.digest(self._key, b"session" + content, "sha256")

    @property
    def _key(self) -> bytes:
        self.load()
        return self._secret or _PROCESS_SECRET
