"""The response cache: whole responses, request heads, the hits of long requests, and JSON vectors.

A request that comes again byte for byte, its key included, was admitted, parsed and answered
before, and would be again: only whether the answer is still valid is checked each time. Of requests
that differ in their bodies alone, the head is known: who sends them, what for, and how responses
begin. So the connection answers such a body itself if nothing has to be awaited.

Requests are known by digests (SHA-256 with a secret of this process): neither texts nor keys are
kept here. For one thread: the event loop's.
"""

import asyncio
import hashlib
import re
import secrets
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol, TypeAlias

from aiohttp import web
from embedding_proxy.cache.cached_hit import Reusable
from embedding_proxy.providers import request_context, vector
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.errors import EmbeddingError
from embedding_proxy.providers.lru_cache import LRUCache
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.service.request import Client, EmbeddingRequest

from .openai_format import ResponseFormat

MAX_REQUEST = 1 << 16
"""Bytes of a request, head and body; longer ones are not looked up."""
MAX_RESPONSE = 1 << 18
"""Bytes of a response with what validates it; longer ones are not kept."""
_OVERHEAD = 1000
"""Bytes that a response takes beside its own: digest, tuples, usage, its place in the map."""
_INPUT_BYTES = 200
"""Bytes that each of its inputs takes: an address, a digest, a number, and their places."""
_ALIAS_BYTES = 370
"""Bytes that a digest or a JSON text takes beside its own: its key, and a place."""
_MAX_HEADS = 1 << 20
"""Bytes of all heads together."""
_OWN = frozenset(("date", "x-request-id"))
"""Headers that each response has of its own."""
_OF_THE_BODY = re.compile(r"(?i)x-(cache|embedding|tokens|request-id)|content-length|date$")
"""Headers that do not follow from the head of a request."""


class RequestContext(NamedTuple):
    """What the head of a request says."""

    caller: Client
    control: str
    """Its `Cache-Control`."""
    model: str | None
    """The model that its path named."""
    hops: tuple[str, ...] = ()
    """The proxies that it has passed (`upstream.hops`)."""
    traceparent: str = ""
    lines: bytes = b""
    """How all responses to such a head begin: status line and headers, each with its CRLF."""


class CachedResponse(NamedTuple):
    """A response without what each has of its own: the time and an id."""

    head: bytes
    """From the status line on; each line ends with CRLF."""
    body: bytes
    reuse: Callable[[], bool] | None
    """Tells whether the response is still valid, and if so, counts it (`cache.cached_hit`).

    None for a response that is given once and not kept.
    """
    inputs: int = 1


class Hits(NamedTuple):
    """What a request is answered with whose inputs are all cached, without the vectors."""

    form: ResponseFormat
    headers: Mapping[str, str]
    cached_hit: Reusable | None
    """Answers the same request again; None if that needs a new look-up."""
    inputs: int
    rendered: bytes = b""
    """The whole body of the response; empty if it is not kept."""
    reuse: Callable[[], bool] | None = None
    """As in a `CachedResponse`, for `rendered`."""


Kept: TypeAlias = CachedResponse | Hits | bytes
"""Bytes are the digest of the request that was first to ask for the same, or a JSON text."""


@dataclass(slots=True)
class RequestKey:
    """What a request is known by."""

    head: bytes
    """Digest of its head without the length of the body."""
    whole: bytes
    """Digest of that and the body; empty if there is no room for any response."""
    embedding_request: EmbeddingRequest | None = None
    """What its body asks for, as far as that was found out."""
    handler: "EmbeddingHandler | None" = None
    """What has found that out: another one may look elsewhere."""
    context: RequestContext | None = None
    """What its head says, if that is known."""
    start: float = 0.0
    """When its answer began, on the clock of `perf_counter`; 0 = by aiohttp."""
    request_id: str = ""
    failure: Exception | None = None
    """What that answer has failed with; its handler is to raise it."""

    @property
    def is_parsed(self) -> bool:
        """Whether its inputs are known and were looked up: then aiohttp need not read it."""
        request = self.embedding_request
        return request is not None and request.lookup is not None


class Answer(NamedTuple):
    """The answer to a request, and what its line in the log says."""

    response: CachedResponse
    model: str
    headers: Mapping[str, str]
    """Those of its own that the response has."""
    usd: float
    """What it was billed, in US dollars."""


class EmbeddingHandler(Protocol):
    """Answers embedding requests of which aiohttp has not read anything. Raises EmbeddingError."""

    def parse_sync(self, body: bytes, context: RequestContext) -> tuple[EmbeddingRequest, bytes]:
        """Return what a body asks for, and the bytes of all in it that decides the answer.

        No bytes if it is too much to be answered at once.
        """

    def handle_sync(
        self, embedding_request: EmbeddingRequest, context: RequestContext
    ) -> CachedResponse | None:
        """Return the answer, counted; None if something has to be awaited, and nothing is done."""

    async def handle(
        self,
        embedding_request: EmbeddingRequest,
        context: RequestContext,
        is_connected: Callable[[], bool],
    ) -> Answer:
        """Answer a request; `is_connected` tells whether the client still waits."""


CONTEXT = web.RequestKey("context", RequestContext)
"""Set on a request that was answered well, if its head says the same whenever it comes."""
REUSE: web.RequestKey[tuple[Callable[[], bool], int]] = web.RequestKey("reuse")
"""Set on a request whose response may be given again: `reuse`, and its number of inputs."""


def header_lines(headers: Iterable[tuple[str, str]]) -> bytes:
    """Return headers as they are written, each with its CRLF."""
    return "".join([f"{name}: {value}\r\n" for name, value in headers]).encode()


class ResponseCache:
    """Responses of at most `max_bytes` by request, and what is known of heads."""

    def __init__(
        self, max_bytes: int, *, is_enabled: bool = True, max_body: int = MAX_REQUEST
    ) -> None:
        """`is_enabled` is `server.fast_path`: whether responses may be given again at all.

        `max_body` is how many bytes the body of a request may have.
        """
        self.is_enabled = is_enabled
        self.max_body = max_body
        self.handler: EmbeddingHandler | None = None
        # A whole block, which is hashed once. Nobody is shown a digest, to lengthen its request.
        self._hash = hashlib.sha256(secrets.token_bytes(64))
        self.lru = LRUCache[Hashable, Kept](max_bytes, _size)
        """Everything that is kept but heads, by digest; JSON texts by their vectors."""
        self.heads = LRUCache[bytes, RequestContext](
            _MAX_HEADS, lambda _, context: len(context.lines) + _OVERHEAD
        )

    def hash(self) -> "hashlib._Hash":
        """Return a digest of nothing yet, for a request that is hashed in parts."""
        return self._hash.copy()

    def forget(self) -> None:
        """Find nothing that was kept so far: who sent it may not be let in any more.

        Nor is found what requests lead to that have begun: they are known by digests of before.
        What was kept goes when its room is needed.
        """
        self._hash = hashlib.sha256(secrets.token_bytes(64))

    def key(self, head: bytes, body: bytes) -> RequestKey:
        """Return what a request is known by; `head` without the length of the body."""
        digest = self._hash.copy()
        digest.update(head)
        of_head = digest.digest()
        if not self.lru.max_size:
            return RequestKey(of_head, b"")
        digest.update(b"\r\n\r\n" + body)
        return RequestKey(of_head, digest.digest())

    def get(self, key: RequestKey, body: bytes) -> CachedResponse | None:
        """Return the response to give, already counted; None if aiohttp has to read the request."""
        if key.whole and (response := self.find(key.whole)) is not None:
            return response
        context = self.heads.get(key.head)
        if context is None or self.handler is None:
            return None
        try:
            request, essence = self.handler.parse_sync(body, context)
            key.embedding_request, key.context, key.handler = request, context, self.handler
            handle = partial(self.handler.handle_sync, request, context)
            return self._answer(key, essence, handle) if essence else None
        except EmbeddingError:
            return None  # It is raised again where the client is told.

    async def answer(self, key: RequestKey, is_connected: Callable[[], bool]) -> Answer:
        """Return the answer to a parsed request that `get` gave none to. Raises EmbeddingError."""
        request, context, handler = key.embedding_request, key.context, key.handler
        if request is None or context is None or handler is None:
            raise RuntimeError("a request whose head is not known has to be read by aiohttp")
        request_context.request_id.set(key.request_id)
        request_context.traceparent.set(context.traceparent)
        hops.enter(context.hops)
        answer = await handler.handle(request, context, is_connected)
        if key.whole:
            self.put(key.whole, answer.response)
        return answer

    def _answer(
        self, key: RequestKey, essence: bytes, handle: Callable[[], CachedResponse | None]
    ) -> CachedResponse | None:
        if not key.whole:
            return handle()
        # Bodies that ask for the same in other words have one answer.
        digest = self._hash.copy()
        digest.update(key.head + essence)
        answer = digest.digest()
        first = self.lru.get(answer)
        if isinstance(first, bytes) and (response := self.find(first)) is not None:
            self.lru[key.whole] = first
            return response
        response = handle()
        if response is not None and self.put(key.whole, response):
            self.lru[answer] = key.whole
        return response

    def find(self, digest: bytes) -> CachedResponse | None:
        """Return the valid response that is kept under a digest, counted; None if there is none.

        What is kept may be the digest of the request that was first to ask for the same.
        """
        kept = self.lru.get(digest)
        if isinstance(kept, bytes):
            kept = self.lru.get(kept)
        if isinstance(kept, CachedResponse) and kept.reuse is not None and kept.reuse():
            return kept
        self.lru.pop(digest)
        return None

    def put(self, digest: bytes, response: CachedResponse) -> bool:
        """Keep a response, unless it is long or given just once; return whether it is kept."""
        is_kept = response.reuse is not None and _size(digest, response) <= MAX_RESPONSE
        if is_kept:
            self.lru[digest] = response
        return is_kept

    def learn(self, key: RequestKey, request: web.BaseRequest, response: web.Response) -> None:
        """Keep what may be kept of a good response that a handler made."""
        status = f"HTTP/1.1 {response.status} {response.reason}\r\n".encode()
        headers, body = response.headers.items(), response.body
        reuse = request.get(REUSE)
        if reuse is not None and isinstance(body, bytes):
            lines = header_lines((k, v) for k, v in headers if k.lower() not in _OWN)
            self.put(key.whole, CachedResponse(status + lines, body, *reuse))
        context = request.get(CONTEXT)
        if context is not None:
            lines = header_lines((k, v) for k, v in headers if not _OF_THE_BODY.match(k))
            self.heads[key.head] = context._replace(lines=status + lines)


def _size(key: Hashable, kept: Kept) -> int:
    """Return the bytes that something kept takes, with its key."""
    if isinstance(kept, bytes):
        return len(kept) + (len(key[1]) if isinstance(key, tuple) else 0) + _ALIAS_BYTES
    size = _INPUT_BYTES * kept.inputs + _OVERHEAD
    if isinstance(kept, Hits):
        return size + len(kept.rendered)
    return size + len(kept.head) + len(kept.body)


class HitCache:
    """Hits by the digests of requests that are too long to be kept with their responses.

    The entries are looked up each time; nothing is parsed or hashed but the body as a whole.
    """

    MIN_BODY = 1 << 10
    """Bytes; shorter bodies are parsed as quickly."""
    _PIECE = 1 << 18
    """Bytes of a body that are hashed at a time: some fraction of a millisecond's work."""
    _MAX_SHARE = 0.25
    """Of all that is kept, that one rendered body may take."""

    def __init__(self, responses: ResponseCache) -> None:
        self._responses = responses

    async def digest(
        self, body: bytes, caller: Client, control: str, model: str | None
    ) -> bytes | None:
        """Return what a request is known by: all that decides its answer.

        None if the body is short, or responses are not given again.
        """
        if len(body) < self.MIN_BODY or not self._responses.is_enabled:
            return None
        parts = [caller.namespace, caller.client, caller.api_key, control, model or ""]
        head = "".join(f"{len(part)}:{part}" for part in parts)
        digest = self._responses.hash()
        digest.update(head.encode(errors="surrogateescape"))
        rest = memoryview(body)
        while len(rest) > self._PIECE:
            digest.update(rest[: self._PIECE])
            rest = rest[self._PIECE :]
            await asyncio.sleep(0)
        digest.update(rest)
        return digest.digest()

    async def get(self, digest: bytes | None) -> tuple[Hits, Sequence[Vector]] | None:
        """Return hits and their vectors, already counted; None if they have to be looked up.

        There are no vectors if `rendered` is the whole body. If they come again, they are rendered
        and kept so, if there is room.
        """
        hits = self._responses.lru.get(digest) if digest else None
        if not isinstance(hits, Hits) or hits.cached_hit is None:
            return None
        if hits.reuse is not None and hits.reuse():
            return hits, ()
        vectors = await hits.cached_hit.vectors()
        if vectors is None:
            self._responses.lru.pop(digest)
            return None
        return hits._replace(rendered=b"", reuse=None), vectors

    def has_room(self, hits: Hits) -> bool:
        """Tell whether the whole body of a response may be kept."""
        length = hits.form.length(hits.inputs)
        if length is None or hits.inputs <= hits.form.vectors_a_chunk:
            return False
        return length <= self._responses.lru.max_size * self._MAX_SHARE

    def put(self, digest: bytes | None, hits: Hits) -> None:
        """Keep hits that can be given again."""
        if digest is not None and hits.cached_hit is not None:
            self._responses.lru[digest] = hits


class JSONVectorCache:
    """Writes vectors as JSON, and keeps the text: to write 1536 numbers takes 20 times a copy.

    A text depends on nothing but its vector, so none is ever invalid.
    """

    def __init__(self, responses: ResponseCache) -> None:
        self._lru = responses.lru

    def json(self, one: Vector) -> bytes:
        """Return a vector as a JSON array, see `vector.to_json`.

        For vectors that are themselves kept: Python hashes bytes once, and finds the same ones by
        their identity.
        """
        key = ("text", one)
        text = self._lru.get(key)
        if not isinstance(text, bytes):
            text = self._lru[key] = vector.to_json(one)
        return text
