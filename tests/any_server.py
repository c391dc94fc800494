"""An upstream on a real socket that answers any call as a test says, and notes what it saw."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from aiohttp import web
from leaks import WATCH

Act = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Seen:
    """One call as the upstream saw it; `target` is the path and query as they came."""

    method: str
    target: str
    headers: Mapping[str, str]


async def echo(request: web.Request) -> web.Response:
    """Send the body back, with its type."""
    return web.Response(body=await request.read(), content_type=request.content_type)


@dataclass
class AnyServer:
    """Use it with `async with`."""

    act: Act = echo
    seen: list[Seen] = field(default_factory=list)
    connections: set[Any] = field(default_factory=set)
    _runner: web.AppRunner | None = None

    async def __aenter__(self) -> Self:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(
            app,
            access_log=None,
            shutdown_timeout=0.01,
            handler_cancellation=True,
            auto_decompress=False,
        )
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def url(self) -> str:
        """The base URL for a provider."""
        return f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        WATCH.heard(request.headers)
        self.seen.append(Seen(request.method, request.raw_path, request.headers))
        self.connections.add(request.transport)
        return await self.act(request)
