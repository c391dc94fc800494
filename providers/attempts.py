"""Attempts at providers: a request that was sent is finished, though nobody may wait for it.

An upstream charges for what it was asked, whether or not the answer is read. So the time of a
request, or a client that goes, ends the wait for an attempt, and never the attempt itself: its
answer is checked, kept and billed. The provider's own limits of time end it. What was not sent yet
is dropped. When the process ends, each call that was sent has CLOSE_S seconds to be answered.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, TypeAlias

CLOSE_S = 5.0
"""Seconds that calls that were sent have, when the process ends, to be answered and kept."""
EXTRA_SHARE = 0.5
"""The part of its time limit by which the wait for an attempt is longer once its reply has begun:
to ask the next route in its place would be paid twice."""

log = logging.getLogger("embedding_proxy.attempts")


class Attempt:
    """How far an attempt has got. Whoever makes its calls sets `is_sent` and `has_reply`."""

    __slots__ = ("_calls", "has_begun", "has_reply", "is_abandoned", "is_sent", "waiting_since")

    def __init__(self) -> None:
        self.is_sent = False
        """Whether a request of it was sent, at least in part: the upstream may charge for it."""
        self.has_begun = False
        """Whether a call of it has gone to the provider, as far as the provider's code tells."""
        self.has_reply = False
        """Whether the head of a reply has arrived."""
        self.waiting_since: float | None = None
        """Since when, on the event loop's clock, the provider owes an answer: since a call left our
        own queues, or since the last sign of life; None while no call is under way."""
        self._calls = 0
        self.is_abandoned = False
        """Whether nobody waits for it any more: what is not sent yet is not to be sent."""

    def begin(self, now: float) -> None:
        """Note that a call of it goes to the provider, after all queues of our own."""
        self.has_begun = True
        if not self._calls:
            self.waiting_since = now
        self._calls += 1

    def note_life(self, now: float) -> None:
        """Note that the provider has begun to answer a call."""
        self.waiting_since = now

    def end(self) -> None:
        """Note that a call has ended, in whatever way."""
        self._calls -= 1
        if not self._calls:
            self.waiting_since = None


Work: TypeAlias = Callable[[Attempt], Coroutine[Any, Any, None]]
"""Makes an attempt, and hands out its answer itself."""


class Attempts:
    """The attempts under way. For one thread: the event loop's."""

    def __init__(self) -> None:
        self._tasks: dict[asyncio.Task[None], Attempt] = {}
        self._is_closing = False

    async def make(self, work: Work, limit_s: float | None = None) -> bool:
        """Make an attempt and wait for its end; return False if `limit_s` seconds are up before.

        An attempt that was sent goes on when the time is up or the caller is cancelled; one that
        was not is cancelled. Raises what the attempt fails with.
        """
        attempt = Attempt()
        attempt.is_abandoned = self._is_closing
        task = asyncio.create_task(work(attempt))
        self._tasks[task] = attempt
        task.add_done_callback(self._end)
        try:
            await asyncio.wait((task,), timeout=limit_s)
            if limit_s is not None and attempt.has_reply:
                await asyncio.wait((task,), timeout=EXTRA_SHARE * limit_s)
        except asyncio.CancelledError:
            await _abandon(task, attempt)
            raise
        if not task.done():
            await _abandon(task, attempt)
            return False
        task.result()
        return True

    async def close(self) -> None:
        """End the attempts under way; those that were sent have CLOSE_S seconds to be answered.

        Those that were not sent end at once. Nothing is sent from now until the return.
        """
        self._is_closing = True
        for task, attempt in self._tasks.items():
            attempt.is_abandoned = True
            if not (attempt.is_sent or attempt.has_reply):
                task.cancel()
        sent = sum(one.is_sent or one.has_reply for one in self._tasks.values())
        if sent:
            log.info("stopping: waiting up to %g s for the answers to %d calls", CLOSE_S, sent)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_S)
        if sent and self._tasks:
            log.warning(
                "stopping: %d calls were not answered within %g s; what they cost is not known",
                len(self._tasks),
                CLOSE_S,
            )
        while self._tasks:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(self._tasks)
        self._is_closing = False

    def _end(self, task: asyncio.Task[None]) -> None:
        attempt = self._tasks.pop(task)
        if task.cancelled():
            return
        # Read the failure: of an abandoned attempt nobody else does.
        error = task.exception()
        if error is not None and attempt.is_abandoned:
            log.info("a call that nobody waits for any more failed: %s", error)


async def _abandon(task: asyncio.Task[None], attempt: Attempt) -> None:
    """Let go of an attempt: it goes on by itself if it was sent, else it ends."""
    attempt.is_abandoned = True
    if not (attempt.is_sent or task.done()):
        task.cancel()
        await asyncio.wait((task,))
