"""One attempt at one upstream over HTTP: a pooled session, time limits, a bounded, decoded reply.

The only module that sends embedding calls to providers. A transport is bound to one origin, and the
key in its headers goes nowhere else: redirects are not followed, and headers come from a list.

`failure_reason` says in one line why a call failed: which step, and which host. It shows hosts and
ports, but no URLs, headers and credentials. The texts of aiohttp's own errors hold them, so it
repeats none of these.
"""

import asyncio
import errno
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Self

import aiohttp
from aiohttp.abc import AbstractStreamWriter
from embedding_proxy.providers import descriptors, request_context
from embedding_proxy.providers.attempts import EXTRA_SHARE, Attempt
from embedding_proxy.providers.base import Context
from embedding_proxy.providers.errors import (
    ConnectionTimeout,
    DeadlineExceeded,
    EmbeddingError,
    LoopDetected,
    OutOfDescriptors,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.histogram import Histogram
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.network import BaseUrl, ForeignOrigin, Network
from embedding_proxy.providers.profile import Timeouts
from yarl import URL

from . import hops
from .content_encoding import ACCEPT_ENCODING, PIECE, DecodeError, Decoder

PROXY_CREDENTIALS_REFUSED = "HTTP proxy: it refuses the credentials, or wants some (407)"
_DIRECT = Network()
_MAX_URLS = 100


@dataclass(frozen=True, slots=True)
class Reply:
    """A complete reply of an upstream."""

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

        With a limit, the caller must not let a call wait for a connection: that time counts as the
        provider's.
        """
        self._provider = provider
        self._base_url = base_url.rstrip("/")
        self._base = BaseUrl(base_url)
        fixed = {"Accept-Encoding": ACCEPT_ENCODING, "Content-Type": "application/json"}
        self._headers = {**headers, **fixed}
        self._timeouts = timeouts
        self._connections = connections
        self._network = network
        self._urls = LRUCache[str, URL](_MAX_URLS)
        """The verified address of each path."""
        self._connect_timeout = aiohttp.ClientTimeout(
            total=None, connect=min(timeouts.connect_s, timeouts.total_s)
        )
        self._session: aiohttp.ClientSession | None = None
        self._under_way: Counter[aiohttp.ClientSession] = Counter()
        self.durations = Histogram()
        """How long each call took, to the end of its reply or its failure."""

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

    async def _return(self, session: aiohttp.ClientSession, error: BaseException | None) -> None:
        """Note the end of a call; if its connection was cut, later calls get a new session.

        If one kept connection is stale all may be, and a retry needs a fresh one.
        """
        is_own = isinstance(error, TimeoutError | aiohttp.ClientConnectorError | ssl.SSLError)
        is_cut = isinstance(error, aiohttp.ClientError | OSError | Unreachable) and not is_own
        if is_cut and self._session is session:
            self._session = self._open()
        self._under_way[session] -= 1
        if not self._under_way[session]:
            del self._under_way[session]
            if session is not self._session:
                await session.close()

    async def post(  # noqa: PLR0913, PLR0917 - what is sent, and who is told
        self,
        path: str,
        payload: bytes,
        limit: int,
        context: Context,
        headers: Mapping[str, str] | None = None,
        on_sent: Callable[[], None] | None = None,
    ) -> Reply:
        """POST `payload` and return the whole reply, decoded, of at most `limit` bytes, any status.

        `headers` are sent with this call alone, beside those of all calls. `on_sent` is called when
        it was sent: what it does takes no time of those who wait for the upstream.
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
        time_left = None if context.deadline is None else context.deadline - now
        if time_left is not None and time_left <= 0:
            raise DeadlineExceeded("the time of the request was up before it could be sent")
        session = self._session
        if session is None:
            raise RuntimeError("the transport is not open")
        total = self._timeouts.total_s
        longest = total * (1 + EXTRA_SHARE)
        timeout = self._connect_timeout
        if time_left is not None and not context.finishes_calls:
            total, longest = min(total, time_left), min(longest, time_left)
            connect = min(self._timeouts.connect_s, total)
            timeout = aiohttp.ClientTimeout(total=None, connect=connect)
        first_byte = min(self._timeouts.first_byte_s or total, total)
        attempt = context.attempt or Attempt()
        attempt.begin(now)
        self._under_way[session] += 1
        failure: BaseException | None = None
        try:
            async with asyncio.timeout_at(now + first_byte):
                response = await session.post(
                    # No call leaves this address, so the session's guard has nothing to verify.
                    self._urls.get_or_make(path, partial(self._base.join, path)),
                    data=_Payload(payload, attempt, on_sent),
                    headers={**(headers or {}), **hops.headers(), **request_context.headers()},
                    allow_redirects=False,
                    middlewares=(),
                    timeout=timeout,
                )
            async with response:
                attempt.has_reply = True
                attempt.note_life(asyncio.get_running_loop().time())
                self._check_status(response.status)
                body = await self._read(response, limit, now + longest)
            return Reply(response.status, response.headers, body)
        except (TimeoutError, aiohttp.ClientError, ssl.SSLError, OSError) as error:
            failure = error
            raise self._error(error, now, None if context.finishes_calls else time_left) from error
        except Unreachable as error:
            failure = error
            raise
        finally:
            self.durations.observe(asyncio.get_running_loop().time() - now)
            attempt.end()
            await self._return(session, failure)

    def _error(self, error: BaseException, since: float, time_left: float | None) -> EmbeddingError:
        """Return what a call fails with that had so many seconds left, None = any number."""
        if isinstance(error, TimeoutError):
            taken = asyncio.get_running_loop().time() - since
            if time_left is not None and taken >= time_left:
                return DeadlineExceeded("the time of the request was up")
            if isinstance(error, aiohttp.ConnectionTimeoutError):
                address = self._network.address_of(self._base_url)
                why = f"connection timed out to {address}, after {taken:.1f} s"
                return ConnectionTimeout(self._provider, why)
            return UpstreamTimeout(self._provider, f"no answer within {taken:.1f} s")
        if descriptors.is_cause(error):
            descriptors.warn(f"no connection to {self._provider} can be made")
            return OutOfDescriptors()
        kind = UpstreamError if is_final(error) else Unreachable
        return kind(self._provider, failure_reason(error))

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

    async def _read(self, response: aiohttp.ClientResponse, limit: int, deadline: float) -> bytes:
        """Return the decoded body, as long as it keeps coming; stop as soon as it passes `limit`.

        Both sizes are bounded, the sent and the decoded one. Between the pieces of a chunk that
        decodes to many, the event loop runs. A body that cannot be decoded is empty where the
        status says what is wrong. Raises UpstreamError, UpstreamTimeout, Unreachable, and
        TimeoutError at `deadline`, a point on the event loop's clock.
        """
        content = response.content
        window = self._timeouts.min_rate_window_s
        clock = asyncio.get_running_loop().time
        decoder = Decoder(response.headers.get("Content-Encoding", ""))
        body = _Body(self._provider, limit)
        received = before = 0
        end = clock() + window
        try:
            while not content.at_eof():
                chunk = content.read_nowait() or await _wait_for(content, min(end, deadline))
                received += len(chunk)
                body.check(received)
                await body.take(decoder.feed(chunk))
                now = clock()
                if now >= deadline:
                    raise TimeoutError
                if now >= end:
                    if received - before < self._timeouts.min_bytes_per_s * window:
                        raise UpstreamTimeout(self._provider, "the answer arrives too slowly")
                    before, end = received, now + window
            await body.take(decoder.finish())
        except DecodeError as error:
            if response.status >= 400:
                return b""
            raise UpstreamError(self._provider, str(error)) from error
        except (aiohttp.ClientError, ConnectionError, ssl.SSLError) as error:
            raise Unreachable(self._provider, failure_reason(error, received)) from error
        return b"".join(body.pieces)


async def _wait_for(content: aiohttp.StreamReader, until: float) -> bytes:
    """Return what comes next of a body; nothing if that is not there at a point in time."""
    try:
        async with asyncio.timeout_at(until) as limit:
            return await content.readany()
    except TimeoutError:
        if not limit.expired():
            raise
        return b""


class _Payload(aiohttp.BytesPayload):
    """The body of a request; it notes when it is sent: until then the upstream charges nothing."""

    def __init__(
        self, value: bytes, attempt: Attempt, on_sent: Callable[[], None] | None = None
    ) -> None:
        super().__init__(value)
        self._attempt = attempt
        self._on_sent = on_sent

    async def write_with_length(
        self, writer: AbstractStreamWriter, content_length: int | None
    ) -> None:
        self._attempt.is_sent = True
        if self._on_sent is not None:
            asyncio.get_running_loop().call_soon(self._on_sent)
            self._on_sent = None
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


_NO_SUCH_HOST = {
    getattr(socket, name)
    for name in ("EAI_NONAME", "EAI_NODATA", "EAI_ADDRFAMILY")
    if hasattr(socket, name)
}
_NO_ROUTE = {errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN}

# OpenSSL's X509_V_ERR_…: the reasons that an operator can do something about.
_CERTIFICATE = {
    9: "it is not valid yet",
    10: "it has expired",
    18: "it is self-signed",
    19: "its chain ends in a self-signed certificate that is not trusted",
    20: "its issuer is not known",
    21: "its issuer is not known",
    62: "it is for another host name",
    64: "it is for another IP address",
}
_UNKNOWN_ISSUER = {18, 19, 20, 21}


def failure_reason(  # noqa: C901, PLR0911, PLR0912 - one case for each kind of failure
    error: BaseException, received: int | None = None
) -> str:
    """Return in one line, without a final stop, why a call failed.

    `received` is how many bytes of the reply's body had arrived; None = not even its headers.
    """
    if received is not None:
        return f"reply broke off after {received:,} bytes"
    match error:
        case ForeignOrigin():
            return f"the call was not sent: {error}"
        case aiohttp.ClientConnectorCertificateError():
            return _certificate(error.certificate_error, _address(error))
        case aiohttp.ClientConnectorSSLError():
            return _tls(error, _address(error))
        case aiohttp.ClientConnectorDNSError():
            if error.os_error.errno in _NO_SUCH_HOST:
                return f"no such host: {error.host}"
            return f"the host name {error.host} could not be resolved"
        case aiohttp.ClientProxyConnectionError():
            return f"HTTP proxy: {_connect(error)}"
        case aiohttp.ClientConnectorError():
            return _connect(error)
        case aiohttp.ClientHttpProxyError(status=407):
            return PROXY_CREDENTIALS_REFUSED
        case aiohttp.ClientHttpProxyError():
            return f"HTTP proxy: the tunnel was refused with status {error.status}"
        case aiohttp.ClientResponseError():
            return _not_http(error.message)
        case aiohttp.ServerDisconnectedError():
            return "server disconnected without an answer"
        case ssl.SSLCertVerificationError():
            return _certificate(error, "")
        case ssl.SSLError():
            return _tls(error, "")
        case aiohttp.ClientPayloadError():
            return "reply broke off"
        case TimeoutError():
            return "timed out"
        case OSError():
            return _lost(error)
        case _:
            return "connection failed"


def is_final(error: BaseException) -> bool:
    """Tell whether the same call would fail again in the same way.

    So it is where the headers of a reply are larger than aiohttp takes (and each such reply is
    charged), where an HTTP proxy wants other credentials, and where a call would leave its origin.
    """
    if isinstance(error, ForeignOrigin):
        return True
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return error.status == 407
    return isinstance(error, aiohttp.ClientResponseError) and _is_oversize(error.message)


def _is_oversize(message: str) -> bool:
    return message.startswith(("Got more than", "Too many headers"))


def _address(error: aiohttp.ClientConnectorError) -> str:
    host = error.host
    return f"{f'[{host}]' if ':' in host else host}:{error.port}"


def _connect(error: aiohttp.ClientConnectorError) -> str:
    """Say why there is no TCP connection."""
    number, address = error.os_error.errno, _address(error)
    if number == errno.ECONNREFUSED or "refused" in str(error.os_error).lower():
        return f"connection refused by {address}"
    if number == errno.ETIMEDOUT:
        return f"connection timed out to {address}"
    if number in _NO_ROUTE:
        return f"no route to {address}"
    if number == errno.ECONNRESET:
        return f"connection reset by {address}"
    if number == errno.EMFILE:
        return f"no connection to {address}: too many open files (ulimit -n)"
    return f"no connection to {address}"


def _certificate(error: BaseException, address: str) -> str:
    code = getattr(error, "verify_code", None)
    why = _CERTIFICATE.get(code or 0) or getattr(error, "verify_message", "") or "it is not valid"
    remedy = "; name its CA in ca_file, if it is yours" if code in _UNKNOWN_ISSUER else ""
    where = f" ({address})" if address else ""
    return f"certificate not trusted: {why}{where}{remedy}"


def _tls(error: ssl.SSLError | aiohttp.ClientConnectorSSLError, address: str) -> str:
    source = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    why = str(getattr(source, "reason", None) or "").replace("_", " ").lower()
    to = f" with {address}" if address else ""
    if why in ("wrong version number", "record layer failure", "http request"):
        return f"TLS handshake failed{to}: the server does not speak TLS there"
    return f"TLS handshake failed{to}: {why}" if why else f"TLS handshake failed{to}"


def _not_http(message: str) -> str:
    """Say what is wrong with a reply that is no HTTP; what it holds is not quoted."""
    if _is_oversize(message):
        return "reply headers too large"
    first = (message.splitlines() or [""])[0].partition(":")[0].partition(" b'")[0].strip()
    if not first or first.startswith(("Bad status line", "Bad Request")):
        return "reply is not HTTP: bad status line"
    return f"reply is not valid HTTP: {first}"


def _lost(error: OSError) -> str:
    """Say how an open connection ended."""
    if isinstance(error, ConnectionResetError) or error.errno == errno.ECONNRESET:
        return "connection reset"
    if isinstance(error, BrokenPipeError) or error.errno == errno.EPIPE:
        return "connection closed while the request was sent"
    if error.errno == errno.ETIMEDOUT:
        return "connection timed out"
    return "connection lost"
