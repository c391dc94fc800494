"""Cuts work over many items into slices, between which the event loop serves others."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import TypeVar

SLICE = 1024
"""Items in a slice: with some microseconds of work for each, a few milliseconds."""

T = TypeVar("T")


async def slices(items: Sequence[T], size: int = SLICE) -> AsyncIterator[Sequence[T]]:
    """Yield the items in slices of at most `size`, in order; before each further one others run.

    A few items are one slice, and nothing else runs in between. Of none there is no slice.
    """
    for start in range(0, len(items), size):
        if start:
            await asyncio.sleep(0)
        yield items[start : start + size]
