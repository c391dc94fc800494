"""One fill a key: whoever asks for a key that is being bought waits for that purchase.

A fill runs as a task of its own, and everyone, its leader too, only waits for it: a cancelled
leader harms no joiner. When nobody waits any more it is cancelled, unless a call was begun for it:
that is paid for, so it is finished and kept. What is there before the rest is given to joiners at
once, and stays given when the rest fails. For one thread: the event loop's.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Generic, TypeAlias, TypeVar

from providers.base import NORMAL, Credential, Terms

from .key import Key
from .record import Entry

R = TypeVar("R")


class Fill(Generic[R]):
    """A purchase in progress, of one or more keys."""

    def __init__(
        self,
        keys: Sequence[Key],
        work: "Work[R]",
        deadline: float | None,
        terms: Terms,
        credential: Credential | None,
    ) -> None:
        self.keys = frozenset(keys)
        self._terms = terms
        self.deadline = deadline
        """The leader's, on the event loop's clock: a fill may fail by it, and joiners go on."""
        self.credential = credential
        """The leader's own key, if it has one: what that is refused, another may get."""
        self.there: dict[Key, Entry] = {}
        """What has been got so far, and is kept."""
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when more is there; then there is another."""
        self.waiting = 0
        self.begun: set[Key] = set()
        """Keys for which a call was begun: these are finished, though nobody may wait any more."""
        self.abandoned = False
        """True once nobody waits any more: only what was begun may still be joined."""
        self.abandonment: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done at the same moment."""
        self.task = asyncio.create_task(work(self))

    def serves(self, key: Key, terms: Terms) -> bool:
        """Tell whether a request on these terms may wait for a key of the fill.

        One that leaves no trace shows nobody that it waits. One that takes no entry, however new,
        takes no purchase that was begun before it came; and as a fill may find on its second look
        what its leader takes, no request joins one of a leader that takes older entries.
        """
        if (self.abandoned and key not in self.begun) or not terms.write:
            return False
        return terms.max_age > 0 and self._terms.max_age <= terms.max_age

    def give(self, entries: Mapping[Key, Entry]) -> None:
        """Note what is there, and wake those who wait."""
        self.there.update(entries)
        self.news.set_result(None)
        self.news = asyncio.get_running_loop().create_future()

    def leave(self) -> None:
        """Note that one who waited no longer does; the last one out ends what was not begun."""
        self.waiting -= 1
        if not self.waiting and not self.task.done():
            self.abandoned = True
            if not self.abandonment.done():
                self.abandonment.set_result(None)
            if not self.begun:
                self.task.cancel()


Work: TypeAlias = Callable[[Fill[R]], Coroutine[Any, Any, R]]
"""What a fill does; it is given the fill, to hand out parts."""


async def wait(
    fills: Collection[Fill[Any]], joins: Mapping[Key, Fill[Any]] = MappingProxyType({})
) -> None:
    """Return when all `fills` have ended, well or not, and each key of `joins` is there.

    A key that is not there then is one whose fill has ended without: its task tells why.
    A caller that is cancelled here leaves the fills to whoever else waits. It counts as waiting
    from the moment of the call, not from a later turn of the loop: a leader that is cancelled in
    between finds its joiners already there.
    """
    everyone = {*fills, *joins.values()}
    for fill in everyone:
        fill.waiting += 1
    try:
        if fills:
            await asyncio.wait([fill.task for fill in fills])
        for key, fill in joins.items():
            while key not in fill.there and not fill.task.done():
                both = (fill.task, fill.news)
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for fill in everyone:
            fill.leave()


class Flights(Generic[R]):
    """The fills in progress, by key."""

    def __init__(self) -> None:
        self._fills: dict[Key, Fill[R]] = {}
        """Those that may be joined."""
        self._tasks: set[asyncio.Task[R]] = set()
        """Of all fills: also of those that another has replaced, or that leave no trace."""
        self._writes: set[asyncio.Task[None]] = set()
        """What is being kept of them; some is brought after the end of its fill."""
        self.landed = 0
        """How many fills, or parts of fills, have landed; a change since a look-up: look again."""

    def __len__(self) -> int:
        return len(self._fills)

    def part(
        self, keys: Sequence[Key], terms: Terms = NORMAL
    ) -> tuple[dict[Key, Fill[R]], list[Key]]:
        """Part keys into joins, with the fill to wait for, and leads, which are nobody's yet."""
        joins: dict[Key, Fill[R]] = {}
        leads: list[Key] = []
        for key in keys:
            fill = self._fills.get(key)
            if fill is not None and fill.serves(key, terms):
                joins[key] = fill
            else:
                leads.append(key)
        return joins, leads

    def lead(
        self,
        keys: Sequence[Key],
        work: Work[R],
        deadline: float | None = None,
        terms: Terms = NORMAL,
        credential: Credential | None = None,
    ) -> Fill[R]:
        """Start a fill of keys that `part` has just given as leads, before anyone else could.

        It takes the place of one that did not serve; that one goes on for those who wait for it.
        """
        fill = Fill(keys, work, deadline, terms, credential)
        if terms.write:
            self._fills.update(dict.fromkeys(keys, fill))
        self._tasks.add(fill.task)
        fill.task.add_done_callback(lambda _: self._end(fill))
        return fill

    def give(self, fill: Fill[R], entries: Mapping[Key, Entry]) -> None:
        """Hand out what a fill has got and kept, to those who wait for no more than that."""
        self.landed += 1
        fill.give(entries)

    def write(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """Start to write what a fill has got, or what it was charged: nothing ends that early."""
        task = asyncio.create_task(work)
        self._writes.add(task)
        task.add_done_callback(self._writes.discard)
        return task

    async def close(self) -> None:
        """End all fills, and wait until what they have got is kept."""
        while tasks := set(self._tasks):
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        while self._writes:
            await asyncio.wait(self._writes)

    def _end(self, fill: Fill[R]) -> None:
        # Read the failure: when nobody is left to hear of it, that is no news to report.
        _ = fill.task.cancelled() or fill.task.exception()
        self.landed += 1
        self._tasks.discard(fill.task)
        for key in fill.keys:
            # It may have been replaced by a newer one of the same key.
            if self._fills.get(key) is fill:
                del self._fills[key]
