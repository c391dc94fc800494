"""One attempt at one upstream over HTTP: a pooled session, time limits, a bounded, decoded reply.

The only file that asks providers for embeddings. A transport is bound to one origin, and the key
in its headers goes nowhere else: redirects are not followed, and headers come from a list.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Self

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from . import descriptors, hops
from .attempts import EXTRA_SHARE, Attempt
from .base import (
    ConnectionTimeout,
    Context,
    DeadlineExceeded,
    LoopDetected,
    OutOfDescriptors,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from .base_url import BaseUrl
from .content_encoding import ACCEPT_ENCODING, PIECE, DecodeError, Decoder
from .limits import Timeouts
from .network import Network
from .transport_errors import PROXY_CREDENTIALS_REFUSED, is_final, reason

_DIRECT = Network()


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of an upstream."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class Transport:
    """Sends JSON to one origin. Open it with `async with`; it may be used many times at once."""

    def __init__(  # noqa: PLR0913, PLR0917 - who is asked, and how
        self,
        provider: str,
        base_url: str,
        headers: Mapping[str, str],
        timeouts: Timeouts,
        connections: int = 0,
        network: Network = _DIRECT,
    ) -> None:
        """`headers` are sent with every call; `connections` is how many are open at most, 0 = any.

        Who sets a limit sees to it that no call waits for a connection: its time is the provider's.
        """
        self._provider = provider
        self._base_url = base_url.rstrip("/")
        self._base = BaseUrl(base_url)
        own = {"Accept-Encoding": ACCEPT_ENCODING, "Content-Type": "application/json"}
        self._headers = {**headers, **own}
        self._timeouts = timeouts
        self._connections = connections
        self._network = network
        self._session: aiohttp.ClientSession | None = None
        self._under_way: Counter[aiohttp.ClientSession] = Counter()

    async def __aenter__(self) -> Self:
        self._session = self._open()
        return self

    async def __aexit__(self, *_: object) -> None:
        sessions, self._session = {self._session, *self._under_way}, None
        for session in sessions:
            if session is not None:
                await session.close()

    def _open(self) -> aiohttp.ClientSession:
        return self._network.open_session(
            self._base_url, connections=self._connections, headers=self._headers
        )

    @asynccontextmanager
    async def _lend(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Give the session for one call; if its connection is cut, later calls have another.

        Where one kept connection is stale all may be, and what is tried again needs a fresh one.
        """
        session = self._session
        if session is None:
            raise RuntimeError("the transport is not open")
        self._under_way[session] += 1
        try:
            yield session
        except (TimeoutError, aiohttp.ClientConnectorError, ssl.SSLError):
            raise
        except (aiohttp.ClientError, OSError, Unreachable):
            if self._session is session:
                self._session = self._open()
            raise
        finally:
            self._under_way[session] -= 1
            if not self._under_way[session]:
                del self._under_way[session]
                if session is not self._session:
                    await session.close()

    async def post(
        self,
        path: str,
        payload: bytes,
        limit: int,
        context: Context,
        headers: Mapping[str, str] | None = None,
    ) -> Reply:
        """POST `payload` and return the whole reply, decoded, of at most `limit` bytes, any status.

        `headers` are sent with this call alone, beside those of all calls.
        A reply that has begun within the attempt's time is read for EXTRA_SHARE of that time longer
        at most: it is paid for. `context.attempt` is told when the request is sent, and when the
        reply begins.

        Raises DeadlineExceeded when the request's time is up, UpstreamTimeout when this attempt's
        is (ConnectionTimeout when there is no connection in time), or the reply does not begin in
        time or arrives too slowly, Unreachable when there is no connection or it was lost,
        UpstreamError for a reply beyond `limit`, one that cannot be decoded, a redirect or a 407,
        LoopDetected for a 508.
        """
        now = asyncio.get_running_loop().time()
        left = None if context.deadline is None else context.deadline - now
        if left is not None and left <= 0:
            raise DeadlineExceeded("the time of the request was up before it could be sent")
        total = self._timeouts.total_s
        longest = total * (1 + EXTRA_SHARE)
        if left is not None and not context.finishes_calls:
            total, longest = min(total, left), min(longest, left)
        first_byte = min(self._timeouts.first_byte_s or total, total)
        connect = min(self._timeouts.connect_s, total)
        timeout = aiohttp.ClientTimeout(total=None, connect=connect)
        attempt = context.attempt or Attempt()
        attempt.begin(now)
        try:
            async with AsyncExitStack() as stack:
                session = await stack.enter_async_context(self._lend())
                request = session.post(
                    self._base.join(path),
                    data=_Payload(payload, attempt),
                    headers={**(headers or {}), **hops.headers()},
                    allow_redirects=False,
                    timeout=timeout,
                )
                async with asyncio.timeout_at(now + first_byte):
                    response = await stack.enter_async_context(request)
                attempt.has_reply = True
                attempt.note_life(asyncio.get_running_loop().time())
                self._check_status(response.status)
                async with asyncio.timeout_at(now + longest):
                    body = await self._read(response, limit)
                return Reply(response.status, response.headers, body)
        except TimeoutError as error:
            taken = asyncio.get_running_loop().time() - now
            if left is not None and taken >= left and not context.finishes_calls:
                raise DeadlineExceeded("the time of the request was up") from error
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                place = self._network.place_of(self._base_url)
                raise ConnectionTimeout(
                    self._provider, f"connection timed out to {place}, after {taken:.1f} s"
                ) from error
            raise UpstreamTimeout(self._provider, f"no answer within {taken:.1f} s") from error
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            if descriptors.is_cause(error):
                descriptors.warn(f"no connection to {self._provider} can be made")
                raise OutOfDescriptors from error
            if is_final(error):
                raise UpstreamError(self._provider, reason(error)) from error
            raise Unreachable(self._provider, reason(error)) from error
        finally:
            attempt.end()

    def _check_status(self, status: int) -> None:
        """Raise UpstreamError or LoopDetected for a status that no upstream answers with itself."""
        if 300 <= status < 400:
            raise UpstreamError(self._provider, "answered with a redirect; not followed")
        if status == 407:
            raise UpstreamError(self._provider, PROXY_CREDENTIALS_REFUSED)
        if status == 508:
            raise LoopDetected(
                self._provider,
                "its address leads back to this proxy (508 Loop Detected); set"
                f" providers.{self._provider}.base_url to the upstream's own address",
            )

    async def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """Return the decoded body, as long as it keeps coming; stop as soon as it passes `limit`.

        Both sizes are bounded, the sent and the decoded one. Between the pieces of a chunk that
        decodes to many, the event loop runs. A body that cannot be decoded is empty where the
        status says what is wrong. Raises UpstreamError, UpstreamTimeout, Unreachable.
        """
        window = self._timeouts.rate_window_s
        clock = asyncio.get_running_loop().time
        decoder = Decoder(response.headers.get("Content-Encoding", ""))
        body = _Body(self._provider, limit)
        received = before = 0
        end = clock() + window
        try:
            while not response.content.at_eof():
                try:
                    async with asyncio.timeout_at(end) as rest:
                        chunk = await response.content.readany()
                except TimeoutError:
                    if not rest.expired():
                        raise
                    chunk = b""
                received += len(chunk)
                body.check(received)
                await body.take(decoder.feed(chunk))
                if clock() >= end:
                    if received - before < self._timeouts.least_bytes_per_s * window:
                        raise UpstreamTimeout(self._provider, "the answer arrives too slowly")
                    before, end = received, clock() + window
            await body.take(decoder.finish())
        except DecodeError as error:
            if response.status >= 400:
                return b""
            raise UpstreamError(self._provider, str(error)) from error
        except (aiohttp.ClientError, ConnectionError, ssl.SSLError) as error:
            raise Unreachable(self._provider, reason(error, received)) from error
        return b"".join(body.pieces)


class _Payload(aiohttp.BytesPayload):
    """The body of a request; it notes when it is sent: until then the upstream charges nothing."""

    def __init__(self, value: bytes, attempt: Attempt) -> None:
        super().__init__(value)
        self._attempt = attempt

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        self._attempt.is_sent = True
        await super().write_with_length(writer, content_length)


class _Body:
    """The decoded pieces of a reply, bounded together."""

    def __init__(self, provider: str, limit: int) -> None:
        self._provider = provider
        self._limit = limit
        self._size = 0
        self.pieces: list[bytes] = []

    async def take(self, pieces: Iterator[bytes]) -> None:
        """Add pieces; after each full one the event loop runs. Raises UpstreamError."""
        for piece in pieces:
            self.pieces.append(piece)
            self._size += len(piece)
            self.check(self._size)
            if len(piece) == PIECE:
                await asyncio.sleep(0)

    def check(self, size: int) -> None:
        """Raise UpstreamError for a size beyond the limit."""
        if size > self._limit:
            raise UpstreamError(self._provider, "the answer is far larger than expected")
