"""Refuses a request that this proxy itself has sent: one of its base URLs leads back to it.

Without it each request would make another, until no file descriptor is left. What is compared is
told in `providers.hops`. Proxies that stand one behind the other are no loop: their ids differ.
"""

import hashlib
import secrets

from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from embedding_proxy.providers.upstream import hops
from embedding_proxy.proxy.config.schema import Settings

from .errors import Failure

# Made when the process starts: the workers that it forks have the same.
_PROCESS_KEY = secrets.token_bytes(16)


def installation_id(settings: Settings) -> str:
    """Return the id of a proxy with these settings: the same in all of its workers, and no other's.

    It tells nothing of the settings.
    """
    return hashlib.blake2b(
        repr(settings).encode(errors="replace"), digest_size=8, key=_PROCESS_KEY
    ).hexdigest()


def loop_guard(settings: Settings) -> Middleware:
    """Return the middleware that answers 508 to a loop, and names the calls of all others."""
    own = installation_id(settings)

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        passed = hops.parse(request.headers.getall(hops.HEADER, ()))
        if own in passed:
            return _refusal(
                "This request was sent by this proxy itself: a base_url leads back to it."
                f" {_remedy(settings, request)}"
            )
        if len(passed) >= hops.MAX_HOPS:
            return _refusal(
                f"This request has passed {hops.MAX_HOPS} proxies already, which is probably a"
                " loop: check the base_url of the providers of each."
            )
        token = hops.enter((*passed, own))
        try:
            return await handler(request)
        finally:
            hops.leave(token)

    return handle


def _remedy(settings: Settings, request: web.Request) -> str:
    name = settings.passthrough
    if settings.passthrough_provider is not None and "embeddings" not in request.path:
        return f"Set providers.{name}.base_url to the upstream's own address."
    return "Set providers.NAME.base_url to the upstream's own address."


def _refusal(message: str) -> web.Response:
    return Failure(508, message, "server_error", code="loop_detected").response()
