"""`embed` for scripts and notebooks: blocking calls, answered by a service on a thread of its own.

The first call reads the configuration, opens the cache and the providers, and starts the thread.
They stay open for the calls that follow, until `close` or the end of the process. A thread of its
own is needed where an event loop runs already, as in a notebook.
"""

import asyncio
import atexit
import concurrent.futures.thread
import contextlib
import os
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from embedding_proxy.proxy.service.embedding_result import Result
from embedding_proxy.proxy.service.embedding_service import EmbeddingService
from embedding_proxy.proxy.service.request import Inputs, convert_input

T = TypeVar("T")


class _Background:
    """An open service and its event loop, on a thread of its own. Raises what opening raises."""

    def __init__(self, config: str | Path | None) -> None:
        self.service = EmbeddingService.from_config(config)
        self._calls: set[concurrent.futures.Future[Any]] = set()
        self._stop = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="embedding_proxy", daemon=True)
        self._thread.start()
        try:
            wait(self.submit(self.service.__aenter__()))
        except BaseException:
            self._end()
            raise

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stop.wait())

    def submit(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Start work on the thread, and return what its result will be."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        self._calls.add(future)
        future.add_done_callback(self._calls.discard)
        return future

    def close(self) -> None:
        """Wait for the calls in progress, and close the service: what is being bought is kept."""
        try:
            concurrent.futures.wait(list(self._calls))
            wait(self.submit(self.service.__aexit__(None, None, None)))
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()


def wait(future: concurrent.futures.Future[T]) -> T:
    """Return the result of work on the thread; Ctrl-C or SIGTERM cancels it."""
    try:
        return future.result()
    except (KeyboardInterrupt, _Terminated):
        future.cancel()
        raise


class _Terminated(BaseException):
    """SIGTERM came while the main thread waited for a result."""


class _Services:
    """The services that are open in this process, by the paths of their configuration files."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[str | None, _Background] = {}
        self._inherited: list[object] = []
        self._is_ended = False

    def submit(
        self,
        config: str | Path | None,
        work: Callable[[EmbeddingService], Coroutine[Any, Any, T]],
    ) -> concurrent.futures.Future[T]:
        """Start work with the service of a configuration, which is opened if need be."""
        name = None if config is None else str(Path(config).resolve())
        # A call is submitted under the lock, so that no service is closed before it has begun.
        with self._lock:
            if self._is_ended:
                raise RuntimeError("embed: the main thread has ended")
            background = self._open.get(name)
            if background is None:
                background = self._open[name] = _Background(config)
            return background.submit(work(background.service))

    def close(self) -> None:
        """Close them all; the next call opens a new one."""
        with self._lock:
            services = list(self._open.values())
            self._open.clear()
        for background in services:
            background.close()

    def end(self) -> None:
        """Close them all for good."""
        with self._lock:
            self._is_ended = True
        self.close()

    def forget(self) -> None:
        """Begin anew in a forked process: it has a copy of everything but the threads.

        The copies are kept: to close a copy of a database would harm the parent's.
        """
        self._lock = threading.Lock()
        self._inherited += self._open.values()
        self._open = {}


_services = _Services()


def embed(  # noqa: PLR0913 - the parameters of a request
    inputs: Inputs,
    model: str,
    *,
    dimensions: int | None = None,
    parameters: Mapping[str, object] | None = None,
    user: str | None = None,
    namespace: str = "",
    client: str = "",
    api_key: str = "",
    cache_control: str = "",
    index: object = None,
    config: str | Path | None = None,
) -> Result:
    """Embed one text, one token array, or several texts or token arrays; from any thread.

    The parameters are those of `EmbeddingService.embed`; `config` is the configuration file, None
    for the built-in configuration. It is read, with the keys in the environment, at the first call
    that names it; `close` has the next call read it anew.
    The result's `vectors` are float32 of shape (number of inputs, dimensions).
    Raises ConfigError, StoreError, EmbeddingError; RuntimeError once the main thread has ended.
    """
    # In this thread: an iterator may be of use in no other.
    copy: Any = convert_input(inputs)
    # From before the call begins: it may be paid for as soon as it is submitted.
    with _ending_after_calls() as wait_interruptibly:
        future = _services.submit(
            config,
            lambda service: service.embed(
                copy,
                model,
                dimensions=dimensions,
                parameters=parameters,
                user=user,
                namespace=namespace,
                client=client,
                api_key=api_key,
                cache_control=cache_control,
                index=index,
            ),
        )
        return wait_interruptibly(future)


@contextlib.contextmanager
def _ending_after_calls() -> Iterator[Callable[[concurrent.futures.Future[T]], T]]:
    """Have SIGTERM end the process only when the calls in progress are kept; a second one at once.

    In the main thread, and unless the program itself has said what the signal does. Gives a
    function that waits for a call. A signal that comes earlier takes effect there, so that no call
    is submitted by halves.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield wait
        return
    is_waiting = is_terminated = False

    def interrupt(*_: object) -> None:
        nonlocal is_terminated
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        is_terminated = True
        if is_waiting:
            raise _Terminated

    def wait_interruptibly(future: concurrent.futures.Future[T]) -> T:
        nonlocal is_waiting
        is_waiting = True
        if is_terminated:
            future.cancel()
            raise _Terminated
        return wait(future)

    try:
        signal.signal(signal.SIGTERM, interrupt)
        yield wait_interruptibly
    except _Terminated:
        _services.end()
        os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def close() -> None:
    """Close the services that `embed` opened, after the calls in progress. It may be repeated.

    The end of the main thread does the same.
    """
    _services.close()


# `atexit` is too late: by then no executor takes work any more, and what is to be written would be
# lost. What is registered here runs before the executors end, as it is registered after theirs.
getattr(threading, "_register_atexit", atexit.register)(_services.end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_services.forget)
