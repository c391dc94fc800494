"""What is known of clients' keys: which the provider has accepted, and when; which it has refused.

Kept under digests, in memory and as empty files whose time is that of the proof: so workers share
them, and a restart amid an outage forgets none. Failure licence: what the disk does not take is
known to this process alone.
"""

import contextlib
import enum
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

from embedding_proxy.providers.base import ClientKeyRefused
from embedding_proxy.providers.lru_cache import LRUCache

FRESH_S = 3600.0
"""So long after a proof nothing is asked."""
STALE_S = 86_400.0
"""So long after a proof a key is still served while the provider cannot be asked. Beyond it, or as
soon as the provider refuses it, it is not."""
AGAIN_S = 60.0
"""So long after an attempt that told nothing another is made."""
REFUSED_S = 60.0
"""So long a refused key is refused here, and nobody is asked."""
RENEW_S = 300.0
"""A newer proof is not renewed by an answer."""
MOST = 10_000
"""Keys that are remembered, of either sort; those noted longest ago are forgotten."""

SWEEP_EVERY = 1000
"""New files after which the old ones are looked for, and those beyond MOST."""

log = logging.getLogger("embedding_proxy.keys")


class KeyStatus(enum.Enum):
    """What a key may have from the cache."""

    PROVED = "proved"
    """All that is its own to see."""
    DUE = "due"
    """The same, if a new proof cannot be had now."""
    UNKNOWN = "unknown"
    """Nothing."""


class Proofs:
    """Proofs by name: a digest of a key and what it was accepted for. `clock` is Unix time."""

    def __init__(self, folder: Path, clock: Callable[[], float] = time.time) -> None:
        self._folder = folder
        self._clock = clock
        self._proved = LRUCache[str, float](MOST)
        self._refused = LRUCache[str, tuple[float, ClientKeyRefused]](MOST)
        self._deferred = LRUCache[str, float](MOST)
        self._written = 0
        with contextlib.suppress(OSError):
            folder.mkdir(mode=0o700, exist_ok=True)
        self._sweep()

    def standing(self, name: str) -> KeyStatus:
        """Return what is known. Raises ClientKeyRefused for a key that was refused just now."""
        now = self._clock()
        at, refusal = self._refused.peek(name) or (-REFUSED_S, None)
        if refusal is not None and 0 <= now - at < REFUSED_S:
            raise _again(refusal)
        age = now - (self._proved.peek(name) or 0.0)
        if not 0 <= age < FRESH_S:
            # Another worker may have proved it since.
            age = now - self._on_disk(name)
        if not 0 <= age < STALE_S:
            return KeyStatus.UNKNOWN
        deferred = 0 <= now - (self._deferred.peek(name) or -AGAIN_S) < AGAIN_S
        return KeyStatus.PROVED if age < FRESH_S or deferred else KeyStatus.DUE

    def accepted(self, name: str) -> None:
        """Note that the provider has answered to a key."""
        now = self._clock()
        if 0 <= now - (self._proved.peek(name) or -RENEW_S) < RENEW_S:
            return
        self._refused.pop(name)
        self._proved[name] = now
        with contextlib.suppress(OSError):
            file = self._folder / name
            file.touch(mode=0o600)
            os.utime(file, (now, now))
        self._written += 1
        if self._written % SWEEP_EVERY == 0:
            self._sweep()

    def refused(self, name: str, refusal: ClientKeyRefused) -> None:
        """Note that the provider does not accept a key: from now on nothing is served to it."""
        self._proved.pop(name)
        self._refused[name] = (self._clock(), _again(refusal))
        with contextlib.suppress(OSError):
            (self._folder / name).unlink(missing_ok=True)

    def defer(self, name: str) -> None:
        """Note that a new proof of a known key is being asked for: that will do for a while."""
        self._deferred[name] = self._clock()

    def _on_disk(self, name: str) -> float:
        """Return when a key was proved last by any worker; 0 = never."""
        try:
            at = (self._folder / name).stat().st_mtime
        except OSError:
            return 0.0
        self._proved[name] = at
        return at

    def _sweep(self) -> None:
        """Delete the files that prove nothing any more, and all but the newest MOST."""
        before = self._clock() - STALE_S
        try:
            with os.scandir(self._folder) as files:
                ages = sorted(((file.stat().st_mtime, file.path) for file in files), reverse=True)
            for place, (at, path) in enumerate(ages):
                if at < before or place >= MOST:
                    Path(path).unlink(missing_ok=True)
        except OSError as error:
            log.info("%s: proofs of clients' keys are not kept: %s", self._folder, error.strerror)


def _again(refusal: ClientKeyRefused) -> ClientKeyRefused:
    """Return the same refusal, to be raised once more."""
    return ClientKeyRefused(
        str(refusal), status=refusal.status, kind=refusal.kind, code=refusal.code
    )
