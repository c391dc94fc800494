"""One attempt at one upstream over HTTP: a pooled session, time limits, a bounded reply.

The only file that asks providers for embeddings. A transport is bound to one origin, and the key
in its headers goes nowhere else: redirects are not followed, and headers come from a list.
"""

import asyncio
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Self

import aiohttp

from .base import Context, DeadlineExceeded, Unreachable, UpstreamFault, UpstreamTimeout
from .limits import Timeouts


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer of an upstream."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class Transport:
    """Sends JSON to one origin. Open it with `async with`; it may be used many times at once."""

    def __init__(
        self,
        provider: str,
        base_url: str,
        headers: Mapping[str, str],
        timeouts: Timeouts,
        connections: int = 64,
    ) -> None:
        self._provider = provider
        self._base_url = base_url.rstrip("/")
        self._headers = {**headers, "Content-Type": "application/json"}
        self._timeouts = timeouts
        self._connections = connections
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
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._connections, ttl_dns_cache=60),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers=self._headers,
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
        except (aiohttp.ClientError, OSError):
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
        """POST `payload` and return the whole reply, of at most `limit` bytes, any status.

        `headers` are sent with this call alone, beside those of all calls.
        Raises DeadlineExceeded when the request's time is up, UpstreamTimeout when this attempt's
        is, or the reply does not begin in time or arrives too slowly, Unreachable when there is no
        connection or it was cut, UpstreamFault for a reply beyond `limit` or a redirect.
        """
        now = asyncio.get_running_loop().time()
        left = None if context.deadline is None else context.deadline - now
        if left is not None and left <= 0:
            raise DeadlineExceeded("the time of the request was up before it could be sent")
        total = self._timeouts.total_s if left is None else min(self._timeouts.total_s, left)
        timeout = aiohttp.ClientTimeout(total=total, connect=min(self._timeouts.connect_s, total))
        try:
            async with AsyncExitStack() as stack:
                session = await stack.enter_async_context(self._lend())
                request = session.post(
                    self._base_url + path,
                    data=payload,
                    headers=headers,
                    allow_redirects=False,
                    timeout=timeout,
                )
                async with asyncio.timeout(self._timeouts.first_byte_s):
                    response = await stack.enter_async_context(request)
                if 300 <= response.status < 400:
                    raise UpstreamFault(self._provider, "answered with a redirect; not followed")
                body = await self._read(response, limit)
                return Reply(response.status, response.headers, body)
        except TimeoutError as error:
            taken = asyncio.get_running_loop().time() - now
            if left is not None and taken >= left:
                raise DeadlineExceeded("the time of the request was up") from error
            raise UpstreamTimeout(self._provider, f"no answer within {taken:.1f} s") from error
        except (aiohttp.ClientError, ssl.SSLError, OSError) as error:
            raise Unreachable(self._provider, reason(error)) from error

    async def _read(self, response: aiohttp.ClientResponse, limit: int) -> bytes:
        """Return the body, as long as it keeps coming; stop as soon as it passes `limit` bytes.

        What counts is the decompressed size.
        """
        window = self._timeouts.rate_window_s
        clock = asyncio.get_running_loop().time
        chunks: list[bytes] = []
        size = before = 0
        end = clock() + window
        while not response.content.at_eof():
            try:
                async with asyncio.timeout_at(end) as rest:
                    chunks.append(await response.content.readany())
                    size += len(chunks[-1])
            except TimeoutError:
                if not rest.expired():
                    raise
            if size > limit:
                raise UpstreamFault(self._provider, "the answer is far larger than expected")
            if clock() >= end:
                if size - before < self._timeouts.least_bytes_per_s * window:
                    raise UpstreamTimeout(self._provider, "the answer arrives too slowly")
                before, end = size, clock() + window
        return b"".join(chunks)


def reason(error: Exception) -> str:
    """Say what kind of failure it was, without addresses or headers."""
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "the host name does not resolve"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return "the TLS connection failed"
        case aiohttp.ClientConnectorError():
            return "the connection was refused"
        case _:
            return "the connection was cut"
