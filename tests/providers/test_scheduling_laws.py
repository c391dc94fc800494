"""Laws of the scheduler: they hold for all requests, upstreams and orders of events."""

import asyncio
from dataclasses import dataclass, field, replace

from embedding_proxy.providers.base import Context, Space
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import (
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
    RateLimited,
    Refusal,
    UpstreamError,
)
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.scheduling.assembly import rows_of
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.providers.fakes import Kept, Upstream, check, schedule, settle

SPACE = Space("m", 2)
TEXTS = [f"t{i}" for i in range(8)]
BAD = ["refused", "named", "internal", "vector"]


@dataclass
class Behaviour:
    """How an upstream takes calls."""

    bad: dict
    """What becomes of calls that hold an input."""
    max_inputs: int | None
    names_limit: bool
    limited: set
    """Numbers of the calls that meet a rate limit."""


class Scripted(Upstream):
    """An upstream that charges a token and a nanodollar for each input that it answers."""

    def __init__(self, behaviour):
        super().__init__(self._failure)
        self.behaviour = behaviour
        self.billed = 0

    def _failure(self, inputs):
        rule, count = self.behaviour, len(inputs)
        if len(self.calls) - 1 in rule.limited:
            return RateLimited("p", "too many")
        if rule.max_inputs is not None and count > rule.max_inputs:
            said = f"batch size must be at most {rule.max_inputs}" if rule.names_limit else "large"
            return InvalidRequest(said, status=413)
        kinds = [rule.bad.get(one) for one in inputs]
        if "internal" in kinds:
            return UpstreamError("p", "down", Refusal(500, "down"))
        if "refused" in kinds:
            return InvalidRequest("bad")
        return InvalidRequest("bad", index=kinds.index("named")) if "named" in kinds else None

    async def embed(self, space, inputs, context):
        answer = await super().embed(space, inputs, context)
        bad = [i for i, one in enumerate(inputs) if self.behaviour.bad.get(one) == "vector"]
        good = [i for i in range(len(inputs)) if i not in bad]
        self.billed += len(inputs)
        if bad:
            part = rows_of(answer, good)
            error = InvalidAnswer("p", "no number")
            error.charge = Charge(len(inputs))
            if context.on_part is not None and good:
                await context.on_part(good, replace(part, charge=error.charge))
            error.index, error.indices = bad[0], tuple(bad)
            raise error
        return answer


@dataclass
class Asked:
    """A request, and what its client learns."""

    inputs: list
    task: asyncio.Task = None
    kept: Kept = field(default_factory=Kept)
    billed: list = field(default_factory=list)
    abandoned: asyncio.Future = None
    is_gone: bool = False

    def start(self, scheduler, *, is_late):
        """Ask, with a deadline that has passed, or with none."""
        loop = asyncio.get_running_loop()
        self.abandoned, self.is_gone = loop.create_future(), is_late
        context = Context(
            deadline=loop.time() - 1 if is_late else None,
            on_part=self.kept,
            on_charge=lambda bill: self.billed.extend(bill.places),
            abandoned=self.abandoned,
        )
        self.task = asyncio.create_task(scheduler.embed(SPACE, self.inputs, context))


@st.composite
def behaviours(draw):
    """Draw what an upstream does."""
    return Behaviour(
        bad=draw(st.dictionaries(st.sampled_from(TEXTS), st.sampled_from(BAD), max_size=3)),
        max_inputs=draw(st.none() | st.integers(1, 8)),
        names_limit=draw(st.booleans()),
        limited=draw(st.sets(st.integers(0, 20), max_size=2)),
    )


INPUTS = st.lists(st.sampled_from(TEXTS), min_size=1, max_size=10)
EVENTS = st.one_of(
    st.tuples(st.just("ask"), INPUTS),
    st.tuples(st.just("ask late"), INPUTS),
    st.tuples(st.sampled_from(["cancel", "abandon", "answer"]), st.integers(0, 9)),
    st.tuples(st.just("turn"), st.integers(1, 3)),
)


async def _play(scheduler, upstream, events):  # noqa: C901 - one branch for each event
    """Let events happen one by one; then answer all calls. Returns the requests."""
    asked = []
    for event, what in events:
        if event.startswith("ask"):
            asked.append(Asked(what))
            asked[-1].start(scheduler, is_late=event == "ask late")
        elif event == "turn":
            for _ in range(what):
                await asyncio.sleep(0)
        elif event == "answer":
            held = [one for one in upstream.held.values() if not one.is_set()]
            if held:
                held[what % len(held)].set()
        elif asked:
            one = asked[what % len(asked)]
            one.is_gone = one.is_gone or not one.task.done()
            if event == "cancel":
                one.task.cancel()
            elif not one.abandoned.done():
                one.abandoned.set_result(None)
    async with asyncio.timeout(60):
        while not all(one.task.done() for one in asked) or upstream.air:
            for one in upstream.held.values():
                one.set()
            await asyncio.sleep(0)
    await settle()
    for one in asked:
        _ = one.task.cancelled() or one.task.exception()
    return asked


GOOD = Behaviour(bad={}, max_inputs=None, names_limit=False, limited=set())
IN_THE_TURN_OF_ITS_ANSWER = [
    ("ask", ["t0"]),
    ("turn", 3),
    ("answer", 0),
    ("turn", 1),
    ("cancel", 0),
]


@example(GOOD, IN_THE_TURN_OF_ITS_ANSWER, 1, 1)
@settings(deadline=None, max_examples=300)
@given(behaviours(), st.lists(EVENTS, max_size=25), st.integers(1, 4), st.integers(1, 10))
async def test_the_laws_of_the_scheduler(behaviour, events, concurrency, max_inputs):
    """Every request ends, with its own vectors, bills and failures, whatever becomes of others."""
    upstream = Scripted(behaviour)
    upstream.hold()
    scheduler = schedule(upstream, Limits(inputs=max_inputs, concurrency=concurrency))
    asked = await _play(scheduler, upstream, events)

    assert not scheduler._queues
    slots = scheduler.router.upstreams.slots("p", "m", concurrency)
    assert (slots.used, len(scheduler.router.upstreams.attempts._tasks)) == (0, 0)
    internal = sum(behaviour.bad.get(x) == "internal" for one in asked for x in one.inputs)
    for one in asked:
        bad = {i for i, text in enumerate(one.inputs) if text in behaviour.bad}
        one.kept.check(one.inputs)
        # Nothing is bought twice for one request, and what is told is billed.
        good = [place for place in one.billed if place not in bad]
        assert len(good) == len(set(good))
        assert one.kept.rows.keys() <= set(one.billed)
        if one.task.cancelled():
            assert one.is_gone
            assert one.kept.rows.keys() == set(one.billed) - bad
            continue
        error = one.task.exception()
        if error is None:
            check(one.task.result(), one.inputs)
            assert not bad
            assert len(one.billed) == len(one.inputs)
            continue
        assert isinstance(error, EmbeddingError)
        assert one.kept.rows.keys() == set(one.billed) - bad
        assert error.index is None or error.index in bad
        if not (behaviour.limited or one.is_gone or internal > 1):
            assert bad, "and nobody else's input fails it"
    assert upstream.billed == sum(len(one.billed) for one in asked)
