"""A provider for tests of what goes before it: it keeps its calls, and refuses what it is told."""

import asyncio

from embedding_proxy.providers.base import Embedded, Outcome
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.routing.router import Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler


def vector_of(item):
    """Return the one right vector of an input, of two numbers."""
    return repr(item).encode().ljust(8, b".")[-8:]


def tokens_of(item):
    """Return what an input costs."""
    return 1 + len(item) % 7


class Upstream:
    """A provider that answers when it is let, and fails as `failure(inputs)` says."""

    name = "p"
    accepts_tokens = True

    def __init__(self, failure=lambda _: None, limits=None):
        self.limits = limits or Limits()
        self.failure = failure
        self.calls = []
        self.contexts = []
        self.bought = []
        self.air = self.most = 0
        self.held = None

    def hold(self):
        """Keep the calls from now on, to be let go by their inputs."""
        self.held = {}

    def let(self, call):
        """Let the call of that number go on."""
        self.held[call].set()

    async def ask(self, model, space, inputs, context):
        return await self.embed(space, inputs, context)

    async def embed(self, space, inputs, context):
        number = len(self.calls)
        self.calls.append(list(inputs))
        self.contexts.append(context)
        self.air += 1
        self.most = max(self.most, self.air)
        try:
            if self.held is not None:
                self.held[number] = asyncio.Event()
                await self.held[number].wait()
            else:
                await asyncio.sleep(0)
            failure = self.failure(inputs)
            if failure is not None:
                raise failure
        finally:
            self.air -= 1
        self.bought += inputs
        return Embedded(
            vectors=[vector_of(item) for item in inputs],
            tokens=[tokens_of(item) for item in inputs],
            counted=True,
            providers=(f"p{len(inputs)}",),
            outcomes=[Outcome.MISS] * len(inputs),
        )


class Asked:
    """A provider that asks an Embedder."""

    name = "fake"
    accepts_tokens = True

    def __init__(self, inner):
        self.inner = inner
        self.limits = Limits()

    async def ask(self, model, space, inputs, context):
        return await self.inner.embed(space, inputs, context)


async def no_wait(_):
    """Wait between attempts for no time at all."""


def schedule(provider, limits=None, window_s=0, *, call_s=None, others=()):
    """Return a scheduler over a route to a provider, each failure of which is final, and others.

    `call_s` is what calls have taken lately.
    """
    if not hasattr(provider, "ask"):
        provider = Asked(provider)
    if limits is not None:
        provider.limits = limits
    routes = [Route(one, "m", retries=0) for one in (provider, *others)]
    router = Router(routes, sleep=no_wait)
    if call_s is not None:
        router.latencies.note_answer(routes[0], call_s, 0)
    return Scheduler(router, window_s)


def refusing(*bad, param="input"):
    """Return a failure of calls that hold one of these inputs, which does not say which."""

    def failure(inputs):
        return InvalidRequest("bad input", param=param) if set(bad) & set(inputs) else None

    return failure


def check(embedded, inputs):
    """Check what follows from the inputs alone."""
    assert embedded.vectors == [vector_of(item) for item in inputs]
    assert embedded.tokens == [tokens_of(item) for item in inputs]
    assert len(embedded.outcomes) == len(inputs)


class Kept:
    """An `on_part` that keeps what it is told, by place."""

    def __init__(self):
        self.rows = {}

    async def __call__(self, places, part):
        for place, vector in zip(places, part.vectors, strict=True):
            self.rows[place] = vector

    def check(self, inputs):
        """Check that each place has the vector of its input."""
        assert self.rows == {place: vector_of(inputs[place]) for place in self.rows}


async def settle():
    """Let everyone come to where they wait."""
    for _ in range(30):
        await asyncio.sleep(0)
