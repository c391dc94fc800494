"""Checks one route with known texts: whether it answers, how fast, and whether as others do.

Two routes of one model must give the same numbers, whoever serves them; so must one route today and
next month. The texts are few and short: asking costs about a hundred tokens.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from embedding_proxy.providers.routing.route import Route
from embedding_proxy.providers.scheduling import batch_size
from embedding_proxy.providers.scheduling.assembly import assemble

from .base import Context, Embedded, Input, Space, Vector
from .errors import EmbeddingError, InvalidAnswer, ProviderError
from .vector import cosine

SAME = 0.999
"""The least cosine of two answers of one model to one text.

Equal models differ by less than 1e-5 from call to call and less than 1e-4 between providers; other
models, and other versions of one, differ by far more.
"""

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "Wie viele Vektoren passen in einen Schrank, wenn niemand hinsieht?",
    "SELECT name, COUNT(*) FROM visits GROUP BY name ORDER BY 2 DESC;",
    "今日は朝から雨が降っているので、家で本を読みます。",
)
"""What is asked: prose, another language, code, another script. A change restarts drift checks."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What came of asking one route."""

    route: Route
    seconds: float
    """Until the answer, or the failure."""
    vectors: Sequence[Vector] = ()
    """One for each text, all of one width: that of the space, if known. None after a failure."""
    tokens: int = 0
    """Prompt tokens that the provider charged."""
    failure: EmbeddingError | None = None


async def probe(
    route: Route,
    space: Space,
    context: Context,
    clock: Callable[[], float],
    texts: Sequence[Input] = TEXTS,
) -> Probe:
    """Ask a route once, past the cache and past what is known of its health. Never raises.

    `clock` gives seconds, and is the one that the deadline of the context is on.
    """
    begun = clock()
    try:
        embedded = await call_route(route, space, texts, context)
    except EmbeddingError as error:
        return Probe(route, clock() - begun, failure=error)
    except Exception as error:  # noqa: BLE001 - of a kind that somebody's package brings
        problem = f"its own code failed: {type(error).__name__}"
        return Probe(route, clock() - begun, failure=ProviderError(route.name, problem))
    seconds = clock() - begun
    if len({len(vector) for vector in embedded.vectors}) > 1:
        # Where a width is not known yet, nobody has compared it so far.
        failure = InvalidAnswer(route.name, "its vectors are not of one width")
        return Probe(route, seconds, failure=failure)
    return Probe(route, seconds, embedded.vectors, sum(embedded.tokens))


async def call_route(
    route: Route, space: Space, inputs: Sequence[Input], context: Context
) -> Embedded:
    """Ask the provider once, or call after call where it takes no more in one.

    For a few texts, past the scheduler. Raises EmbeddingError; its index is that in the call.
    """
    sizes, _ = await batch_size.sizes(space, inputs, route.limits.tokens, context)
    parts = []
    for batch in batch_size.split(len(inputs), route.limits, sizes):
        items = [inputs[index] for index in batch]
        parts.append((batch, await _ask(route, space, items, context)))
    return assemble(parts)


async def _ask(route: Route, space: Space, inputs: Sequence[Input], context: Context) -> Embedded:
    try:
        answer = await route.provider.ask(route.model, space, inputs, context)
    except ProviderError as error:
        if error.charge and context.on_charge:
            context.on_charge(route.bill_failed(error.charge, inputs, context.account))
        raise
    if context.on_charge is not None:
        context.on_charge(route.bill(answer.charge, answer.tokens, context.account))
    return answer


def agreement(first: Sequence[Vector], second: Sequence[Vector]) -> float:
    """Return the smallest cosine between the answers to the same texts."""
    return min(cosine(a, b) for a, b in zip(first, second, strict=True))
