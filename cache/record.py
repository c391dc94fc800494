"""The bytes kept under a key: header, check digest, vector, checksum. Pure.

    offset  size  field
         0     4  magic "EMBV"
         4     1  record version
         5     1  dtype: 1 = float32, 2 = float16, both little-endian; on disk 1 only
         6     1  1 if the tokens are counted, 0 if apportioned from a batch's total
         7     1  reserved, 0
         8     4  dimensions
        12     4  prompt tokens
        16    16  check digest (see `key`)
        32   4·d  vector; 2·d of float16
     32+4d     8  XXH3-64 of all the above

All integers are unsigned and little-endian. Changing a byte of this bumps `key.FORMAT`.
"""

import struct
from typing import NamedTuple

from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.vector import from_float16, to_float16

from .key import FORMAT, checksum

_HEADER = struct.Struct("<4sBBBBII16s")
_MAGIC = b"EMBV"
_FLOAT32, _FLOAT16 = 1, 2
_CHECKSUM = 8
_START = _MAGIC + bytes((FORMAT, _FLOAT32))
"""The first bytes of each record on disk."""
_HALF_START = _MAGIC + bytes((FORMAT, _FLOAT16))
"""Those of one in the shared tier whose vector was rounded."""
_FIELDS = struct.Struct("<6xBxII16s")
"""The fields behind them."""


class Entry(NamedTuple):
    """What a record says."""

    vector: Vector
    tokens: int
    counted: bool
    digest: bytes


def encode(entry: Entry, *, is_float16: bool = False) -> bytes:
    """Return the record of an entry.

    `is_float16`: its vector is rounded to 16 bits a number, unless that leaves none of it.
    """
    vector, tokens, counted, digest = entry
    dtype, dimensions = _FLOAT32, len(vector) // 4
    if is_float16 and (half := to_float16(vector)) is not None:
        dtype, vector = _FLOAT16, half
    header = _HEADER.pack(_MAGIC, FORMAT, dtype, counted, 0, dimensions, tokens, digest)
    body = header + vector
    return body + checksum(body)


def decode(record: bytes, digest: bytes, dimensions: int) -> Entry | None:
    """Return the entry, or None if the record is damaged or is about something else.

    `digest` is the check digest of what was asked for. A collision of addresses, a crossed reply of
    a shared tier and a flipped bit all end here, as a miss.
    """
    end = len(record) - _CHECKSUM
    size = 4 if record.startswith(_START) else 2 if record.startswith(_HALF_START) else 0
    if not size or end != _HEADER.size + size * dimensions:
        return None
    counted, width, tokens, found = _FIELDS.unpack_from(record)
    if width != dimensions or found != digest:
        return None
    if checksum(memoryview(record)[:end]) != record[end:]:
        return None
    vector = record[_HEADER.size : end]
    if size == 2:
        vector = from_float16(vector)
    return Entry(vector, tokens, bool(counted), digest)


def is_damaged(record: bytes, digest: bytes) -> bool:
    """Tell whether a record fails its checksum, or is about something else than the digest's input.

    One that verifies at another width than is asked for, or that a later version wrote, is not: it
    was paid for, and may be what another configuration asks for.
    """
    end = len(record) - _CHECKSUM
    if end < _HEADER.size or checksum(memoryview(record)[:end]) != record[end:]:
        return True
    magic, version, *_, found = _HEADER.unpack_from(record)
    return bool(magic != _MAGIC or (version == FORMAT and found != digest))


def width(record: bytes) -> int | None:
    """Return the dimensions of a record that is whole, whatever it is about; None if it is not."""
    if len(record) < _HEADER.size + _CHECKSUM:
        return None
    *_, dimensions, _, digest = _HEADER.unpack_from(record)
    return None if decode(record, digest, dimensions) is None else int(dimensions)


def vector_of(record: bytes) -> Vector:
    """Return the vector in a record that is whole."""
    return record[_HEADER.size : -_CHECKSUM]
