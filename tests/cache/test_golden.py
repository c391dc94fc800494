"""The exact bytes of keys and records, as this format version has them.

What people have paid for lies on their disks under these addresses, in these bytes. A change that
makes a test here fail loses all of it, so changing a literal means bumping `key.FORMAT`, and
shipping an upgrade for what is kept in the format before.
"""

import struct

import pytest
from embedding_proxy.cache.key import DEFAULT_NAMESPACE, FORMAT, Namespace, part
from embedding_proxy.cache.record import Entry, decode, encode
from embedding_proxy.providers.base import Space

from tests.cache.fakes import key_of

SPACE = Space("openai/text-embedding-3-small", 4)
FIELDS = {"task": "query", "input_type": {"b": 1, "a": None}}
VECTOR = struct.pack("<4f", 1.0, -0.5, 0.25, 0.1)

GOLDEN = {
    "text": (
        "Hello, world",
        SPACE,
        DEFAULT_NAMESPACE,
        "626361235cc6868eb2efd2f391185476",
        "721cd1e4c4be572ab3424c96464a1f10",
    ),
    "token array": (
        (9906, 11, 1917),
        SPACE,
        DEFAULT_NAMESPACE,
        "ddbfab3b5b3f721739307bff1c3e792f",
        "219be4f91f095a96dea5ee2b738b2358",
    ),
    "space with parameters": (
        "Hello, world",
        SPACE.with_parameters(FIELDS),
        DEFAULT_NAMESPACE,
        "936cf85a888d36bb85e012ad751901fa",
        "c5d91c1a06c3d5cc9c1cb413a90c8fc5",
    ),
    "namespace with a secret": (
        "Hello, world",
        SPACE,
        Namespace("tenant", b"a secret"),
        "c1bf77cedf91fbefd341e0236fb495bc",
        "a6c18def3694f9f82b5d5ff90f577eb4",
    ),
}

RECORDS = {
    "counted": (
        Entry(VECTOR, 3, counted=True, digest=bytes.fromhex(GOLDEN["text"][4])),
        (
            "454d4256 01 01 01 00 04000000 03000000"
            " 721cd1e4c4be572ab3424c96464a1f10"
            " 0000803f 000000bf 0000803e cdcccc3d"
            " 5927df334241b465"
        ),
    ),
    "apportioned": (
        Entry(VECTOR, 3, counted=False, digest=bytes.fromhex(GOLDEN["token array"][4])),
        (
            "454d4256 01 01 00 00 04000000 03000000"
            " 219be4f91f095a96dea5ee2b738b2358"
            " 0000803f 000000bf 0000803e cdcccc3d"
            " 12807b4db50a088c"
        ),
    ),
}


def test_the_format_is_version_1():
    """The literals below are those of version 1; a new version brings new ones."""
    assert FORMAT == 1


@pytest.mark.parametrize(
    ("item", "space", "namespace", "address", "digest"), GOLDEN.values(), ids=GOLDEN
)
def test_keys_have_these_bytes(item, space, namespace, address, digest):
    """An input's address and digest are the same on every machine, in every release."""
    key = key_of(item, space, namespace)
    assert (key.address.hex(), key.digest.hex()) == (address, digest)


@pytest.mark.parametrize(("entry", "record"), RECORDS.values(), ids=RECORDS)
def test_records_have_these_bytes(entry, record):
    """An entry is written as these bytes, and these bytes are read as the entry."""
    record = bytes.fromhex(record)
    assert encode(entry) == record
    assert decode(record, entry.digest, 4) == entry


def test_a_part_has_these_bytes():
    """A part is a tag, eight bytes of length with the least significant first, and the data."""
    assert part(b"m", b"abc").hex(" ", 1) == "6d 03 00 00 00 00 00 00 00 61 62 63"
