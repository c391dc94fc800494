"""Authenticates clients by the keys of the proxy, before anything else of a request is read."""

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from embedding_proxy.proxy.config.schema import ClientKey
from embedding_proxy.proxy.service.request import Client, Secret

from .errors import Failure

KEY_HEADERS = ("x-proxy-key", "api-key", "x-api-key")
"""Where a client may give its key, besides `Authorization: Bearer …`."""


class Authenticator:
    """Checks the keys that a request holds against the configured ones.

    Without keys everyone is let in (then the configuration allows a loopback host only). Keys are
    kept and compared as digests, in constant time.
    """

    def __init__(self, keys: Iterable[ClientKey]) -> None:
        self._callers: dict[bytes, Client] = {}
        for entry in keys:
            digest = _digest(entry.key.strip())
            # A key without a name is told from others by a bit of its digest, never by itself.
            name = entry.name or f"key-{digest.hex()[:8]}"
            self._callers[digest] = Client(entry.namespace, name, is_admin=entry.admin)

    @property
    def is_open(self) -> bool:
        """Whether no key is asked for."""
        return not self._callers

    def admit(self, authorization: str | None, *others: str) -> Client | Failure:
        """Return who sent a request, or the error if it may not come in.

        `others` are what the other headers for keys hold; one right key among all is enough.
        """
        if self.is_open:
            # Only a loopback host may be open, so whoever asks is on this machine.
            return Client(is_admin=True)
        keys = [key for key in (_bearer(authorization or ""), *others) if key]
        if not keys:
            return Failure(
                401,
                "You didn't provide an API key: send one of this proxy's keys in the header"
                " `Authorization: Bearer KEY`.",
                "invalid_request_error",
                None,
                "invalid_api_key",
            )
        callers = [caller for key in keys for caller in self._known(key)]
        if callers:
            return callers[0]
        return Failure(
            401,
            "Incorrect API key provided: it is none of this proxy's keys.",
            "invalid_request_error",
            None,
            "invalid_api_key",
        )

    def own_key(self, headers: Mapping[str, str]) -> Secret:
        """Return the key that a client sends for a provider; empty if there is none.

        It is in `Authorization`, or in `api-key` (Azure's clients), and none of ours.
        """
        keys = (_bearer(headers.get("Authorization", "")), headers.get("api-key", "").strip())
        return Secret(next((key for key in keys if key and not self._known(key)), ""))

    def is_ours(self, value: str) -> bool:
        """Tell whether a header's value holds one of the keys: then it goes nowhere else."""
        return bool(self._known(value.strip()) or self._known(_bearer(value)))

    def _known(self, key: str) -> list[Client]:
        # All are compared, so that the time tells nothing.
        digest = _digest(key)
        return [
            client
            for known_digest, client in self._callers.items()
            if hmac.compare_digest(digest, known_digest)
        ]


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
