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
import logging
import os
import re
import ssl
import warnings
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar
from urllib.parse import urlsplit

from embedding_proxy.cache import private_files
from embedding_proxy.providers.client_credential import key_mistake
from embedding_proxy.providers.redaction import QuotedInputs, Redactor

from .errors import (
    NO_CALL,
    Call,
    Denied,
    Disconnected,
    NotInstalled,
    QdrantFailure,
    Rejected,
    TooLarge,
    UntrustedCertificate,
    WrongAddress,
    translate,
)

if TYPE_CHECKING:
    from qdrant_client import AsyncQdrantClient

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.qdrant")

_CALLS_BEFORE_GROWTH = 16
DEFAULT_PORT = 6333
METADATA = (1, 16)
"""The first version whose collections keep metadata: the provenance of their vectors."""
INSERT_ONLY = (1, 17)
"""The first version with writes that leave existing points unchanged."""


_calls: ContextVar[Call] = ContextVar("calls", default=NO_CALL)
"""The call that runs in this context."""


async def _note_request(request: Any) -> None:  # noqa: ANN401 - the client's own httpx
    method, path = request.method, request.url.path
    _calls.set(Call(_action(method, path), f"{method} {path}"))


def _action(method: str, path: str) -> str:
    """Return in words what a call of the API does.

    >>> _action("PUT", "/collections/docs/points"), _action("GET", "/collections/docs")
    ('writing points to docs', 'reading the configuration of docs')
    """
    _, separator, rest = path.partition("/collections/")
    name, _, what = rest.partition("/")
    if not separator:
        ends = {
            "/collections": "listing collections",
            "/aliases": "reading aliases",
            "/": "reading the version",
        }
        return next((ends[end] for end in ends if path.endswith(end)), f"{method} {path}")
    if rest == "aliases" and method == "POST":
        return "changing aliases"
    if what in _READS:
        return f"reading points of {name}"
    if what.startswith("points"):
        return f"deleting points of {name}" if "delete" in what else f"writing points to {name}"
    if what:
        return f"{method} {path}"
    verbs = {"GET": "reading the configuration of", "PUT": "creating", "DELETE": "deleting"}
    return f"{verbs.get(method, 'changing')} {name}"


_READS = {f"points{end}" for end in ("/scroll", "/query", "/count", "/search")}


class Connection:
    """Qdrant at `url`, or in the folder `path`. Open it with `async with`.

    The port of a server is 6333 unless its `url` says another; its key is in the environment
    variable `api_key_env`. A call takes `timeout_s` at most, in whole seconds. `ca_file` holds the
    certificates to trust instead of the usual ones. With `grpc_port` calls go by gRPC to it.
    """

    def __init__(  # noqa: PLR0913 - how a server is reached
        self,
        *,
        url: str | None = None,
        path: Path | None = None,
        api_key_env: str | None = None,
        timeout_s: float = 60,
        ca_file: Path | None = None,
        grpc_port: int | None = None,
    ) -> None:
        if (url is None) == (path is None):
            raise ValueError("a connection has a url or a path")
        self._url = url
        self._path = path
        self._api_key_env = api_key_env
        self._timeout_s = timeout_s
        self._ca_file = ca_file
        self._grpc_port = grpc_port
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
        port = self._grpc_port or url.port or DEFAULT_PORT
        host = f"[{url.hostname}]" if ":" in (url.hostname or "") else url.hostname
        return f"{host}:{port}"

    @property
    def embedded(self) -> bool:
        """Whether it is a folder: no payload indexes, no quantization, one process only."""
        return self._path is not None

    async def __aenter__(self) -> Self:
        """Open the client. A folder is read; a server gets no request yet.

        Raises QdrantFailure: Denied if the variable of the key is empty, NotInstalled, InUse,
        UntrustedCertificate if the file of the CA cannot be used.
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
                self._client = self._make(url=self._url, api_key=key, **self._network())
        except BaseException:
            await self.close()
            raise
        return self

    def _network(self) -> dict[str, object]:
        """Return the client's options of a server. Raises UntrustedCertificate for `ca_file`."""
        # Reading the certificates blocks the event loop for about 50 ms.
        verify: ssl.SSLContext | bool = not str(self._url).lower().startswith("http:")
        options: dict[str, object] = {}
        if verify and self._ca_file is not None:
            try:
                verify = ssl.create_default_context(cafile=self._ca_file)
                roots = self._ca_file.read_bytes()
            except OSError as error:
                raise UntrustedCertificate(f"ca_file {self._ca_file}: {error}") from error
            if self._grpc_port is not None:
                options["grpc_options"] = {"root_certificates": roots}
        if self._grpc_port is not None:
            options |= {"prefer_grpc": True, "grpc_port": self._grpc_port}
        hooks = {"request": [_note_request]}
        return {"check_compatibility": False, "verify": verify, "event_hooks": hooks, **options}

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the client. Other processes can then open the folder."""
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

        # A cancellation meanwhile must not leave the folder locked.
        ending = asyncio.get_running_loop().run_in_executor(thread, end)
        try:
            await asyncio.shield(ending)
        finally:
            thread.shutdown(wait=False)

    async def ask(
        self,
        work: "Callable[[AsyncQdrantClient], Awaitable[T]]",
        payloads: Iterable[object] = (),
        *,
        doing: str = "",
    ) -> T:
        """Return the result of a call of the client. Raises QdrantFailure.

        `payloads` are those that the call sends. A failure quotes none of their texts, because its
        message goes to the log, the status and the outbox. `doing` describes the call in words, for
        gRPC; over HTTP the method and path do.
        """
        client = self._client
        if client is None:
            raise RuntimeError("the connection is not open")

        async def call() -> T:
            return await work(client)

        if self._thread is not None:
            return await self._in_thread(lambda: self._run(call), payloads)
        token = _calls.set(Call(doing))
        try:
            return await call()
        except Exception as error:
            raise self._translate(error, payloads) from error
        finally:
            _calls.reset(token)

    def _translate(self, error: Exception, payloads: Iterable[object]) -> Exception:
        """Return a failure as one of ours. Its message holds no key, which a gateway may repeat."""
        call = _calls.get()
        failure = translate(error, self._place, call)
        if isinstance(failure, QdrantFailure):
            # The collection's name may be that of the model, which is in each payload.
            texts = (
                text for payload in payloads for text in _texts(payload) if text not in call.doing
            )
            message = self._redactor.redact_text(str(failure))
            failure.args = (QuotedInputs(texts).hide(message),)
        return failure

    async def _in_thread(self, work: Callable[[], T], payloads: Iterable[object] = ()) -> T:
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._thread, work)
        except Exception as error:
            raise self._translate(error, payloads) from error

    def _run(self, call: "Callable[[], Awaitable[T]]") -> T:
        assert self._runner is not None  # noqa: S101 - opened with the folder

        async def whole() -> T:
            return await call()

        return self._runner.run(whole())

    def _open_folder(self) -> None:
        _load()
        if self._path is not None:
            # The folder holds texts, and the client makes its files with the mode of the umask.
            private_files.make_folder(self._path)
        self._client = self._make(path=str(self._path))
        self._runner = asyncio.Runner()

    def _make(self, **options: object) -> "AsyncQdrantClient":
        from qdrant_client import AsyncQdrantClient  # noqa: PLC0415 - an extra, and slow to import

        # It warns of large folders and of a key without TLS; both were the user's choice.
        with warnings.catch_warnings(action="ignore"):
            return AsyncQdrantClient(timeout=max(1, round(self._timeout_s)), **options)  # type: ignore[arg-type]


class BatchSize:
    """The largest number of items in a call. It halves when a call is too large."""

    def __init__(self, max_items: int) -> None:
        self.max_items = max_items
        """Items of the next call."""
        self._limit = max_items
        self._calls = 0

    def shrink(self, items: int, error: QdrantFailure) -> None:
        """Reduce the size after a call of `items` that was too large, or may have been.

        A cut connection may have other reasons, so after _CALLS_BEFORE_GROWTH calls the size grows
        again. A limit that the server itself names stays.
        """
        self.max_items, self._calls = max(1, items // 2), 0
        if isinstance(error, TooLarge):
            if error.max_items is not None and 0 < error.max_items < items:
                self.max_items = error.max_items
            self._limit = self.max_items

    def grow(self) -> None:
        """Count a call that succeeded; the size may grow again."""
        self._calls += 1
        if self._calls >= _CALLS_BEFORE_GROWTH and self.max_items < self._limit:
            self.max_items, self._calls = min(self._limit, 2 * self.max_items), 0


async def send_in_batches(
    items: Sequence[T], size: BatchSize, send: Callable[[Sequence[T]], Awaitable[object]]
) -> None:
    """Send all items in their order, in calls within `size`; a call that is too large is halved.

    Raises QdrantFailure: TooLarge or Disconnected only where one item alone is too large.
    """
    start = 0
    while start < len(items):
        batch = items[start : start + size.max_items]
        try:
            await send(batch)
        except (TooLarge, Disconnected) as error:
            if len(batch) == 1:
                raise
            size.shrink(len(batch), error)
            log.warning("%s; trying batches of %d", error, size.max_items)
            continue
        size.grow()
        start += len(batch)


def _texts(payload: object) -> Iterator[str]:
    """Yield the texts in a payload, however deep."""
    values = [payload]
    while values:
        value = values.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, Mapping):
            values += value.values()
        elif isinstance(value, list):
            values += value


def _load() -> None:
    """Import the client, which takes long the first time. Raises NotInstalled."""
    try:
        import qdrant_client  # noqa: F401, PLC0415
    except ImportError as error:
        raise NotInstalled from error


async def version(qdrant: Connection) -> tuple[int, int] | None:
    """Return a server's version; None for a folder, and if the answer names no version.

    A gateway that forwards only calls about collections names none. Raises QdrantFailure.
    """
    if qdrant.embedded:
        return None
    try:
        info = await qdrant.ask(lambda client: client.info())
    except (Rejected, WrongAddress):
        return None
    numbers = re.match(r"v?(\d+)\.(\d+)", info.version)
    return (int(numbers[1]), int(numbers[2])) if numbers else None


async def no_metadata(qdrant: Connection) -> str | None:
    """Return why a server cannot keep metadata of collections; None if it can.

    Raises QdrantFailure.
    """
    server_version = await version(qdrant)
    if server_version is None or server_version >= METADATA:
        return None
    return (
        f"Qdrant at {qdrant} is {_format_version(server_version)}, which does not keep whose"
        f" vectors a collection holds: use {_format_version(METADATA)} or later, or set"
        " index.qdrant.adopt_unlabeled: true and see to it yourself that no two models share a"
        " collection"
    )


async def no_insert_only(qdrant: Connection) -> str | None:
    """Return why a server cannot leave existing points unchanged; None if it can.

    Raises QdrantFailure.
    """
    server_version = await version(qdrant)
    if server_version is None or server_version >= INSERT_ONLY:
        return None
    return (
        f"Qdrant at {qdrant} is {_format_version(server_version)}: before"
        f" {_format_version(INSERT_ONLY)} a point that a client writes to the new collection while"
        " the same one is carried may be overwritten"
    )


def _format_version(numbers: tuple[int, int]) -> str:
    return f"{numbers[0]}.{numbers[1]}"
