"""What is kept of responses: whole ones, what a head says, the hits of long requests, numbers.

A request that comes again byte for byte, its key included, was let in, understood and answered
before, and would be again: only whether the answer still holds is asked each time. And of requests
that differ in their bodies alone, all else is known: who sends it and whether that is let in, what
for, and how the response is to be sent; so a body is answered where nothing has to be waited for.

Requests are known by digests (SHA-256 behind a secret of this process), so that no text and no key
is kept here. For one thread: the event loop's.
"""

import asyncio
import hashlib
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from aiohttp import web
from embedding_proxy.cache.ledger import Reusable
from embedding_proxy.providers import vector
from embedding_proxy.providers.base import Vector
from embedding_proxy.proxy.service.request import Client, EmbeddingRequest

from .openai_format import ResponseFormat

MAX_REQUEST = 1 << 16
"""Bytes of a request, head and body; longer ones are not looked up."""
MAX_RESPONSE = 1 << 18
"""Bytes of a response with what tells whether it holds; longer ones are not kept."""
_OVERHEAD = 1000
"""What a response takes besides its bytes: digest, tuples, what counts it, its place in a map."""
_ALIAS_BYTES = 400
"""What a body takes that asks for what another asks for: two digests, and a place."""
_INPUT_BYTES = 200
"""What each of its inputs takes: an address, a digest, a number, and their places."""
_MAX_HEADS = 1 << 20
"""Bytes of all heads together."""
_OWN = frozenset(("date", "x-request-id"))
"""Headers that each response has of its own."""
_OF_THE_BODY = re.compile(r"(?i)x-(cache|embedding|tokens|request-id)|content-length|date$")
"""Headers that do not follow from the head of a request."""


class SizedLRU:
    """A map that is bounded in bytes, least recently used out first."""

    def __init__(self, max_bytes: int) -> None:
        """Keep nothing yet. What the bytes are of is up to those who keep something here."""
        self.max_bytes = max_bytes
        self._entries: OrderedDict[Hashable, tuple[Any, int]] = OrderedDict()
        self.size = 0
        """Bytes in use."""

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> Any:  # noqa: ANN401 - whatever was kept
        """Return what is kept under a key, and note that it was used; None if nothing is."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: Hashable, value: object, size: int) -> None:
        """Keep something of that many bytes, in place of what was there."""
        self.delete(key)
        if size > self.max_bytes:
            return
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self.max_bytes:
            self.delete(next(iter(self._entries)))

    def delete(self, key: Hashable) -> None:
        """Keep nothing under a key."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.size -= entry[1]


class RequestContext(NamedTuple):
    """What a head said of its request."""

    caller: Client
    control: str
    """Its `Cache-Control`."""
    model: str | None
    """The model that its path named."""


class SyncResponse(NamedTuple):
    """A response, but for what is said of it to every client alike. It is counted already."""

    headers: Mapping[str, str]
    body: bytes
    reuse: Callable[[], bool] | None
    """As in a `CachedResponse`; None for one that holds this once."""
    inputs: int


class SyncHandler(Protocol):
    """Answers what need not be waited for."""

    def parse_sync(
        self, body: bytes, context: RequestContext
    ) -> tuple[EmbeddingRequest, bytes] | None:
        """Return what a body asks for, and the bytes of all of that which decides the answer.

        None if more has to be done to answer it than can be done at once.
        """

    def handle_sync(self, asked: EmbeddingRequest, context: RequestContext) -> SyncResponse | None:
        """Return the answer, counted; None if there is more to do, and then nothing is done."""


class CachedResponse(NamedTuple):
    """A response, but for what each has of its own: the time, and an id."""

    head: bytes
    """From the status line on; each line ends with CRLF."""
    body: bytes
    reuse: Callable[[], bool] | None
    """Tells whether the response still holds, and if it does, counts it (`cache.cached_hit`)."""


class RequestKey(NamedTuple):
    """What a request is known by: digests."""

    head: bytes
    """Of its head but for the length of the body."""
    whole: bytes
    """Of that and the body."""


CONTEXT = web.RequestKey("context", RequestContext)
"""Set on a request that was answered well, if its head says the same whenever it comes."""
REUSE: web.RequestKey[tuple[Callable[[], bool], int]] = web.RequestKey("reuse")
"""Set on a request whose response may be given again: `reuse`, and its number of inputs."""


class _Head(NamedTuple):
    context: RequestContext
    lines: bytes
    """From the status line on, what all responses have in common."""


class ResponseCache:
    """Responses of at most `max_bytes` by request, and what is known of heads."""

    def __init__(self, max_bytes: int, *, is_enabled: bool = True) -> None:
        """`is_enabled` is `server.fast_path`: whether responses may be given again at all."""
        self.is_enabled = is_enabled
        self.handler: SyncHandler | None = None
        # A whole block, which is hashed once. Nobody is shown a digest, to lengthen its request.
        self._hash = hashlib.sha256(secrets.token_bytes(64))
        self.lru = SizedLRU(max_bytes)
        """Where they are kept, with whatever else was rendered."""
        self.heads = SizedLRU(_MAX_HEADS)

    def hash(self) -> "hashlib._Hash":
        """Return a digest of nothing yet, for a request that is taken in piece by piece."""
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
        digest.update(b"\r\n\r\n" + body)
        return RequestKey(of_head, digest.digest())

    def get(self, key: RequestKey, body: bytes) -> CachedResponse | None:
        """Return the response to give, already counted; None if the request has to be read."""
        response = self.find(key.whole)
        if response is not None:
            return response
        head: _Head | None = self.heads.get(key.head)
        if head is None or self.handler is None:
            return None
        parsed = self.handler.parse_sync(body, head.context)
        if parsed is None:
            return None
        # Bodies that ask for the same in other words have one answer.
        digest = self._hash.copy()
        digest.update(key.head + parsed[1])
        answer = digest.digest()
        first: bytes | None = self.lru.get(answer)
        response = None if first is None else self.find(first)
        if response is not None:
            self.lru.put(key.whole, first, _ALIAS_BYTES)
            return response
        found = self.handler.handle_sync(parsed[0], head.context)
        if found is None:
            return None
        lines = [f"{name}: {value}\r\n" for name, value in found.headers.items()]
        lines.append(f"Content-Length: {len(found.body)}\r\n")
        response = CachedResponse(head.lines + "".join(lines).encode(), found.body, found.reuse)
        self.put(key.whole, response, found.inputs)
        self.lru.put(answer, key.whole, _ALIAS_BYTES)
        return response

    def find(self, digest: bytes) -> CachedResponse | None:
        """Return what is kept under a digest, counted; None if nothing is, or it does not hold.

        What is kept of a body may be the digest of the one that asked first for the same.
        """
        kept: bytes | CachedResponse | None = self.lru.get(digest)
        response = self.lru.get(kept) if isinstance(kept, bytes) else kept
        if response is None or (response.reuse is not None and response.reuse()):
            return response
        self.lru.delete(digest)
        return None

    def put(self, digest: bytes, response: CachedResponse, inputs: int) -> None:
        """Keep a response, unless it is long, or holds just once."""
        if response.reuse is None:
            return
        size = len(response.head) + len(response.body) + _INPUT_BYTES * inputs + _OVERHEAD
        if size <= MAX_RESPONSE:
            self.lru.put(digest, response, size)

    def learn(self, key: RequestKey, request: web.BaseRequest, response: web.Response) -> None:
        """Keep what may be kept of a good response that a handler made."""
        status = f"HTTP/1.1 {response.status} {response.reason}\r\n"
        body, reuse = response.body, request.get(REUSE)
        if reuse is not None and isinstance(body, bytes):
            lines = [f"{k}: {v}\r\n" for k, v in response.headers.items() if k.lower() not in _OWN]
            head = "".join((status, *lines)).encode()
            self.put(key.whole, CachedResponse(head, body, reuse[0]), reuse[1])
        if CONTEXT in request:
            shared = (one for one in response.headers.items() if not _OF_THE_BODY.match(one[0]))
            text = "".join((status, *(f"{name}: {value}\r\n" for name, value in shared))).encode()
            self.heads.put(key.head, _Head(request[CONTEXT], text), len(text) + _OVERHEAD)


class Hits(NamedTuple):
    """How a request is answered that all entries are cached for, but for the vectors."""

    form: ResponseFormat
    headers: Mapping[str, str]
    again: Reusable | None
    """None if the same request has to be asked anew."""
    rendered: bytes = b""
    """The whole body of the response; empty if it is not kept."""
    reuse: Callable[[], bool] | None = None
    """As in a `CachedResponse`, for what was rendered."""


class HitCache:
    """Hits by the digests of requests that are too long to be kept with their responses.

    The entries are looked up each time; nothing is parsed or hashed but the body as a whole.
    """

    MIN_BODY = 1 << 10
    """Bytes; shorter bodies are parsed as quickly."""
    _PIECE = 1 << 18
    """Bytes of a body that are hashed at a time: some fraction of a millisecond's work."""
    _INPUT_BYTES = 120
    _OVERHEAD = 1500
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
        """Return hits and their vectors, already counted; None if they have to be asked for.

        There are no vectors where `rendered` has all that is to be sent. Where they come again,
        they are rendered and kept so, if there is room.
        """
        hits: Hits | None = self._responses.lru.get(("hits", digest)) if digest else None
        if hits is None or (again := hits.again) is None:
            return None
        if hits.reuse is not None:
            if hits.reuse():
                return hits, ()
            hits = hits._replace(rendered=b"", reuse=None)
        vectors = await again.vectors()
        if vectors is None:
            self._responses.lru.delete(("hits", digest))
            return None
        return hits, vectors

    def has_room(self, hits: Hits, vectors: int) -> bool:
        """Tell whether the whole body of a response may be kept."""
        length = hits.form.length(vectors)
        if length is None or vectors <= hits.form.vectors_a_chunk:
            return False
        return length <= self._responses.lru.max_bytes * self._MAX_SHARE

    def put(self, digest: bytes | None, hits: Hits, inputs: int) -> None:
        """Keep hits that can be given again."""
        if digest is not None and hits.again is not None:
            size = self._OVERHEAD + self._INPUT_BYTES * inputs + len(hits.rendered)
            self._responses.lru.put(("hits", digest), hits, size)


class JSONVectorCache:
    """Writes vectors as JSON, and keeps the text: to write 1536 numbers takes 20 times a copy.

    A text depends on nothing but its vector, so none is ever old.
    """

    _OVERHEAD = 300

    def __init__(self, lru: SizedLRU) -> None:
        self._lru = lru

    def json(self, one: Vector) -> bytes:
        """Return a vector as a JSON array, see `vector.to_json`.

        For vectors that are themselves kept: Python hashes bytes once, and finds the same ones by
        their identity.
        """
        key = ("text", one)
        text: bytes | None = self._lru.get(key)
        if text is None:
            text = vector.to_json(one)
            self._lru.put(key, text, len(text) + len(one) + self._OVERHEAD)
        return text
