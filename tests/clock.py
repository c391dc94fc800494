"""Clocks for tests."""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any


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
        # Without a timer, a thread or a socket is waited for.
        found = super().select(timeout if timeout is None else 0)
        if timeout and not found:
            self._clock.now += timeout
        return found


class LeapingLoop(asyncio.SelectorEventLoop):
    """An event loop whose time leaps to the next timer where nothing else is to be done.

    So a deadline of seconds takes none, and no machine is too slow for it.
    """

    def __init__(self) -> None:
        self._own_time = Clock()
        super().__init__(_IdleSelector(self._own_time))

    def time(self) -> float:
        """Return the loop's time, in seconds."""
        return self._own_time()


def run_leaping(main: Coroutine[Any, Any, None]) -> None:
    """Run a test on a loop of its own whose time leaps."""
    with asyncio.Runner(loop_factory=LeapingLoop) as runner:
        runner.run(main)
