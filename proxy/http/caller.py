"""Who a request comes from, as far as that matters behind the door."""

from collections.abc import Callable
from typing import NamedTuple

from aiohttp import web


class Secret(str):
    """A key; it is not shown where values are."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


class Client(NamedTuple):
    """The one who sent a request."""

    namespace: str = ""
    """The part of the cache that is the caller's."""
    client: str = ""
    """The name of the caller's key in the ledger; empty where no key is asked for."""
    api_key: Secret = Secret()
    """The caller's own key for a provider; empty where it sent none, or none is used."""
    is_admin: bool = False
    """Whether the caller may do what is the operator's: its key says `admin: true`, or no key is
    asked for."""
    retries: int | None = None
    """0 = the caller repeats requests by itself, and this is its first try; 1 = a later one; None =
    it is not known to do so."""
    is_connected: Callable[[], bool] | None = None
    """Tells whether the caller still waits for the answer; None = it does."""


CALLER = web.RequestKey("caller", Client)
"""Where the guard puts the caller of a request that it lets in."""
