"""Who may come in, and who that is: the keys that clients must send.

Asked before anything else is looked at.
"""

import hashlib
import hmac
from collections.abc import Iterable

from .caller import Caller
from .errors import Failure
from .settings import ClientKey


class Access:
    """Checks a request's `Authorization: Bearer …` against the configured keys.

    Without keys everyone is let in (then the configuration allows a loopback host only). Keys are
    kept and compared as digests, in constant time.
    """

    def __init__(self, keys: Iterable[ClientKey]) -> None:
        self._callers: dict[bytes, Caller] = {}
        for entry in keys:
            digest = _digest(entry.key.strip())
            # A key without a name is told from others by a bit of its digest, never by itself.
            self._callers[digest] = Caller(entry.namespace, entry.name or f"key-{digest.hex()[:8]}")

    def admit(self, authorization: str | None) -> Caller | Failure:
        """Return who sent a request, or the error if it may not come in."""
        if not self._callers:
            return Caller()
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            return Failure(
                401,
                "You didn't provide an API key: send one of this proxy's keys in the header"
                " `Authorization: Bearer KEY`.",
                "invalid_request_error",
                None,
                "invalid_api_key",
            )
        given = _digest(key.strip())
        # All are compared, so that the time tells nothing.
        known = [digest for digest in self._callers if hmac.compare_digest(given, digest)]
        if known:
            return self._callers[known[0]]
        return Failure(
            401,
            "Incorrect API key provided: it is none of this proxy's keys.",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
