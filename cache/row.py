"""One entry outside the process: an address, a record, and where it belongs. Pure."""

from typing import NamedTuple


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
