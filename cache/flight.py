"""One fill a key: whoever asks for a key that is being bought waits for that purchase.

A fill runs as a task of its own, and everyone, its leader too, only waits for it: a cancelled
leader harms no joiner. It is cancelled when nobody waits any more. For one thread: the event
loop's.
"""

import asyncio
from collections.abc import Collection, Coroutine, Sequence
from typing import Any, Generic, TypeVar

from .key import Key

R = TypeVar("R")


class Fill(Generic[R]):
    """A purchase in progress, of one or more keys."""

    def __init__(
        self, keys: Sequence[Key], work: Coroutine[Any, Any, R], deadline: float | None
    ) -> None:
        self.keys = frozenset(keys)
        self.deadline = deadline
        """The leader's, on the event loop's clock: a fill may fail by it, and joiners go on."""
        self.task = asyncio.create_task(work)
        self.waiting = 0
        self.abandoned = False
        """True once nobody waits any more: the fill is ending, and nobody may join it."""

    def leave(self) -> None:
        """Note that one who waited no longer does; the last one out cancels the fill."""
        self.waiting -= 1
        if not self.waiting:
            self.abandoned = True
            self.task.cancel()


async def wait(fills: Collection[Fill[Any]]) -> None:
    """Return when all fills have ended, well or not; their tasks tell how.

    A caller that is cancelled here leaves the fills to whoever else waits. It counts as waiting
    from the moment of the call, not from a later turn of the loop: a leader that is cancelled in
    between finds its joiners already there.
    """
    for fill in fills:
        fill.waiting += 1
    try:
        await asyncio.wait([fill.task for fill in fills])
    finally:
        for fill in fills:
            fill.leave()


class Flights(Generic[R]):
    """The fills in progress, by key."""

    def __init__(self) -> None:
        self._fills: dict[Key, Fill[R]] = {}
        self.landed = 0
        """How many fills have ended; a change since a look-up means: look again."""

    def __len__(self) -> int:
        return len(self._fills)

    def part(self, keys: Sequence[Key]) -> tuple[dict[Key, Fill[R]], list[Key]]:
        """Part keys into joins, with the fill to wait for, and leads, which are nobody's yet."""
        joins: dict[Key, Fill[R]] = {}
        leads: list[Key] = []
        for key in keys:
            fill = self._fills.get(key)
            if fill is None or fill.abandoned:
                leads.append(key)
            else:
                joins[key] = fill
        return joins, leads

    def lead(
        self, keys: Sequence[Key], work: Coroutine[Any, Any, R], deadline: float | None = None
    ) -> Fill[R]:
        """Start a fill of keys that `part` has just given as leads, before anyone else could."""
        fill = Fill(keys, work, deadline)
        self._fills.update(dict.fromkeys(keys, fill))
        fill.task.add_done_callback(lambda _: self._end(fill))
        return fill

    def _end(self, fill: Fill[R]) -> None:
        # Read the failure: when nobody is left to hear of it, that is no news to report.
        _ = fill.task.cancelled() or fill.task.exception()
        self.landed += 1
        for key in fill.keys:
            # An abandoned fill may have been replaced by a newer one of the same key.
            if self._fills.get(key) is fill:
                del self._fills[key]
