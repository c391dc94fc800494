"""An upstream on a real socket that plays what it is told to: vectors by default, faults on cue.

It speaks OpenAI's embeddings. Vectors are made from the upstream model's name and the input, so a
test can say what the right answer is without asking. Every request is recorded.
"""

import asyncio
import base64
import hashlib
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import orjson
from aiohttp import web

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


@dataclass
class FaultServer:
    """Use it with `async with`; the address stays the same over `stop` and `start`."""

    widths: dict[str, int] = field(default_factory=dict)
    """Dimensions by the upstream model's name; 1536 for others."""
    calls: list[Call] = field(default_factory=list)
    script: deque[Act] = field(default_factory=deque)
    """What to play for the next requests, one each; afterwards `always`, or vectors."""
    always: Act | None = None
    gate: asyncio.Event | None = None
    """When set, no request is answered before the event is."""
    port: int = 0
    _runner: web.AppRunner | None = None

    @property
    def url(self) -> str:
        """The base URL for a provider."""
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
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.01)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port).start()
        self.port = self._runner.addresses[0][1]

    async def stop(self) -> None:
        """Refuse connections from now on."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        payload = orjson.loads(await request.read())
        self.calls.append(Call(request.path, dict(request.headers), payload))
        act = self.script.popleft() if self.script else self.always
        if self.gate is not None:
            await self.gate.wait()
        if act is not None:
            return await act(request, payload)
        return web.Response(body=orjson.dumps(self.reply(payload)), content_type="application/json")

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
            return web.Response(body=orjson.dumps(reply), content_type="application/json")

        return act


def status(code: int, body: object = None, headers: Mapping[str, str] | None = None) -> Act:
    """Play an error in OpenAI's shape, or `body` if given (bytes as they are)."""
    if body is None:
        body = {"error": {"message": f"made-up {code}", "type": "t", "param": None, "code": None}}
    raw = body if isinstance(body, bytes) else orjson.dumps(body)

    async def act(_request: web.Request, _payload: Payload) -> web.Response:
        return web.Response(status=code, body=raw, content_type="application/json", headers=headers)

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
