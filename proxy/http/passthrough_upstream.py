"""The upstream of passed-through calls: its address, its key, the headers of both directions.

All headers are passed on but those that are listed here: applications and SDKs use headers that
nobody can foresee. (Upstream calls for embeddings are the opposite: they are built from a list.)
"""

import logging
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, Self
from urllib.parse import unquote

import aiohttp
import orjson
from aiohttp import web
from embedding_proxy.providers import descriptors
from embedding_proxy.providers.errors import (
    EmbeddingError,
    InvalidRequest,
    NoRoute,
    OutOfDescriptors,
    Unreachable,
    UpstreamTimeout,
)
from embedding_proxy.providers.network import BaseUrl
from embedding_proxy.providers.redaction import Redactor
from embedding_proxy.providers.upstream import hops
from embedding_proxy.providers.upstream.content_encoding import (
    ACCEPT_ENCODING,
    DecodeError,
    Decoder,
)
from embedding_proxy.providers.upstream.retry_after import client_header
from embedding_proxy.providers.upstream.transport import PROXY_CREDENTIALS_REFUSED, failure_reason
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.http.target import path_of
from embedding_proxy.proxy.service.provider_factory import check_network, key_of
from multidict import CIMultiDict, CIMultiDictProxy
from yarl import URL

from .auth import KEY_HEADERS, Authenticator

log = logging.getLogger("embedding_proxy.passthrough")

PREFIXES = ("/v1", "/api/v1", "/openai/v1")
"""What stands for the base URL in the paths of clients: OpenAI's, OpenRouter's and Azure's."""
# Of one connection, not of the message (RFC 9110, 7.6.1).
_HOP_BY_HOP = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authentication-info",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
# Meant for this proxy, or telling of who and what stands before it.
_NOT_FORWARDED = _HOP_BY_HOP | {
    *KEY_HEADERS,
    "authorization",
    "cookie",
    "expect",
    "forwarded",
    "host",
    "origin",
    "referer",
    "true-client-ip",
    "via",
    "x-goog-api-key",
    "x-real-ip",
}
_NOT_FORWARDED_BEGINNINGS = (
    "access-control-",
    "cf-",
    "sec-fetch-",
    "sec-websocket-",
    "x-forwarded-",
)
# What an upstream says of its own origin would here be said of ours.
_NOT_RETURNED = _HOP_BY_HOP | {"alt-svc", "strict-transport-security"}
# x-accel- begins orders to the upstream's own reverse proxy, which one before us would obey.
_NOT_RETURNED_BEGINNINGS = ("access-control-", "x-accel-")
_LIST_SECONDS = 3.0
_LIST_BYTES = 1 << 24


class ReplyLost(aiohttp.ClientConnectionError):
    """A call was sent, and its connection ended before the reply; the cause says how."""


async def _send_once(
    request: aiohttp.ClientRequest, handler: aiohttp.ClientHandlerType
) -> aiohttp.ClientResponse:
    """Send a call. aiohttp would send some methods again over a stale connection.

    Whether to is the client's. aiohttp's middleware, which knows errors of other kinds as final.
    """
    try:
        return await handler(request)
    except aiohttp.ClientConnectorError:
        raise
    except (aiohttp.ClientOSError, aiohttp.ServerDisconnectedError) as error:
        raise ReplyLost(*error.args) from error


class PassthroughUpstream:
    """One origin that calls are passed to. Open it with `async with`.

    Its key, or the client's, is sent there and nowhere else: no redirect is followed.
    """

    def __init__(self, settings: Settings, access: Authenticator) -> None:
        """Look up the key. Raises ConfigError, and ValueError if calls are passed to nobody."""
        entry = settings.passthrough_provider
        if entry is None or settings.passthrough is None:
            raise ValueError("calls are passed to nobody")
        self.name = settings.passthrough
        self._profile = entry.as_profile()
        self._base_url = (self._profile.base_url or "").rstrip("/")
        self._base = BaseUrl(self._base_url)
        self._variable = entry.key_variable
        self._key = key_of(settings, self.name)
        self.redactor = Redactor(*self._profile.secrets(self._key))
        """Removes the provider's key from what its upstream says."""
        check_network(settings, self.name)
        self._by_client = settings.passthrough_auth == "client" or entry.uses_client_key
        self._access = access
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Self:
        timeouts = self._profile.timeouts
        self._session = self._profile.network.open_session(
            self._base_url,
            connections=0,
            middlewares=(_send_once,),
            skip_auto_headers=("Accept", "Accept-Encoding", "Content-Type", "User-Agent"),
            timeout=aiohttp.ClientTimeout(total=None, connect=timeouts.connect_s),
        )
        if self._variable is None or self._key or self._by_client:
            log.info("calls that are not ours are passed to %s", self.name)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session is not None:
            await self._session.close()

    @property
    def session(self) -> aiohttp.ClientSession:
        """What sends calls; it adds no header, decompresses nothing, and repeats nothing."""
        if self._session is None:
            raise RuntimeError("the origin is not open")
        return self._session

    def address(self, request: web.Request) -> URL:
        """Return where a call goes: the path and the query, byte for byte, below the base URL.

        Raises HTTPNotFound for a path that leads out from there.
        """
        # A client that takes this for a forward proxy sends the whole address.
        target = path_of(request.raw_path)
        prefix = next(
            (candidate for candidate in PREFIXES if target.startswith(candidate + "/")), ""
        )
        path = target.partition("?")[0]
        segments = set(re.split(r"[/\\]", unquote(path)))
        if not target.isascii() or segments & {".", ".."}:
            raise web.HTTPNotFound
        return self._base.join(target.removeprefix(prefix))

    def headers(self, request: web.Request, url: URL) -> CIMultiDict[str]:
        """Return what is sent of a call's headers to an address, and the key.

        Raises EmbeddingError, and ForeignOrigin for an address that is not the provider's.
        """
        self._base.verify(url)
        own = {**self._profile.headers, **self._credentials(request), **hops.headers()}
        return request_headers(request.headers, own)

    def _credentials(self, request: web.Request) -> Mapping[str, str]:
        name = self._profile.key_header
        if self._by_client:
            names = dict.fromkeys(("Authorization", name))
            sent = {
                header: request.headers[header] for header in names if header in request.headers
            }
            own = {
                header: value for header, value in sent.items() if not self._access.is_ours(value)
            }
            if not own and (key := self._access.own_key(request.headers)):
                # In the form of another provider's clients, say Azure's.
                own = {name: self._profile.key_prefix + key}
            if sent and not own:
                raise InvalidRequest(
                    f"This call is passed to {self.name} with your own key: send that in the header"
                    f" `{name}`, and this proxy's key in `x-proxy-key`.",
                    status=401,
                    code="invalid_api_key",
                )
            return own
        if self._key:
            return {name: self._profile.key_prefix + self._key}
        if self._variable:
            raise NoRoute(
                f"This call is passed to {self.name}, which has no key: set {self._variable} and"
                f" start the proxy again."
            )
        return {}

    def may_forward(self, secret: str) -> bool:
        """Tell whether a key that a client gives in another place may be sent on."""
        return self._by_client and not self._access.is_ours(secret)

    def failure(self, error: Exception) -> EmbeddingError:
        """Return what a client is told when the origin could not be asked."""
        if isinstance(error, ReplyLost) and isinstance(error.__cause__, Exception):
            error = error.__cause__
        if isinstance(error, TimeoutError):
            address = self._profile.network.address_of(self._base_url)
            seconds = self._profile.timeouts.connect_s
            return UpstreamTimeout(
                self.name, f"connection timed out to {address}, after {seconds:.1f} s"
            )
        if descriptors.is_cause(error):
            descriptors.warn(f"no connection to {self.name} can be made")
            return OutOfDescriptors()
        return Unreachable(self.name, failure_reason(error))

    def check_reply(self, reply: aiohttp.ClientResponse) -> aiohttp.ClientResponse:
        """Return a reply of the upstream. Raises Unreachable for one of an HTTP proxy."""
        if reply.status == 407:
            reply.close()
            raise Unreachable(self.name, PROXY_CREDENTIALS_REFUSED)
        return reply

    async def models(self, request: web.Request) -> list[dict[str, Any]]:
        """Return the models that the origin lists; none if it does not do so, and soon."""
        failures = (EmbeddingError, aiohttp.ClientError, OSError, ssl.SSLError, ValueError)
        with suppress(*failures, DecodeError):
            headers = {
                **self._profile.headers,
                **self._credentials(request),
                **hops.headers(),
                "Accept": "application/json",
                "Accept-Encoding": ACCEPT_ENCODING,
            }
            async with self.session.get(
                self._base.join("/models"),
                headers=headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=_LIST_SECONDS),
            ) as reply:
                decoder = Decoder(reply.headers.get("Content-Encoding", ""))
                body = b""
                async for chunk in reply.content.iter_any():
                    for piece in decoder.feed(chunk):
                        body += piece
                        if len(body) > _LIST_BYTES:
                            return []
                body += b"".join(decoder.finish())
                passing = self.redactor.stream()
                body = passing.feed(body) + passing.finish()
                return _listed_models(body) if reply.status == 200 else []
        return []


def _listed_models(body: bytes) -> list[dict[str, Any]]:
    """Return the models in a list of OpenAI's shape. Raises ValueError."""
    content = orjson.loads(body)
    data = content.get("data") if isinstance(content, dict) else None
    models = data if isinstance(data, list) else []
    return [
        model for model in models if isinstance(model, dict) and isinstance(model.get("id"), str)
    ]


def request_headers(headers: CIMultiDictProxy[str], own: Mapping[str, str]) -> CIMultiDict[str]:
    """Return what an upstream is sent of a client's headers, and `own` in place of its like."""
    forwarded = _filter_headers(headers, _NOT_FORWARDED, _NOT_FORWARDED_BEGINNINGS)
    for name, value in own.items():
        forwarded[name] = value
    return forwarded


def reply_headers(headers: CIMultiDictProxy[str], now: float | None = None) -> CIMultiDict[str]:
    """Return what a client is sent of an upstream's headers; waits are bounded.

    `now` is the present time in seconds since 1970.
    """
    now = time.time() if now is None else now
    returned = _filter_headers(headers, _NOT_RETURNED, _NOT_RETURNED_BEGINNINGS)
    rewritten = (
        (name, client_header(name.lower(), value, now)) for name, value in returned.items()
    )
    return CIMultiDict((name, value) for name, value in rewritten if value is not None)


def _filter_headers(
    headers: CIMultiDictProxy[str], unwanted: frozenset[str], beginnings: tuple[str, ...]
) -> CIMultiDict[str]:
    # A message may name further ones that are of its connection.
    named = set(_split_names(headers.getall("Connection", ())))
    return CIMultiDict(
        (name, value)
        for name, value in headers.items()
        if (lower := name.lower()) not in unwanted
        and lower not in named
        and not lower.startswith(beginnings)
    )


def _split_names(values: Iterable[str]) -> Iterable[str]:
    return (part.strip().lower() for value in values for part in value.split(","))
