"""Pages of points, worked on side by side and finished in order."""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from .journal import PointId
from .points import Point, Points

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Page:
    """Some points, and where the next ones begin."""

    points: Sequence[Point]
    after: PointId | None


async def read(
    points: Points,
    collection: str,
    size: int,
    offset: PointId | None = None,
    *,
    vectors: bool = False,
) -> AsyncIterator[Page]:
    """Yield the pages of a collection in the order of ids, each of `size` points at most."""
    while True:
        found, offset = await points.page(collection, offset, size, vectors=vectors)
        if found:
            yield Page(found, offset)
        if offset is None:
            return


async def ahead(
    items: AsyncIterator[T], work: Callable[[T], Awaitable[R]], most: int
) -> AsyncGenerator[tuple[T, R]]:
    """Yield items and what their work gives, in order; that of several items is done at a time."""
    begun: deque[tuple[T, asyncio.Future[R]]] = deque()
    try:
        async for item in items:
            begun.append((item, asyncio.ensure_future(work(item))))
            if len(begun) >= most:
                first, doing = begun[0]
                result = await doing
                begun.popleft()
                yield first, result
        while begun:
            first, doing = begun[0]
            result = await doing
            begun.popleft()
            yield first, result
    finally:
        for _, doing in begun:
            doing.cancel()
        for _, doing in begun:
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await doing
