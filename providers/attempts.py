"""Attempts under way: a call that was sent is finished, though nobody waits for it.

An upstream charges for what it was asked, whether or not the answer is read. So the time of a
request, or a client that goes, ends the wait for a call, and never the call itself: its answer is
checked, kept and billed. The provider's own limits of time end it. What was not sent yet is
dropped. When the process ends, each call that was sent has CLOSE_S seconds to be answered.
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
    """How far a call has got. Whoever makes it sets `is_sent` and `has_reply`."""

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
        self.is_closing = False
        """Whether nothing is to be sent any more."""

    def start(self, work: Coroutine[Any, Any, None], attempt: Attempt) -> asyncio.Task[None]:
        """Start what makes an attempt, as a task of its own."""
        attempt.is_abandoned = self.is_closing
        task = asyncio.create_task(work)
        self._tasks[task] = attempt
        task.add_done_callback(self._end)
        return task

    async def make(self, work: Work) -> None:
        """Make an attempt and wait for its end. Raises what it fails with.

        An attempt that was sent goes on when the caller is cancelled; one that was not is
        cancelled, too.
        """
        attempt = Attempt()
        task = self.start(work(attempt), attempt)
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            if self.abandon(task):
                await asyncio.wait((task,))
            raise
        task.result()

    def abandon(self, task: asyncio.Task[None]) -> bool:
        """Let go of an attempt: it goes on by itself if it was sent, else it ends; tell if so."""
        attempt = self._tasks.get(task)
        if attempt is None:
            return False
        attempt.is_abandoned = True
        if not attempt.is_sent:
            _cancel_soon(task, attempt)
        return not attempt.is_sent

    async def close(self) -> None:
        """End the attempts under way; those that were sent have CLOSE_S seconds to be answered.

        Those that were not sent end at once. Nothing is sent from now until the return.
        """
        self.is_closing = True
        for task, attempt in self._tasks.items():
            attempt.is_abandoned = True
            if not (attempt.is_sent or attempt.has_reply):
                _cancel_soon(task, attempt)
        sent = sum(attempt.is_sent or attempt.has_reply for attempt in self._tasks.values())
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
        self.is_closing = False

    def _end(self, task: asyncio.Task[None]) -> None:
        attempt = self._tasks.pop(task)
        if task.cancelled():
            return
        # Read the failure: of an abandoned attempt nobody else does.
        error = task.exception()
        if error is not None and attempt.is_abandoned:
            log.info("a call that nobody waits for any more failed: %s", error)


def _cancel_soon(task: asyncio.Task[None], attempt: Attempt) -> None:
    """Cancel an attempt, unless it is sent before that.

    One that is cancelled before its first step would not run its own cleaning up.
    """

    def cancel() -> None:
        if not (attempt.is_sent or attempt.has_reply):
            task.cancel()

    asyncio.get_running_loop().call_soon(cancel)
