"""The bytes kept under a record's key in the shared tier: the record, and what goes with it. Pure.

    offset  size  field
         0     8  when it was bought, milliseconds since 1970
         8     4  dimensions of its partition
        12     2  length of the namespace's name, n
        14     2  length of the space's label, s
        16     n  namespace
      16+n     s  space
    16+n+s     …  record (see `record`)
       end     8  XXH3-64 of what comes before the record, and of the record's own checksum

All integers are unsigned and little-endian. A change of this needs another kind of key: another
version reads none of these.
"""

import struct
from typing import NamedTuple

from embedding_proxy.cache.key import Partition, checksum

KIND = "r"
"""The kind of the keys (see `RedisClient.key`); the address of the entry is the name."""
_HEAD = struct.Struct("<QIHH")
SET_NEWER = b"""\
local old = redis.call('GET', KEYS[1])
if old and #old >= 8 and struct.unpack('<I8', old) >= struct.unpack('<I8', ARGV[1]) then
  return 0
end
if ARGV[2] == '0' then return redis.call('SET', KEYS[1], ARGV[1]) end
return redis.call('SET', KEYS[1], ARGV[1], 'PX', ARGV[2])"""
"""A script that sets a value for so many milliseconds, 0 = for ever, unless one that was bought at
the same time or later is there."""
_CHECKSUM = 8
_MAX_NAME = (1 << 16) - 1


class SharedRecord(NamedTuple):
    """A record as another node has stored it."""

    record: bytes
    stored: float
    """When it was bought, in seconds since 1970."""
    partition: Partition


def pack(record: bytes, stored: float, partition: Partition) -> bytes | None:
    """Return the value of a record; None for one whose names are too long to be kept with it."""
    namespace, space = partition.namespace.encode(), partition.space.encode()
    if max(len(namespace), len(space)) > _MAX_NAME:
        return None
    sizes = (partition.dimensions, len(namespace), len(space))
    head = _HEAD.pack(round(stored * 1000), *sizes) + namespace + space
    return head + record + checksum(head + record[-_CHECKSUM:])


class RecordHead(NamedTuple):
    """What a value says beside its record."""

    stored: float
    """When it was bought, in seconds since 1970."""
    partition: Partition


def read_head(value: bytes) -> RecordHead | None:
    """Return what the first bytes of a value say, unverified; None if they say nothing, or end."""
    if len(value) < _HEAD.size:
        return None
    stored_ms, dimensions, namespace_size, space_size = _HEAD.unpack_from(value)
    space, end = _HEAD.size + namespace_size, _HEAD.size + namespace_size + space_size
    if len(value) < end:
        return None
    try:
        namespace, label = value[_HEAD.size : space].decode(), value[space:end].decode()
    except UnicodeDecodeError:
        return None
    return RecordHead(stored_ms / 1000, Partition(namespace, label, dimensions))


def unpack(value: bytes) -> SharedRecord | None:
    """Return what a value holds; None if it is damaged. The record is the reader's to verify."""
    if len(value) < _HEAD.size + 2 * _CHECKSUM:
        return None
    stored_ms, dimensions, namespace_size, space_size = _HEAD.unpack_from(value)
    start = _HEAD.size + namespace_size + space_size
    record = value[start:-_CHECKSUM]
    if len(record) < _CHECKSUM:
        return None
    if checksum(value[:start] + record[-_CHECKSUM:]) != value[-_CHECKSUM:]:
        return None
    space = _HEAD.size + namespace_size
    try:
        partition = Partition(
            value[_HEAD.size : space].decode(), value[space:start].decode(), dimensions
        )
    except UnicodeDecodeError:
        return None
    return SharedRecord(record, stored_ms / 1000, partition)
