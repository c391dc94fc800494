"""Clocks for tests."""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

FOR_EVER = 60.0
"""Seconds; what has not come by then never will, however slow the machine is."""


class Clock:
    """A clock that stands until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class _IdleSelector(selectors.DefaultSelector):
    """Tells how long it would have waited, and does not wait."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            # Without a timer, a thread or a socket is waited for.
            if not (found := super().select(FOR_EVER)):
                raise RuntimeError("everybody waits, and nothing will ever happen")
            return found
        found = super().select(0)
        if not found:
            self._clock.now += max(timeout, 0.0)
        return found


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time leaps to the next timer where nothing else is to be done.

    So a deadline of seconds takes none, and no machine is too slow for it. A socket or a thread is
    something that the loop does not know of: tests with these take `move`.
    """

    def __init__(self) -> None:
        self._own_time = Clock()
        super().__init__(_IdleSelector(self._own_time))

    def time(self) -> float:
        """Return the loop's time, in seconds."""
        return self._own_time()


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Run this to its end in a virtual loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Have a test without asynchronous fixtures run in a virtual loop."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        run_virtual(test(*args, **kwargs))

    return run


async def some_turns() -> None:
    """Let everything go on that can without a socket or a thread."""
    for _ in range(100):
        await asyncio.sleep(0)


async def until(condition: Callable[[], object]) -> None:
    """Wait until something holds that nobody tells of."""
    async with asyncio.timeout(FOR_EVER):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0)
