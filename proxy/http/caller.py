"""Who a request comes from, as far as that matters behind the door."""

from typing import NamedTuple


class Caller(NamedTuple):
    """The one who sent a request."""

    namespace: str = ""
    """The part of the cache that is the caller's."""
    client: str = ""
    """The name of the caller's key in the ledger; empty where no key is asked for."""
