"""Who may come in: the keys that clients must send. Asked before anything else is looked at."""

import hashlib
import hmac
from collections.abc import Sequence

from .errors import Failure


class Access:
    """Checks a request's `Authorization: Bearer …` against the configured keys.

    Without keys everyone is let in (then the configuration allows a loopback host only). Keys are
    kept and compared as digests, in constant time.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.strip()) for key in keys]

    def refusal(self, authorization: str | None) -> Failure | None:
        """Return the error for a request that may not come in; None lets it in."""
        if not self._digests:
            return None
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
        if sum(hmac.compare_digest(given, digest) for digest in self._digests):
            return None
        return Failure(
            401,
            "Incorrect API key provided: it is none of this proxy's keys.",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
