"""`embed` for scripts and notebooks: blocking calls, answered by a service on a thread of its own.

The first call reads the configuration, opens the cache and the providers, and starts the thread.
They stay open for the calls that follow, until `close` or the end of the process. A thread of its
own is needed where an event loop runs already, as in a notebook.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Coroutine, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from embedding_proxy.proxy.service.embedding_result import Result
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

T = TypeVar("T")


class _Background:
    """An open service and its event loop, on a thread of its own. Raises what opening raises."""

    def __init__(self, config: str | Path | None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="embedding_proxy", daemon=True
        )
        self._thread.start()
        self.process = os.getpid()
        try:
            self.service = EmbeddingService.from_config(config)
            self.run(self.service.__aenter__())
        except BaseException:
            self._end()
            raise

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run work on the thread, and return its result."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def close(self) -> None:
        """Close the service: what is being bought is kept."""
        try:
            self.run(self.service.__aexit__(None, None, None))
        finally:
            self._end()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


_lock = threading.Lock()
_open: dict[str | None, _Background] = {}


def _service(config: str | Path | None) -> _Background:
    name = None if config is None else str(Path(config).resolve())
    with _lock:
        found = _open.get(name)
        # A forked process has no copy of the thread.
        if found is None or found.process != os.getpid():
            found = _open[name] = _Background(config)
        return found


def embed(  # noqa: PLR0913 - the parameters of a request
    inputs: str | Sequence[str | int | Sequence[int]],
    model: str,
    *,
    dimensions: int | None = None,
    parameters: Mapping[str, object] | None = None,
    user: str | None = None,
    namespace: str = "",
    cache_control: str = "",
    config: str | Path | None = None,
) -> Result:
    """Embed one text, one token array, or several texts or token arrays; from any thread.

    The parameters are those of `EmbeddingService.embed`; `config` is the configuration file, None
    for the built-in configuration. It is read, with the keys in the environment, at the first call
    that names it; `close` has the next call read it anew.
    The result's `vectors` are float32 of shape (number of inputs, dimensions).
    Raises ConfigError, StoreError, EmbeddingError.
    """
    background = _service(config)
    return background.run(
        background.service.embed(
            inputs,
            model,
            dimensions=dimensions,
            parameters=parameters,
            user=user,
            namespace=namespace,
            cache_control=cache_control,
        )
    )


def close() -> None:
    """Close the services that `embed` opened. What is being bought is kept. It may be repeated."""
    with _lock:
        services = list(_open.values())
        _open.clear()
    for one in services:
        if one.process == os.getpid():
            one.close()


atexit.register(close)
