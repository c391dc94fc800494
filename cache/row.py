"""One entry outside the process: an address, a record, and where it belongs. Pure."""

from typing import NamedTuple

RESERVED_NAMESPACES = "embedding-proxy/"
"""How the namespaces begin that are the proxy's own; no client is given such a one."""
OTHER_NAMESPACE = f"{RESERVED_NAMESPACES}other"
"""The namespace of what is kept and counted together, because there were too many of its kind."""
OTHER = "other"
"""What stands for all further names, which clients or upstreams chose."""


class Partition(NamedTuple):
    """The entries of one namespace in one space: what is counted, purged and exported together."""

    namespace: str
    space: str
    """The space's label (`Space.label`)."""
    dimensions: int


UNKNOWN = Partition("", "(not known)", 0)
"""Stands for entries and sums of which it is not known where they belong."""


class Row(NamedTuple):
    """One entry as it lies in a store or in an archive."""

    address: bytes
    """16 bytes, see `key`."""
    record: bytes
    """See `record`."""
    stored: float
    """When it was bought, in seconds since 1970."""
    partition: Partition | None
    """None where it is not known: written by an early version, or salvaged without it."""
