"""No input is lost: many requests, several providers that fail in every way, and a made-up time.

What holds for every script: each request ends; no vector is another input's; what was bought and
came back well reaches its request, and is not bought again; each charge is told once; no provider
gets more calls at a time than it takes; nothing is begun that is of use to nobody any more.
"""

import asyncio
import math
from collections import Counter
from dataclasses import dataclass, field, replace

from clock import run_virtual
from embedding_proxy.providers.base import Context, Embedded, Outcome, Space
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import (
    AuthenticationError,
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidAnswer,
    InvalidRequest,
    LocalQueueFull,
    MalformedResponse,
    ModelNotFound,
    OutOfDescriptors,
    PermissionDenied,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    ScopedQuotaExceeded,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.profile import Limits
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.router import Route, Router
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.providers.fakes import Kept, tokens_of, vector_of

SPACE = Space("m", 2)
LONG_S = 100_000.0
HANG_S = 300.0
"""After so long a provider's own limits of time end a call."""
ERRORS = (
    lambda name: RateLimited(name, "too many", Refusal(429, "too many")),
    lambda name: RateLimited(name, "too many", Refusal(429, "too many", retry_after=2.0)),
    lambda name: RateLimited(name, "too many", Refusal(429, "too many", retry_after=90.0)),
    lambda name: UpstreamError(name, "down", Refusal(503, "down")),
    lambda name: UpstreamError(name, "down", Refusal(500, "down")),
    lambda name: UpstreamTimeout(name, "no answer"),
    lambda name: Unreachable(name, "connection refused"),
    lambda name: MalformedResponse(name, "a page"),
    lambda name: InvalidAnswer(name, "too few"),
    lambda name: QuotaExceeded(name, "out of credit", Refusal(402, "out of credit")),
    lambda name: ScopedQuotaExceeded(name, "too dear", Refusal(402, "too dear")),
    lambda name: AuthenticationError(name, "bad key", Refusal(401, "bad key")),
    lambda name: PermissionDenied(name, "denied", Refusal(403, "denied")),
    lambda name: ModelNotFound(name, "no such model", Refusal(404, "no such model")),
    lambda _: ClientKeyRefused("bad key of the client"),
    lambda _: OutOfDescriptors(),
    lambda _: RuntimeError("a defect"),
)
OWN = len(ERRORS) - 3
"""From here on they are no provider's: no other route is asked."""


@dataclass
class Act:
    """What a provider does with one call."""

    what: str = "answer"
    """`answer`, `fail`, `part` (a vector is bad), `fused` (one vector for all), `hang`, `full`."""
    error: int = 0
    is_charged: bool = False
    """Whether a failure is charged."""
    queue_s: float = 0.0
    """Seconds in the provider's own queue, before anything is sent."""
    call_s: float = 0.0


@dataclass
class Script:
    """How a provider is, and what it does with its first calls; it answers all later ones."""

    acts: list
    limits: Limits
    max_inputs: int | None
    """A limit that is not declared."""
    retries: int | None
    later: Act

    @property
    def is_good(self):
        """Whether it answers every call."""
        good = all(act.what == "answer" for act in [*self.acts, self.later])
        return good and self.max_inputs is None


@dataclass
class Asked:
    """A request as a script has it, and what came of it."""

    number: int
    after_s: float
    kinds: list
    limit_s: float | None
    leaves_s: float | None
    is_cancelled: bool
    """Whether it is cancelled when it leaves, or only noted as left."""
    deadline: float | None = field(default=None, init=False, repr=False)
    gone_at: float | None = field(default=None, init=False, repr=False)
    task: asyncio.Task = field(default=None, init=False, repr=False)
    kept: Kept = field(default_factory=Kept, init=False, repr=False)
    billed: Counter = field(default_factory=Counter, init=False, repr=False)
    nanodollars: int = field(default=0, init=False, repr=False)

    @property
    def texts(self):
        """Its inputs: no two of a world are equal, so a call tells whose they are."""
        return [f"{kind} {self.number}.{i}" for i, kind in enumerate(self.kinds)]

    def charge(self, bill):
        """Take a bill."""
        self.billed.update(bill.places)
        self.nanodollars += sum(bill.nanodollars)

    async def embed(self, scheduler):
        """Ask, when its time has come."""
        await asyncio.sleep(self.after_s)
        loop = asyncio.get_running_loop()
        abandoned, begun = loop.create_future(), loop.time()
        self.deadline = None if self.limit_s is None else begun + self.limit_s
        if self.leaves_s is not None:
            loop.call_later(self.leaves_s, self._leave, abandoned)
        context = Context(
            deadline=self.deadline,
            begun=begun,
            on_part=self.kept,
            on_charge=self.charge,
            abandoned=abandoned,
        )
        return await scheduler.embed(SPACE, self.texts, context)

    def _leave(self, abandoned):
        if self.task.done():
            return
        self.gone_at = asyncio.get_running_loop().time()
        if self.is_cancelled:
            self.task.cancel()
        else:
            abandoned.set_result(None)

    def is_of_use(self, now):
        """Tell whether a call for it that begins now may be of use."""
        is_there = self.gone_at is None or self.gone_at >= now
        return is_there and (self.deadline is None or self.deadline >= now)


class Acted:
    """A provider that goes by its script, and keeps account of it."""

    accepts_tokens = True

    def __init__(self, name, script, world):
        self.name = name
        self.script = script
        self.limits = script.limits
        self.world = world
        self.calls = self.under_way = 0

    async def ask(self, model, space, inputs, context):
        acts, number = self.script.acts, self.calls
        self.calls += 1
        act = acts[number] if number < len(acts) else self.script.later
        loop = asyncio.get_running_loop()
        self.under_way += 1
        self.world.ask(inputs, loop.time())
        try:
            if act.what == "full":
                raise LocalQueueFull(self.name, "no room", Refusal(429, "no room"))
            if act.queue_s:
                until = context.start_deadline or context.deadline
                try:
                    async with asyncio.timeout_at(until):
                        await asyncio.sleep(act.queue_s)
                except TimeoutError:
                    if context.start_deadline is None:
                        raise DeadlineExceeded("its turn did not come") from None
                    raise LocalQueueFull(self.name, "no room", Refusal(429, "no room")) from None
            if context.attempt.is_abandoned or not context.is_needed():
                raise LocalQueueFull(self.name, "nobody waits")
            context.attempt.begin(loop.time())
            try:
                self.world.begin(self, inputs, loop.time())
                context.attempt.is_sent = True
                await asyncio.sleep(HANG_S if act.what == "hang" else act.call_s)
                return await self._answer(act, inputs, context)
            finally:
                context.attempt.end()
        finally:
            self.under_way -= 1

    async def _answer(self, act, inputs, context):
        error = self._error(act, inputs)
        if error is not None:
            if act.is_charged and isinstance(error, ProviderError):
                error.charge = self.world.charge(inputs)
            raise error
        kinds = [one.split()[0] for one in inputs]
        bad = [i for i, kind in enumerate(kinds) if kind == "vector"]
        if act.what == "part" and not bad:
            bad = [len(inputs) // 2]
        good = [i for i in range(len(inputs)) if i not in bad]
        charge = self.world.charge(inputs)
        if act.what == "fused" and len(inputs) > 1:
            error = InvalidAnswer(self.name, "one vector for all")
            error.indices, error.charge = tuple(range(len(inputs))), charge
            raise error
        self.world.answer([inputs[i] for i in good], is_final=context.on_part is not None)
        part = Embedded(
            vectors=[vector_of(inputs[i]) for i in good],
            tokens=[tokens_of(inputs[i]) for i in good],
            counted=True,
            providers=(self.name,),
            outcomes=[Outcome.MISS] * len(good),
            charge=charge,
        )
        if not bad:
            return part
        error = InvalidAnswer(self.name, "no number")
        error.index, error.indices, error.charge = bad[0], tuple(bad), charge
        if good:
            await context.on_part(good, part)
        raise error

    def _error(self, act, inputs):  # noqa: PLR0911 - one for each kind
        """Return what a call fails with."""
        script, kinds = self.script, [one.split()[0] for one in inputs]
        if act.what == "hang":
            return UpstreamTimeout(self.name, "no answer")
        if script.max_inputs is not None and len(inputs) > script.max_inputs:
            return InvalidRequest("request too large", status=413)
        if act.what == "fail":
            return ERRORS[act.error](self.name)
        if "internal" in kinds:
            return UpstreamError(self.name, "chokes", Refusal(500, "chokes"))
        if "refused" in kinds:
            return InvalidRequest("bad input")
        if "named" in kinds:
            return InvalidRequest("bad input", index=kinds.index("named"))
        return None


class World:
    """All of a script, and the laws that can be seen while it goes on."""

    def __init__(self, scripts, asked, hedge_after_s, window_s):
        self.asked = [replace(one) for one in asked]
        self.providers = [Acted(f"p{i}", one, self) for i, one in enumerate(scripts)]
        self.upstreams = HealthRegistry(chance=lambda: 0.5)
        routes = [Route(one, "m", retries=one.script.retries) for one in self.providers]
        router = Router(routes, upstreams=self.upstreams, hedge_after_s=hedge_after_s)
        self.scheduler = Scheduler(router, window_s)
        self.of_text = {text: one for one in self.asked for text in one.texts}
        self.broken = []
        """Laws that a call has broken."""
        self.answered = {}
        """When a good vector came for an input first."""
        self.is_closed = False
        acts = [act for provider in self.providers for act in provider.script.acts]
        self.is_answerable = (
            any(provider.script.is_good for provider in self.providers)
            and all(set(one.kinds) == {"good"} for one in self.asked)
            and all(act.error < OWN for act in acts if act.what == "fail")
        )
        """Whether no input is bad, a provider answers each call, and no fault is our own."""
        self.charged = 0
        self.tokens = Counter()

    def ask(self, inputs, now):
        """Look at a call that a provider is given; it may have to wait before it begins."""
        again = [one for one in inputs if self.answered.get(one, now) < now]
        if again:
            self.broken.append(("bought again", again, now))

    def begin(self, provider, inputs, now):
        """Look at a call that begins, and note what must not be."""
        limits = provider.limits
        if provider.under_way > limits.concurrency or len(inputs) > limits.inputs:
            self.broken.append(("too much at a time", inputs, now))
        if not any(self.of_text[one].is_of_use(now) for one in inputs):
            self.broken.append(("of no use to anybody", inputs, now))

    def answer(self, inputs, *, is_final):
        """Note that good vectors are on their way.

        `is_final`: False where they wait for those of other calls, to be compared with them.
        """
        now = asyncio.get_running_loop().time() if is_final else math.inf
        for one in inputs:
            self.answered.setdefault(one, now)

    def charge(self, inputs):
        """Return what a call is charged: never the same for two calls."""
        cost = 1 << (self.charged.bit_length() + 3)
        self.charged += cost
        self.tokens.update(inputs)
        return Charge(sum(map(tokens_of, inputs)), cost)

    async def play(self, closes_s):
        """Let everything happen, and wait until all is at rest."""
        loop = asyncio.get_running_loop()
        for one in self.asked:
            one.task = loop.create_task(one.embed(self.scheduler))
        tasks = [one.task for one in self.asked]
        if closes_s is not None:
            await asyncio.sleep(closes_s)
            self.is_closed = True
            await self.upstreams.attempts.close()
        _, pending = await asyncio.wait(tasks, timeout=LONG_S)
        assert not pending, "a request waits for ever"
        # Calls that nobody waits for end by themselves, and so do cooldowns and open breakers.
        await asyncio.sleep(LONG_S)
        assert not self.broken
        self.check_rest()
        for one in self.asked:
            self.check(one)
        assert sum(one.nanodollars for one in self.asked) == self.charged

    def check_rest(self):
        """Check that nothing is left over when all have ended."""
        assert not self.scheduler._queues
        assert not self.upstreams.attempts._tasks
        for provider in self.providers:
            assert provider.under_way == 0
            assert self.upstreams.slots(provider.name, "m", 1).used == 0
            assert self.upstreams.of(provider.name).wait("m") == 0, "its probe was never ended"

    def check(self, one):
        """Check what became of a request."""
        one.kept.check(one.texts)
        came = {i for i, text in enumerate(one.texts) if text in self.answered}
        if self.is_closed:
            # A vector that waits for others to be compared with them is not kept at the end.
            came = {i for i in came if self.answered[one.texts[i]] < math.inf or i in one.kept.rows}
        for i, text in enumerate(one.texts):
            assert one.billed[i] == self.tokens[text]
        if one.task.cancelled():
            assert one.is_cancelled
            assert one.gone_at is not None
            assert one.kept.rows.keys() == came
            return
        error = one.task.exception()
        if error is None:
            assert one.task.result().vectors == [vector_of(text) for text in one.texts]
            return
        assert isinstance(error, EmbeddingError) or str(error) == "a defect", error
        is_there = one.limit_s is None and one.gone_at is None and not self.is_closed
        assert not (is_there and self.is_answerable), "a provider would have answered it"
        assert one.kept.rows.keys() == came, "bought and lost"
        index = getattr(error, "index", None)
        assert index is None or index < len(one.kinds)


SECONDS = st.sampled_from([0.0, 0.01, 0.4, 3.0, 20.0])
ACTS = st.builds(
    Act,
    what=st.sampled_from(["answer", "answer", "fail", "fail", "part", "fused", "hang", "full"]),
    error=st.integers(0, len(ERRORS) - 1),
    is_charged=st.booleans(),
    queue_s=st.just(0.0) | SECONDS,
    call_s=SECONDS,
)
SCRIPTS = st.builds(
    Script,
    acts=st.lists(ACTS, max_size=6),
    limits=st.builds(Limits, inputs=st.integers(1, 6), concurrency=st.integers(1, 3)),
    max_inputs=st.none() | st.integers(1, 4),
    retries=st.none() | st.integers(0, 2),
    later=st.builds(Act, call_s=SECONDS),
)
KINDS = st.sampled_from(["good"] * 6 + ["refused", "named", "internal", "vector"])


@st.composite
def requests(draw):
    """Draw requests that come one after the other, or at once."""
    asked, now = [], 0.0
    for number in range(draw(st.integers(1, 6))):
        now += draw(SECONDS)
        kinds = draw(st.lists(KINDS, min_size=1, max_size=6))
        leaves_s = draw(st.none() | SECONDS)
        limit_s = draw(st.none() | st.sampled_from([-1.0, 0.3, 2.0, 60.0]))
        asked.append(Asked(number, now, kinds, limit_s, leaves_s, draw(st.booleans())))
    return asked


def script(*acts, inputs, later_s=0.0, **limits):
    """Return a provider that does so with its first calls; the others take `later_s`."""
    max_inputs = limits.pop("max_inputs", None)
    return Script(
        [*acts], Limits(inputs=inputs, concurrency=1), max_inputs, None, Act(call_s=later_s)
    )


def one(kinds, limit_s=None, number=0):
    """Return a request that comes at once, and stays."""
    return Asked(number, 0.0, kinds.split(), limit_s, None, is_cancelled=False)


# Each of these was once a request that waited for ever, a lost vector, or an input wrongly named.
LATE_ANSWER = [script(inputs=2, later_s=0.4), script(inputs=1), script(inputs=1)]
LATE_HALF = [script(Act(), Act(call_s=3.0), inputs=1), script(inputs=2, later_s=0.4)]
REFUSED_RACE = [script(Act(call_s=0.4), inputs=2, max_inputs=1), script(inputs=1, later_s=0.4)]
FAILED_ALONE = [script(Act("fused"), Act(), Act("fail", 6), Act(), inputs=3)]
OTHER_CALL = [
    script(Act("fused"), inputs=4),
    script(Act(), Act("fail"), Act("fail"), inputs=4),
    script(Act(), Act("fail", 9), Act("fail"), inputs=3),
]


@example(LATE_ANSWER, [one("refused good", 2.0)], None, 0.0, None)
@example(LATE_HALF, [one("good good good good good refused", 2.0)], None, 0.0, None)
@example(REFUSED_RACE, [one("good good")], 0.1, 0.0, None)
@example(FAILED_ALONE, [one("good good good")], None, 0.0, None)
@example(OTHER_CALL, [one("good"), one("good good vector", number=1)], None, 0.0, None)
@settings(max_examples=400, report_multiple_bugs=False)
@given(
    st.lists(SCRIPTS, min_size=1, max_size=3),
    requests(),
    st.none() | st.sampled_from([0.1, 5.0]),
    st.sampled_from([0.0, 0.05]),
    st.none() | st.sampled_from([0.2, 10.0]),
)
def test_no_input_is_lost(scripts, asked, hedge_after_s, window_s, closes_s):
    """Whatever providers do, and whoever leaves."""
    run_virtual(World(scripts, asked, hedge_after_s, window_s).play(closes_s))
