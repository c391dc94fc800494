"""Calls that are too large are halved, and the size is remembered; nothing is lost or exchanged."""

import pytest
from embedding_proxy.index.client import BatchSize, send_in_batches
from embedding_proxy.index.errors import Disconnected, Rejected, TooLarge
from hypothesis import given
from hypothesis import strategies as st

FAILURES = {
    "told": lambda limit: TooLarge("too large", limit),
    "untold": lambda _: TooLarge("too large"),
    "cut": lambda _: Disconnected("cut"),
}


class _Server:
    """Takes so many items in one call."""

    def __init__(self, limit, kind):
        self.limit, self.kind = limit, kind
        self.taken, self.refused = [], 0

    async def send(self, items):
        if len(items) > self.limit:
            self.refused += 1
            raise FAILURES[self.kind](self.limit)
        self.taken.append(list(items))


@given(
    limit=st.integers(1, 300),
    kind=st.sampled_from(sorted(FAILURES)),
    start=st.integers(1, 400),
    counts=st.lists(st.integers(0, 500), max_size=4),
)
async def test_all_items_arrive_once_and_in_order(limit, kind, start, counts):
    """What the server says of its size is never asked for twice; a cut connection is, seldom."""
    server, size = _Server(limit, kind), BatchSize(start)
    sent = []
    for n, count in enumerate(counts):
        items = [(n, i) for i in range(count)]
        await send_in_batches(items, size, server.send)
        sent += items
    assert [one for call in server.taken for one in call] == sent
    if kind == "told":
        assert server.refused <= 1
    elif kind == "untold":
        assert server.refused <= start.bit_length()
    else:
        assert server.refused <= start.bit_length() + len(server.taken) // 16


async def test_an_item_that_is_too_large_alone_is_an_error():
    """What was sent before it stays sent; another failure is none of the size."""
    taken = []

    async def send(items):
        if 3 in items:
            raise TooLarge("too large")
        taken.extend(items)

    with pytest.raises(TooLarge):
        await send_in_batches([1, 2, 3, 4], BatchSize(4), send)
    assert taken == [1, 2]

    async def reject(_):
        raise Rejected("wrong")

    size = BatchSize(4)
    with pytest.raises(Rejected):
        await send_in_batches([1, 2], size, reject)
    assert size.max_items == 4
