"""A connection to Qdrant, a server or a folder, with errors of our own.

::

    async with Connection(url="http://localhost:6333", api_key_env="QDRANT_API_KEY") as qdrant:
        found = await qdrant.ask(lambda client: client.get_collections())

`path` instead of `url` is the client's embedded mode. It keeps all points in memory and blocks
while it works, so it gets one thread of its own, in which the calls follow one another. Its folder
can be open in ONE process only: the proxy holds it as long as it runs, and a second worker, a
command or a script finds it in use. Several processes need a server.

Nothing of qdrant_client is imported before a connection is opened: that takes most of a second.
"""

import asyncio
import os
import re
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar
from urllib.parse import urlsplit

from embedding_proxy.cache import private_files
from embedding_proxy.providers.client_credential import key_mistake
from embedding_proxy.providers.redaction import QuotedInputs, Redactor

from .errors import Denied, NotInstalled, QdrantFailure, Rejected, translated

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient

T = TypeVar("T")

DEFAULT_PORT = 6333
METADATA = (1, 16)
"""From which on a collection keeps its metadata: whose vectors it holds."""
INSERT_ONLY = (1, 17)
"""From which on a write can leave alone what is there."""


class Connection:
    """Qdrant at `url`, or in the folder `path`. Open it with `async with`.

    The port of a server is 6333 unless its `url` says another; its key is in the environment
    variable `api_key_env`. A call takes `timeout_s` at most, in whole seconds.
    """

    def __init__(
        self,
        *,
        url: str | None = None,
        path: Path | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 60,
    ) -> None:
        if (url is None) == (path is None):
            raise ValueError("a connection has a url or a path")
        self._url = url
        self._path = path
        self._api_key_env = api_key_env
        self._timeout_s = timeout_s
        self._redactor = Redactor()
        self._client: AsyncQdrantClient | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._runner: asyncio.Runner | None = None

    def __str__(self) -> str:
        return self._url or str(self._path)

    @property
    def _place(self) -> str:
        """The host and port of the server."""
        url = urlsplit(self._url or "")
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        return f"{host}:{url.port or DEFAULT_PORT}"

    @property
    def embedded(self) -> bool:
        """Whether it is a folder: without payload indexes, quantization, or other processes."""
        return self._path is not None

    async def __aenter__(self) -> Self:
        """Open the client; a server is not asked for anything yet, a folder is read.

        Raises QdrantFailure: Denied if the variable of the key is empty, NotInstalled, InUse.
        """
        key = None
        if self._url is not None and self._api_key_env:
            key = os.environ.get(self._api_key_env, "").strip()
            if not key:
                raise Denied(
                    f"{self._api_key_env}, which should hold the key of Qdrant, is not set"
                )
            mistake = key_mistake(key, self._api_key_env)
            if mistake:
                raise Denied(f"{self._api_key_env}: {mistake}")
            self._redactor = Redactor(key)
        try:
            if self._path is not None:
                self._thread = ThreadPoolExecutor(1, "qdrant")
                await self._in_thread(self._open_folder)
            else:
                await asyncio.to_thread(_load)
                # The certificates take some 50 ms to read, in which nobody else is served.
                plain = str(self._url).lower().startswith("http:")
                self._client = self._make(
                    url=self._url, api_key=key, check_compatibility=False, verify=not plain
                )
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the client; the folder is free for others then."""
        client, self._client = self._client, None
        if self._thread is None:
            if client is not None:
                await client.close()
            return
        thread, self._thread = self._thread, None
        runner, self._runner = self._runner, None

        def end() -> None:
            if runner is not None:
                if client is not None:
                    runner.run(client.close())
                runner.close()

        # Whoever is called off meanwhile must not leave the folder locked.
        ending = asyncio.get_running_loop().run_in_executor(thread, end)
        try:
            await asyncio.shield(ending)
        finally:
            thread.shutdown(wait=False)

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
    ) -> T:
        """Return what the client's call gives. Raises QdrantFailure.

        `payloads` are sent by the call. The failure repeats no text of theirs: its message goes to
        the log, the status and the outbox.
        """
        client = self._client
        if client is None:
            raise RuntimeError("the connection is not open")

        async def call() -> T:
            return await work(client)

        if self._thread is not None:
            return await self._in_thread(lambda: self._run(call), payloads)
        try:
            return await call()
        except Exception as error:
            raise self._translated(error, payloads) from error

    def _translated(self, error: Exception, payloads: Iterable[object]) -> Exception:
        """Return a failure in our words, without the key: a gateway may repeat what it refuses."""
        failure = translated(error, self._place)
        if isinstance(failure, QdrantFailure):
            texts = (text for one in payloads for text in _texts(one))
            message = self._redactor.redact_text(str(failure))
            failure.args = (QuotedInputs(texts).hide(message),)
        return failure

    async def _in_thread(self, work: Callable[[], T], payloads: Iterable[object] = ()) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except Exception as error:
            raise self._translated(error, payloads) from error

    def _run(self, call: "Callable[[], Awaitable[T]]") -> T:
        assert self._runner is not None  # noqa: S101 - opened with the folder

        async def whole() -> T:
            return await call()

        return self._runner.run(whole())

    def _open_folder(self) -> None:
        _load()
        if self._path is not None:
            # The texts lie in it, in files that the client makes as the umask says.
            private_files.make_folder(self._path)
        self._client = self._make(path=str(self._path))
        self._runner = asyncio.Runner()

    def _make(self, **options: object) -> "AsyncQdrantClient":
        from qdrant_client import AsyncQdrantClient  # noqa: PLC0415 - an extra, and slow to import

        # It warns of large folders and of a key without TLS; both were the user's choice.
        with warnings.catch_warnings(action="ignore"):
            return AsyncQdrantClient(timeout=max(1, round(self._timeout_s)), **options)  # type: ignore[arg-type]


def _texts(payload: object) -> Iterator[str]:
    """Yield the texts in a payload, however deep."""
    values = [payload]
    while values:
        one = values.pop()
        if isinstance(one, str):
            yield one
        elif isinstance(one, Mapping):
            values += one.values()
        elif isinstance(one, list):
            values += one


def _load() -> None:
    """Import the client, which takes long the first time. Raises NotInstalled."""
    try:
        import qdrant_client  # noqa: F401, PLC0415
    except ImportError as error:
        raise NotInstalled from error


async def version(qdrant: Connection) -> tuple[int, int] | None:
    """Return a server's version; None for a folder, and for what does not say.

    What stands before a server and answers only for its collections says nothing. Raises
    QdrantFailure.
    """
    if qdrant.embedded:
        return None
    try:
        told = await qdrant.ask(lambda client: client.info())
    except Rejected:
        return None
    found = re.match(r"v?(\d+)\.(\d+)", told.version)
    return (int(found[1]), int(found[2])) if found else None


async def no_metadata(qdrant: Connection) -> str | None:
    """Say that a server keeps no metadata of collections; None if it does. Raises QdrantFailure."""
    found = await version(qdrant)
    if found is None or found >= METADATA:
        return None
    return (
        f"Qdrant at {qdrant} is {_dotted(found)}, which does not keep whose vectors a collection"
        f" holds: use {_dotted(METADATA)} or later, or set index.qdrant.adopt_unlabeled: true and"
        " see to it yourself that no two models share a collection"
    )


async def no_insert_only(qdrant: Connection) -> str | None:
    """Say that a server cannot leave alone what is there; None if it can. Raises QdrantFailure."""
    found = await version(qdrant)
    if found is None or found >= INSERT_ONLY:
        return None
    return (
        f"Qdrant at {qdrant} is {_dotted(found)}: before {_dotted(INSERT_ONLY)} a point that a"
        " client writes to the new collection while the same one is carried may be overwritten"
    )


def _dotted(found: tuple[int, int]) -> str:
    return f"{found[0]}.{found[1]}"
