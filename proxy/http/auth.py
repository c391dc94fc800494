"""Authenticates clients by the keys of the proxy, before anything else of a request is read.

Keys come from `server.keys` and from the file of keys, which is read anew when it changes. When a
key is removed, changes or expires, what is kept of replies by the heads of their requests
(`response_cache`) is forgotten: a head that was let in is let in no longer.
"""

import asyncio
import hmac
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from aiohttp import web
from embedding_proxy.providers.charge import SpendingLimit
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.keys_file import KeysFile, StoredKey, digest, is_key
from embedding_proxy.proxy.config.schema import ClientKey
from embedding_proxy.proxy.service.request import Client, Secret

from .errors import Failure

log = logging.getLogger("embedding_proxy.keys")

KEY_HEADERS = ("x-proxy-key", "api-key", "x-api-key")
"""Where a client may give its key, besides `Authorization: Bearer …`."""
WATCH_S = 1.0
"""How often the file of keys is looked at."""
_NO_END = float("inf")


def _refusal(message: str) -> Failure:
    return Failure(401, message, "invalid_request_error", None, "invalid_api_key")


_NO_KEY = _refusal(
    "You didn't provide an API key: send one of this proxy's keys in the header `Authorization:"
    " Bearer KEY`."
)
_UNKNOWN = _refusal("Incorrect API key provided: it is none of this proxy's keys.")
_EXPIRED = _refusal("Incorrect API key provided: it has expired.")


class _Admission(NamedTuple):
    digest: bytes
    client: Client
    expires: float
    """Seconds since 1970."""


class Authenticator:
    """Checks the keys that a request holds against the configured ones.

    Without keys and without a file of keys everyone is let in (then the configuration allows a
    loopback host only). Keys are kept and compared as digests, in constant time.
    """

    def __init__(
        self,
        keys: Iterable[ClientKey],
        stored: Iterable[StoredKey] | None = None,
        metrics_token: str | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Take the keys of the configuration, and those of the file; None = there is no file.

        `clock` gives seconds since 1970.
        """
        # The place of a digest in the map tells nothing of it: nobody can aim at one.
        self._secret = secrets.token_bytes(32)
        self._clock = clock
        self._own: list[_Admission] = []
        for entry in keys:
            one = digest(entry.key.strip())
            # A key without a name is told from others by a bit of its digest, never by itself.
            name = entry.name or f"key-{one.hex()[:8]}"
            client = Client(entry.namespace, name, is_admin=entry.admin)
            self._own.append(_Admission(one, client, _NO_END))
        self._metrics_token = None if metrics_token is None else digest(metrics_token.strip())
        self._admissions: dict[bytes, _Admission] = {}
        self.is_open = False
        """Whether no key is asked for."""
        self.replace_stored(stored or ())
        self.is_open = not self._own and stored is None

    def replace_stored(self, stored: Iterable[StoredKey]) -> bool:
        """Let the file have other keys; return whether somebody may be let in no longer.

        From now on a key is asked for, also where the file has none.
        """
        was_open, self.is_open = self.is_open, False
        new = [
            _Admission(
                key.digest,
                Client(key.namespace, key.name, is_admin=key.is_admin, limit=key.limit),
                _NO_END if key.expires is None else key.expires.timestamp(),
            )
            for key in stored
        ]
        former = self._admissions
        # Where a key is in both places, the configuration counts.
        self._admissions = {self._place(one.digest): one for one in (*new, *self._own)}
        return was_open or any(self._admissions.get(place) != one for place, one in former.items())

    def next_expiry(self, start: float) -> float:
        """Return the first time beyond `start` at which a key expires; infinite if none does.

        In seconds since 1970.
        """
        times = (one.expires for one in self._admissions.values() if one.expires > start)
        return min(times, default=_NO_END)

    @property
    def namespaces(self) -> set[str]:
        """Those of all keys."""
        return {one.client.namespace for one in self._admissions.values()}

    def admit(self, authorization: str | None, *others: str) -> Client | Failure:
        """Return who sent a request, or the error if it may not come in.

        `others` are what the other headers for keys hold; one right key among all is enough.
        """
        if self.is_open:
            # Only a loopback host may be open, so whoever asks is on this machine.
            return Client(is_admin=True)
        keys = [key for key in (_bearer(authorization or ""), *others) if key]
        if not keys:
            return _NO_KEY
        found = [one for key in keys if (one := self._known(key)) is not None]
        valid = [one for one in found if self._clock() < one.expires]
        if valid:
            return valid[0].client
        return _EXPIRED if found else _UNKNOWN

    def digest_of(self, key: str) -> bytes:
        """Return what stands for a key that was admitted, wherever the key itself may not."""
        return digest(key.strip())

    def find(self, is_meant: Callable[[bytes], bool]) -> Client | None:
        """Return the client of the first key, not expired, of whose digest something is true."""
        now = self._clock()
        return next(
            (
                one.client
                for one in self._admissions.values()
                if now < one.expires and is_meant(one.digest)
            ),
            None,
        )

    @property
    def budgets(self) -> dict[str, SpendingLimit]:
        """The budgets of the keys that have one, by client, in the order of the names."""
        limits = {one.client.client: one.client.limit for one in self._admissions.values()}
        return {name: limit for name, limit in sorted(limits.items()) if limit is not None}

    def has_metrics_token(self, authorization: str | None) -> bool:
        """Tell whether a request holds the token of `server.metrics_token`, which is no key."""
        token = digest(_bearer(authorization or ""))
        return self._metrics_token is not None and hmac.compare_digest(token, self._metrics_token)

    def own_key(self, headers: Mapping[str, str]) -> Secret:
        """Return the key that a client sends for a provider; empty if there is none.

        It is in `Authorization`, or in `api-key` (Azure's clients), and none of ours.
        """
        keys = (_bearer(headers.get("Authorization", "")), headers.get("api-key", "").strip())
        return Secret(next((key for key in keys if key and not self._is_own(key)), ""))

    def is_ours(self, value: str) -> bool:
        """Tell whether a header's value holds one of the keys: then it goes nowhere else."""
        return self._is_own(value.strip()) or self._is_own(_bearer(value))

    def _is_own(self, key: str) -> bool:
        """Tell whether a key was made for this proxy, be it valid or not."""
        return (
            is_key(key) or self._known(key) is not None or self.has_metrics_token(f"Bearer {key}")
        )

    def _known(self, key: str) -> _Admission | None:
        one = digest(key)
        found = self._admissions.get(self._place(one))
        is_equal = hmac.compare_digest(one, found.digest if found else self._secret)
        return found if is_equal else None

    def _place(self, one: bytes) -> bytes:
        return hmac.digest(self._secret, one, "sha256")


class KeysWatch:
    """Has an authenticator heed the file of keys and its keys' expiry while the proxy runs."""

    def __init__(self, file: KeysFile, access: Authenticator, forget: Callable[[], None]) -> None:
        """`forget` is called when somebody who was let in may not be let in any more."""
        self._file = file
        self._access = access
        self._forget = forget
        self._told = ""
        """What was logged last of the file."""

    async def run(self, _: web.Application) -> AsyncIterator[None]:
        """Watch for as long as the application runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        start = time.time()
        while True:
            expiry = self._access.next_expiry(start)
            await asyncio.sleep(min(WATCH_S, max(0.0, expiry - time.time())))
            if expiry <= time.time():
                start = time.time()
                self._forget()
            await self.look()

    async def look(self) -> None:
        """Read the file if it has changed. One that cannot be read leaves all as it was."""
        try:
            if not await asyncio.to_thread(lambda: self._file.has_changed):
                return
            stored = await asyncio.to_thread(self._file.read)
        except ConfigError as error:
            self._tell(*error.problems)
        except OSError as error:
            self._file.retry()
            self._tell(f"{self._file.path}: cannot be read: {error.strerror}")
        else:
            if stored is None:
                self._tell(f"{self._file.path}: is gone")
                return
            self._told = ""
            if self._access.replace_stored(stored):
                self._forget()
            log.info("%s was read anew: %d keys", self._file.path, len(stored))

    def _tell(self, *problems: str) -> None:
        if self._told != problems[0]:
            for problem in problems:
                log.error("the former keys stay: %s", problem)
        self._told = problems[0]


def read_keys(file: KeysFile) -> tuple[StoredKey, ...] | None:
    """Return the keys of a file, None if there is none. Raises ConfigError."""
    try:
        return file.read()
    except OSError as error:
        raise ConfigError(f"{file.path}: cannot be read: {error.strerror}") from error


def _bearer(authorization: str) -> str:
    scheme, _, key = authorization.partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""
