"""An upstream on a real socket that plays what it is told to: vectors by default, faults on cue.

It speaks OpenAI's embeddings. Vectors are made from the upstream model's name and the input, so a
test can say what the right answer is without asking. Every request is recorded.
"""

import asyncio
import base64
import hashlib
import itertools
import socket
import ssl
import struct
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self
from weakref import WeakSet

import numpy as np
import orjson
from aiohttp import web
from leaks import WATCH, echo_headers, spellings
from ports import own_port

Payload = dict[str, Any]
Act = Callable[[web.Request, Payload], Awaitable[web.StreamResponse]]


def vector_of(
    model: str, item: object, dimensions: int = 1536, parameters: Payload | None = None
) -> np.ndarray:
    """Return the vector this upstream gives for an input: unit norm, float32.

    The upstream model's last path segment counts, so `openai/m` and `m` agree, as they should.
    `parameters` are the request's further fields, which change the numbers as `input_type` does.
    """
    name = model.rpartition("/")[2]
    told = orjson.dumps([name, item, parameters or {}], option=orjson.OPT_SORT_KEYS)
    seed = hashlib.blake2b(told, digest_size=8).digest()
    numbers = np.random.default_rng(int.from_bytes(seed, "little")).standard_normal(dimensions)
    return (numbers / np.linalg.norm(numbers)).astype("<f4")


_KNOWN_FIELDS = {"model", "input", "encoding_format", "dimensions", "user"}


def tokens_of(item: object) -> int:
    """Return how many tokens this upstream charges for an input it has no tokenizer for."""
    return len(item.split()) if isinstance(item, str) else len(item)


@dataclass
class Call:
    """One request as the upstream saw it."""

    path: str
    headers: Mapping[str, str]
    payload: Payload

    @property
    def inputs(self) -> list[object]:
        """The inputs, whichever of the four forms they came in."""
        value = self.payload["input"]
        single = isinstance(value, str) or isinstance(value[0], int)
        return [value] if single else list(value)


_SERVER = web.RequestKey("server", "FaultServer")
_REUSED = web.RequestKey("reused", bool)
_KEY = web.RequestKey("key", object)


async def _echo(request: web.Request, response: web.StreamResponse) -> None:
    """Repeat the key of the request in every reply, in every encoding, as bad servers do."""
    key = request.get(_KEY)
    if key is not None:
        response.headers.update(echo_headers(key))


@dataclass
class FaultServer:
    """Use it with `async with`; the address stays the same over `stop` and `start`."""

    widths: dict[str, int] = field(default_factory=dict)
    """Dimensions by the upstream model's name; 1536 for others."""
    calls: list[Call] = field(default_factory=list)
    script: deque[Act] = field(default_factory=deque)
    """What to play for the next requests, one each; afterwards `always`, or vectors."""
    always: Act | None = None
    holding: dict[object, Act] = field(default_factory=dict)
    """What to play for calls that hold such an input, whenever they come; before `script`."""
    gate: asyncio.Event | None = None
    """When set, no request is answered before the event is."""
    port: int = field(default_factory=own_port)
    tls: ssl.SSLContext | None = None
    """What it serves HTTPS with, at https://localhost."""
    _runner: web.AppRunner | None = None
    _connections: WeakSet[asyncio.BaseTransport] = field(default_factory=WeakSet)

    @property
    def url(self) -> str:
        """The base URL for a provider."""
        if self.tls is not None:
            return f"https://localhost:{self.port}/v1"
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def inputs(self) -> list[object]:
        """All inputs of all calls: what would have been billed."""
        return [item for call in self.calls for item in call.inputs]

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen, on the same port as before."""
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        app.on_response_prepare.append(_echo)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, ssl_context=self.tls).start()

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        payload = orjson.loads(await request.read())
        self.calls.append(Call(request.path, dict(request.headers), payload))
        request[_SERVER] = self
        request[_KEY] = WATCH.heard(request.headers, self.calls[-1].inputs)
        if request.transport is not None:  # Else nobody is there any more.
            request[_REUSED] = request.transport in self._connections
            self._connections.add(request.transport)
        inputs = self.calls[-1].inputs
        act = next((act for held, act in self.holding.items() if held in inputs), None)
        if act is None:
            act = self.script.popleft() if self.script else self.always
        if self.gate is not None:
            await self.gate.wait()
        if act is not None:
            return await act(request, payload)
        return _json(self.reply(payload))

    def reply(self, payload: Payload) -> dict[str, Any]:
        """Return the right answer to a request."""
        inputs = Call("", {}, payload).inputs
        model = payload["model"]
        width = self.widths.get(model, 1536)
        parameters = {name: v for name, v in payload.items() if name not in _KNOWN_FIELDS}
        data = []
        for i, item in enumerate(inputs):
            vector = vector_of(model, item, width, parameters)
            if payload.get("encoding_format") == "base64":
                embedding: object = base64.b64encode(vector.tobytes()).decode()
            else:
                embedding = vector.tolist()
            data.append({"object": "embedding", "index": i, "embedding": embedding})
        total = sum(map(tokens_of, inputs))
        usage = {"prompt_tokens": total, "total_tokens": total}
        return {"object": "list", "data": data, "model": model, "usage": usage}

    def altered(self, change: Callable[[dict[str, Any]], object]) -> Act:
        """Play the right answer after `change` has spoilt it in place."""

        async def act(_: web.Request, payload: Payload) -> web.Response:
            reply = self.reply(payload)
            change(reply)
            return _json(reply)

        return act


def _json(reply: Payload) -> web.Response:
    return web.Response(body=orjson.dumps(reply), content_type="application/json")


def spoilt(change: Callable[[Payload, Payload], object]) -> Act:
    """Play the right answer after `change` has spoilt it in place.

    It is given the reply, and in it the item of the input for which the server was told to do so.
    """

    async def act(request: web.Request, payload: Payload) -> web.Response:
        server = request[_SERVER]
        reply = server.reply(payload)
        items = zip(Call("", {}, payload).inputs, reply["data"], strict=True)
        change(reply, next(item for text, item in items if text in server.holding))
        return _json(reply)

    return act


def one_vector(change: Callable[[np.ndarray], np.ndarray]) -> Act:
    """Play the right answer but for one vector, which is sent in base64: that can hold a NaN."""

    def spoil(_: Payload, item: Payload) -> None:
        right = item["embedding"]
        numbers = np.frombuffer(base64.b64decode(right), "<f4") if type(right) is str else right
        wrong = change(np.array(numbers, "<f4")).astype("<f4")
        item["embedding"] = base64.b64encode(wrong.tobytes()).decode()

    return spoilt(spoil)


def other_form() -> Act:
    """Play the right answer in floats where base64 was asked, and the reverse."""

    async def act(request: web.Request, payload: Payload) -> web.Response:
        other = "float" if payload["encoding_format"] == "base64" else "base64"
        return _json(request[_SERVER].reply({**payload, "encoding_format": other}))

    return act


def larger_than(most: int, refusal: Act) -> Act:
    """Play a refusal of calls with more inputs than that, and the right answer to others."""

    async def act(request: web.Request, payload: Payload) -> web.StreamResponse:
        if len(Call("", {}, payload).inputs) > most:
            return await refusal(request, payload)
        return _json(request[_SERVER].reply(payload))

    return act


def status(code: int, body: object = None, headers: Mapping[str, str] | None = None) -> Act:
    """Play an error in OpenAI's shape, or `body` if given (bytes as they are)."""
    is_ours = body is None
    if body is None:
        body = {"error": {"message": f"made-up {code}", "type": "t", "param": None, "code": None}}
    raw = body if isinstance(body, bytes) else orjson.dumps(body)

    async def act(request: web.Request, _payload: Payload) -> web.Response:
        sent = raw
        if is_ours and (key := request.get(_KEY)):
            echo = {"echo": spellings(key)}
            sent = orjson.dumps({**body, "error": {**body["error"], **echo}})
        return web.Response(
            status=code, body=sent, content_type="application/json", headers=headers
        )

    return act


def succeeding(code: int, prefix: bytes = b"") -> Act:
    """Play the right answer under another status of success, after some bytes."""

    async def act(request: web.Request, payload: Payload) -> web.StreamResponse:
        reply = prefix + orjson.dumps(request[_SERVER].reply(payload))
        return await status(code, reply)(request, payload)

    return act


def labelled(content_encoding: str, pack: Callable[[bytes], bytes] = bytes) -> Act:
    """Play the right answer, packed in some way, under a label that may say another."""

    async def act(request: web.Request, payload: Payload) -> web.Response:
        body = pack(orjson.dumps(request[_SERVER].reply(payload)))
        headers = {"Content-Encoding": content_encoding}
        return web.Response(body=body, content_type="application/json", headers=headers)

    return act


def cut(body: bytes = b'{"object":"list","da') -> Act:
    """Play a reply that breaks off: the promised length never comes."""

    async def act(request: web.Request, _: Payload) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(body) + 1000)})
        await response.prepare(request)
        await response.write(body)
        request.transport.abort()
        return response

    return act


def hang() -> Act:
    """Play an upstream that takes the request and says nothing, until it is stopped."""

    async def act(_request: web.Request, _payload: Payload) -> web.Response:
        await asyncio.Event().wait()
        raise AssertionError("never")

    return act


def reset() -> Act:
    """Play a connection that is reset before a word of an answer."""

    async def act(request: web.Request, _: Payload) -> web.Response:
        at_once = struct.pack("ii", 1, 0)
        connection = request.transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, at_once)
        request.transport.abort()
        return web.Response()

    return act


def stale() -> Act:
    """Play a server that has given up every connection it kept; a fresh one is answered on."""

    async def act(request: web.Request, payload: Payload) -> web.StreamResponse:
        if request[_REUSED]:
            return await reset()(request, payload)
        return _json(request[_SERVER].reply(payload))

    return act


def trickle(body: bytes = b'{"object":"list","data":[', pause: float = 0.01) -> Act:
    """Play a reply of which a byte comes now and then, for ever, after what comes at once."""

    async def act(request: web.Request, _: Payload) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for chunk in itertools.chain([body], itertools.repeat(b" ")):
            await response.write(chunk)  # raises when nobody listens any more
            await asyncio.sleep(pause)
        return response

    return act
