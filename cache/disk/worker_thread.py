"""One thread that works for the event loop, one piece of work after the other.

Each transaction of a purchase goes through such a thread, and is waited for. An executor makes two
futures for it, with a lock each, and copies the state of one to the other.
"""

import asyncio
import atexit
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, TypeVar

T = TypeVar("T")
_Job = tuple[Callable[[], Any], "asyncio.Future[Any]"]


class WorkerThread:
    """The thread. It is started with the first work; at the end of the process, work is ended."""

    def __init__(self, name: str) -> None:
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._is_shut_down = False

    async def run(self, work: Callable[[], T]) -> T:
        """Return what `work` returns, or raise what it raises.

        Work whose caller is cancelled before it begins is left out. Raises RuntimeError after the
        shutdown.
        """
        if self._is_shut_down:
            raise RuntimeError("the thread is shut down")
        if not self._thread.is_alive():
            self._thread.start()
            atexit.register(self.shutdown)
        future: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        self._jobs.put((work, future))
        return await future

    def shutdown(self) -> None:
        """Wait for the work that was begun or waits, and end the thread."""
        if self._thread.is_alive() and not self._is_shut_down:
            self._is_shut_down = True
            self._jobs.put(None)
            self._thread.join()
            atexit.unregister(self.shutdown)
        self._is_shut_down = True

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            work, future = job
            if not future.cancelled():
                result: Any = None
                error: BaseException | None = None
                try:
                    result = work()
                except BaseException as failure:  # noqa: BLE001 - raised where someone waits
                    error = failure
                # The loop may be closed by now: then nobody waits.
                with suppress(RuntimeError):
                    future.get_loop().call_soon_threadsafe(_resolve, future, result, error)
            # Nothing of it is to live until the next one comes.
            del job, work, future


def _resolve(future: "asyncio.Future[T]", result: T, error: BaseException | None) -> None:
    """Give a future its result, unless its caller has gone."""
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
