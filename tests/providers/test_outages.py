"""Many requests and providers that are down: breakers, cooldowns, budget; the clock is ours."""

import asyncio
import itertools
import logging
from dataclasses import replace

import pytest
from clock import Clock, in_virtual_time
from embedding_proxy.providers import errors
from embedding_proxy.providers.base import Context, Embedded, Space
from embedding_proxy.providers.charge import Charge
from embedding_proxy.providers.errors import (
    AuthenticationError,
    InvalidAnswer,
    InvalidRequest,
    LocalQueueFull,
    MalformedResponse,
    ModelNotFound,
    NoProviderAvailable,
    ProviderError,
    QuotaExceeded,
    RateLimited,
    Refusal,
    TransientError,
    Unreachable,
    UpstreamError,
    UpstreamTimeout,
)
from embedding_proxy.providers.routing.circuit_breaker import State
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.providers.routing.policy import CREDIT_COOLDOWN_S, KEY_COOLDOWN_S, rule
from embedding_proxy.providers.routing.router import Route, Router
from embedding_proxy.providers.scheduling.batch import PROBE_LIMIT_S
from embedding_proxy.providers.scheduling.scheduler import Scheduler
from embedding_proxy.providers.upstream.retry_after import MAX_WAIT

SPACE = Space("vendor/model", 2)


class Fake:
    """A provider that does as it is told: raises `does`, or answers; at the gate, if it has one."""

    def __init__(self, name, does=None, *, accepts_tokens=True):
        self.name = name
        self.does = does
        self.accepts_tokens = accepts_tokens
        self.gate = None
        self.charge = None
        self.calls = 0
        self.ended = 0

    async def ask(self, model, space, inputs, context):
        self.calls += 1
        try:
            if self.gate is not None:
                await self.gate.wait()
            if self.does is not None:
                raise self.does() if callable(self.does) else self.does
        finally:
            self.ended += 1
        answer = Embedded([b"8 bytes!"], [1], counted=True, providers=(self.name,))
        return replace(answer, charge=self.charge)


def error(kind, *, wait=None, status=503, provider="acme"):
    """Return an error as an upstream's refusal makes it."""
    return kind(provider, "made up", Refusal(status, "made up", retry_after=wait))


class World:
    """Fake providers a and b behind a router of their own, and a clock that stands still."""

    def __init__(self, a=None, b=None, **options):
        self.clock = Clock()
        self.waits = []
        self.texts = itertools.count()
        self.a, self.b = Fake("a", a), Fake("b", b)
        self.upstreams = HealthRegistry(self.clock, lambda: 0.0)
        self.router = self.make(**options)

    def make(self, routes=None, **options):
        """Return a router over these providers, that shares what is known of them."""
        routes = routes or [Route(self.a, "m"), Route(self.b, "m")]
        options = {"sleep": self.sleep, **options}
        return Router(routes, upstreams=self.upstreams, **options)

    async def sleep(self, seconds):
        self.waits.append(seconds)
        self.clock.now += seconds

    async def ask(self, router=None, inputs=None, context=Context()):  # noqa: B008
        """Embed, a new text each time unless told, and return who answered, or the error."""
        inputs = inputs or (f"text {next(self.texts)}",)
        try:
            answer = await Scheduler(router or self.router).embed(SPACE, inputs, context)
        except errors.EmbeddingError as failure:
            return failure
        return answer.providers[0]

    @property
    def calls(self):
        return self.a.calls, self.b.calls

    def state(self, name):
        return self.upstreams.of(name).snapshot()["state"]


async def turn():
    """Let every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


# The rows of the table of faults: the error, and how often one provider alone is asked.
ROWS = {
    "1 429, the wait fits": (lambda: error(RateLimited, wait=3.0), 3),
    "1 429, the wait does not fit": (lambda: error(RateLimited, wait=30.0), 1),
    "2 429 without": (lambda: error(RateLimited), 3),
    "3 out of credit": (lambda: error(QuotaExceeded), 1),
    "4 the proxy's key": (lambda: error(AuthenticationError), 1),
    "7 404 model": (lambda: error(ModelNotFound), 1),
    "8 5xx": (lambda: error(UpstreamError), 3),
    "8 503 with a wait": (lambda: error(UpstreamError, wait=2.0), 3),
    "10 HTML": (lambda: MalformedResponse("acme", "made up"), 3),
    "11-16 invalid": (lambda: InvalidAnswer("acme", "made up"), 2),
    "19-20 hang": (lambda: UpstreamTimeout("acme", "made up"), 1),
    "21-22 unreachable": (lambda: Unreachable("acme", "made up"), 2),
    "24 huge, redirect": (lambda: UpstreamError("acme", "made up"), 1),
}


@pytest.mark.parametrize("row", ROWS)
async def test_one_provider_alone_is_asked_as_often_as_its_fault_allows(row):
    """`no`, `once` and `yes` of the table, where there is no other route."""
    make, attempts = ROWS[row]
    world = World(make)
    alone = world.make([Route(world.a, "m")])
    assert type(await world.ask(alone)) is type(make())
    assert world.a.calls == attempts


@pytest.mark.parametrize("row", ROWS)
async def test_the_second_provider_answers_after_the_first(row):
    """Two attempts at most at the first, then the second answers, at once."""
    make, attempts = ROWS[row]
    world = World(make)
    assert await world.ask() == "b"
    assert world.calls == (min(attempts, 2), 1)


@pytest.mark.parametrize("row", ROWS)
async def test_the_second_provider_fails_after_the_first(row):
    """Of three attempts the second provider has what is left, and its failure is told."""
    make, attempts = ROWS[row]
    first = error(ModelNotFound)
    world = World(first, make)
    failure = await world.ask()
    assert type(failure) is type(make())
    assert world.calls == (1, min(attempts, 2))


async def test_a_refused_input_is_not_sent_elsewhere():
    """Rows 5 and 6: no other provider would take it, and the breaker hears nothing of it."""
    world = World(InvalidRequest("too long"))
    for _ in range(20):
        assert isinstance(await world.ask(), InvalidRequest)
    assert world.calls == (20, 0)
    assert world.state("a") is State.CLOSED


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        (UpstreamError, ModelNotFound, UpstreamError),
        (ModelNotFound, UpstreamError, UpstreamError),
        (QuotaExceeded, AuthenticationError, AuthenticationError),
        (Unreachable, UpstreamError, UpstreamError),
    ],
)
async def test_the_failure_that_may_pass_is_told(first, second, told):
    """A client is told to come back if any provider may do better then."""
    world = World(error(first), error(second))
    assert type(await world.ask()) is told


@pytest.mark.parametrize(
    "kind", [UpstreamError, Unreachable, UpstreamTimeout, InvalidAnswer, MalformedResponse]
)
async def test_a_provider_that_is_down_is_not_asked(kind):
    """After five failures requests go to the second provider without a detour."""
    world = World(lambda: error(kind))
    while world.state("a") is State.CLOSED:
        assert await world.ask() == "b"
    assert world.a.calls == 5
    for _ in range(20):
        assert await world.ask() == "b"
    assert world.a.calls == 5


@pytest.mark.parametrize("kind", [RateLimited, ModelNotFound])
async def test_what_is_not_the_services_fault_does_not_open_the_breaker(kind):
    """Neither a limit without a time nor an unknown model keeps others away."""
    world = World(lambda: error(kind))
    for _ in range(20):
        assert await world.ask() == "b"
    assert world.state("a") is State.CLOSED
    # A rate limit keeps them away for a moment, and longer each time that it is met again.
    assert world.a.calls < 20 if kind is RateLimited else world.a.calls >= 20


@pytest.mark.parametrize(
    ("make", "seconds", "probed"),
    [
        (lambda: error(QuotaExceeded), CREDIT_COOLDOWN_S, True),
        (lambda: error(AuthenticationError), KEY_COOLDOWN_S, True),
        (lambda: error(RateLimited, wait=60.0), 60.0, False),
    ],
)
async def test_a_provider_that_refuses_all_rests(make, seconds, probed):
    """It is asked again after its time, by one request only if the trouble may be still there."""
    world = World(make)
    for _ in range(5):
        assert await world.ask() == "b"
        world.clock.now += seconds / 5 - 0.001
    assert world.calls == (1, 5)
    world.clock.now += 1
    world.a.does, world.a.gate = None, asyncio.Event()
    crowd = asyncio.gather(*(world.ask() for _ in range(9)))
    await turn()
    world.a.gate.set()
    assert sorted(await crowd).count("a") == (1 if probed else 9)
    assert world.state("a") is State.CLOSED


async def test_a_refused_key_is_loud_in_the_log(caplog):
    """The operator cannot overlook it, and reads which provider it was."""
    world = World(error(AuthenticationError, provider="a"))
    await world.ask()
    loud = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(loud) == 1
    assert loud[0].startswith("a: THE PROXY'S OWN KEY")


async def test_the_breaker_is_shared_by_all_models():
    """What one model learnt of a provider, another need not learn again."""
    world = World(lambda: error(UpstreamError))
    other = world.make()
    while world.state("a") is State.CLOSED:
        await world.ask()
    calls = world.a.calls
    assert await world.ask(other) == "b"
    assert world.a.calls == calls


async def test_nobody_left_to_ask_is_said_at_once():
    """With every provider held back there is no call; the error says why, and for how long."""
    world = World(lambda: error(UpstreamError), error(QuotaExceeded))
    while not isinstance(failure := await world.ask(), NoProviderAvailable):
        pass
    calls = world.calls
    assert isinstance(await world.ask(), NoProviderAvailable)
    assert world.calls == calls
    assert 0 < failure.retry_after <= 1
    assert "a: it failed 5 times in a row" in str(failure)
    assert "b: out of credit" in str(failure)
    assert world.router.counts.refused == 2


async def test_one_call_proves_a_provider_well_again():
    """Half-open, one request of a crowd is let through, the rest is answered by the second."""
    world = World(lambda: error(UpstreamError))
    while world.state("a") is State.CLOSED:
        await world.ask()
    world.clock.now += 1
    world.a.does, world.a.gate, calls = None, asyncio.Event(), world.a.calls
    crowd = asyncio.gather(*(world.ask() for _ in range(20)))
    await turn()
    assert world.a.calls == calls + 1
    world.a.gate.set()
    assert sorted(await crowd) == ["a", *["b"] * 19]
    assert await world.ask() == "a"


async def test_a_failed_probe_costs_no_client_its_answer():
    """The request that was the probe goes on to the second provider."""
    world = World(lambda: error(UpstreamError))
    while world.state("a") is State.CLOSED:
        await world.ask()
    calls = world.a.calls
    world.clock.now += 1
    assert await world.ask() == "b"
    assert world.a.calls == calls + 1
    assert world.upstreams.of("a").wait("m") == 2


async def test_a_burst_into_a_dead_and_a_living_provider_fails_nobody():
    """Fifty at once after a cold start, the first provider dead: each is answered by the second."""
    world = World(lambda: error(UpstreamTimeout))
    world.a.gate = asyncio.Event()
    crowd = asyncio.gather(*(world.ask() for _ in range(50)))
    await turn()
    world.a.gate.set()
    assert await crowd == ["b"] * 50
    assert max(world.calls) <= 50


@pytest.mark.parametrize("first", [Unreachable, UpstreamError, UpstreamTimeout, RateLimited])
@pytest.mark.parametrize(
    "second", [Unreachable, UpstreamError, UpstreamTimeout, RateLimited, QuotaExceeded]
)
@pytest.mark.parametrize("size", [50, 200])
async def test_whatever_the_fault_a_burst_adds_no_more_than_a_fifth(first, second, size):
    """Though no two requests share a call, breakers and the retry budget bound what is added."""
    world = World(lambda: error(first), lambda: error(second))
    world.a.gate = asyncio.Event()
    crowd = asyncio.gather(*(world.ask() for _ in range(size)))
    await turn()
    world.a.gate.set()
    await crowd
    assert sum(world.calls) <= 1.2 * size + 5


async def test_a_wait_that_was_kept_ends_the_rest_for_the_one_who_kept_it():
    """Others may have been told to wait longer; who has waited as told asks once more."""
    world = World(lambda: error(RateLimited, wait=2.0))
    alone = world.make([Route(world.a, "m")])

    async def sleep(seconds):
        world.waits.append(seconds)
        health = world.upstreams.of("a")
        health.failed(health.acquire("m", rested=True), error(RateLimited, wait=5.0), "m")

    waiting = world.make([Route(world.a, "m")], sleep=sleep)
    assert isinstance(await world.ask(waiting), RateLimited)
    assert (world.a.calls, world.waits) == (3, [2.0, 2.0])
    calls = world.a.calls
    assert isinstance(await world.ask(alone), RateLimited)
    assert world.a.calls == calls + 1


@in_virtual_time
async def test_an_attempt_leaves_time_for_the_next_route():
    """A provider that hangs gets its share of the request's time, not all of it."""
    world = World()
    world.a.gate = asyncio.Event()
    deadline = asyncio.get_running_loop().time() + 60
    world.upstreams.clock = asyncio.get_running_loop().time
    assert await world.ask(context=Context(deadline=deadline)) == "b"
    assert asyncio.get_running_loop().time() == pytest.approx(deadline - 30)
    assert world.router.counts.failures == {"timeout": 1}


async def test_a_probe_that_hangs_does_not_hold_up_its_request(monkeypatch):
    """Where another route could answer, a probe gets seconds, whatever the provider's limit."""
    assert PROBE_LIMIT_S <= 10
    monkeypatch.setattr("embedding_proxy.providers.scheduling.batch.PROBE_LIMIT_S", 0.001)
    world = World(lambda: error(UpstreamError))
    while world.state("a") is State.CLOSED:
        await world.ask()
    world.clock.now += 1
    world.a.gate = asyncio.Event()
    assert await world.ask() == "b"
    assert world.state("a") is State.OPEN


async def test_the_preferred_route_is_the_cheapest():
    """`cheapest` turns the list about, and a provider that is down is still passed over."""
    world = World()
    priced = [Route(world.a, "m", 0.2), Route(world.b, "m", 0.1)]
    router = world.make(priced, order="cheapest")
    assert await world.ask(router) == "b"
    world.b.does = error(QuotaExceeded)
    assert await world.ask(router) == "a"
    assert await world.ask(router) == "a"
    assert world.b.calls == 2


async def test_a_route_that_charges_more_than_it_says_is_cheapest_no_longer():
    """The upstream's own words about a call move the next one to the cheaper route, unasked."""
    world = World()
    priced = [Route(world.a, "m", 0.2), Route(world.b, "m", 0.1)]
    router = world.make(priced, order="cheapest")
    world.b.charge = Charge(5000, 5000 * 300)
    bills = []
    assert await world.ask(router, context=Context(on_charge=bills.append)) == "b"
    assert [sum(one.nanodollars) for one in bills] == [5000 * 300]
    assert await world.ask(router) == "a"


async def test_the_preferred_route_is_the_fastest():
    """`fastest` measures, tries the other now and then, and passes over what is down."""
    world = World()
    router = world.make(order="fastest")
    assert [await world.ask(router) for _ in range(3)] == ["a", "b", "a"]
    router.latencies.note_answer(router.routes[0], 5.0, 1)
    assert await world.ask(router) == "b"
    world.b.does = error(QuotaExceeded)
    assert [await world.ask(router) for _ in range(3)] == ["a"] * 3


async def test_a_provider_that_is_down_takes_no_ones_trial():
    """`fastest` tries what may be asked; a route held back is not put first in its stead."""
    world = World()
    c = Fake("c")
    router = world.make([Route(f, "m") for f in (world.a, world.b, c)], order="fastest")
    assert await world.ask(router) == "a"
    breaker = world.upstreams.of("b").breaker
    breaker.open(breaker.acquire(), 300, "others failed")
    assert [await world.ask(router) for _ in range(2)] == ["c", "a"]


async def test_what_happened_can_be_read():
    """Counters of the router, and of each provider its state, why, and until when."""
    world = World(lambda: error(UpstreamError))
    while world.state("a") is State.CLOSED:
        await world.ask()
    counts = world.router.counts
    assert (counts.attempts, counts.retries, counts.failovers) == (8, 2, 3)
    assert counts.failures == {"upstream_error": 5}
    shown = world.upstreams.snapshot()
    assert shown["a"] == {
        "state": "open",
        "until_s": 1.0,
        "held": {"m": 1.0},
        "rests": {},
        "why": "it failed 5 times in a row",
        "failures_in_a_row": 5,
        "opened": 1,
        "attempts": 5,
        "failures": {"upstream_error": 5},
    }
    assert (shown["b"]["state"], shown["b"]["why"], shown["b"]["attempts"]) == ("closed", "", 3)


@pytest.mark.parametrize("kind", [TransientError, ProviderError])
def test_an_error_nobody_foresaw_counts_and_is_not_repeated(kind):
    """A class without a row of its own has the careful one."""
    found = rule(kind("acme", "made up"))
    assert (found.retries, found.verdict.value, found.opens_s) == (0, "failure", None)


class Hedged(World):
    """A world whose router hedges after a time that is over when the test says so."""

    def __init__(self, a=None, b=None, **options):
        self.hour = asyncio.Event()
        super().__init__(a, b, hedge_after_s=0.5, **options)
        self.a.gate = asyncio.Event()

    async def sleep(self, seconds):
        self.waits.append(seconds)
        if seconds == 0.5:
            await self.hour.wait()

    async def started(self):
        """Start a request, and let its hedge go."""
        task = asyncio.create_task(self.ask())
        await turn()
        self.hour.set()
        await turn()
        return task


async def test_a_slow_route_is_hedged():
    """The second route's answer wins; the first is cancelled, which counts neither way."""
    world = Hedged()
    task = await world.started()
    assert await task == "b"
    assert (world.calls, world.a.ended, world.router.counts.hedges) == ((1, 1), 1, 1)
    assert world.upstreams.of("a").breaker_of("m").failures == 0
    assert not world.upstreams.of("a").failures


async def test_a_quick_route_is_not_hedged():
    """An answer before the time cancels the hedge before it costs anything."""
    world = Hedged()
    task = asyncio.create_task(world.ask())
    await turn()
    world.a.gate.set()
    assert await task == "a"
    assert world.calls == (1, 0)


async def test_the_first_route_may_still_win():
    """A hedge that is slower, or fails, is no loss but its price; its failure is the breaker's."""
    world = Hedged(b=error(UpstreamError))
    task = await world.started()
    assert world.calls == (1, 1)
    world.a.gate.set()
    assert await task == "a"
    assert world.upstreams.of("b").breaker_of("m").failures == 1


async def test_a_first_route_that_fails_leaves_the_matter_to_its_hedge():
    """A route that is being asked as a hedge is not asked once more as the next route."""
    world = Hedged(lambda: error(ModelNotFound))
    world.b.gate = asyncio.Event()
    task = await world.started()
    world.a.gate.set()
    await turn()
    world.b.gate.set()
    assert await task == "b"
    assert world.calls == (1, 1)


async def test_both_may_fail():
    """Then the request fails with what says most, after no more attempts than there are."""
    world = Hedged(lambda: error(UpstreamError), error(ModelNotFound))
    task = await world.started()
    world.a.gate.set()
    assert isinstance(await task, UpstreamError)
    assert world.calls == (2, 1)


async def test_a_refused_input_ends_a_race():
    """What the hedge hears of the input is the answer; the first route is not waited for."""
    world = Hedged(b=InvalidRequest("too long"))
    assert isinstance(await (await world.started()), InvalidRequest)
    assert world.a.ended == 1


async def test_a_hedge_must_be_affordable():
    """Without budget nothing is asked twice at a time."""
    world = Hedged()
    for _ in range(20):
        world.upstreams.budget.take()
    task = await world.started()
    assert world.calls == (1, 0)
    world.a.gate.set()
    assert await task == "a"


async def test_a_first_route_that_fails_before_the_hedge_goes_on_as_ever():
    """Failover needs no hedge, and is not held up by the time of one."""
    world = Hedged(error(ModelNotFound))
    world.a.gate.set()
    assert await world.ask() == "b"
    assert (world.calls, world.router.counts.hedges) == ((1, 1), 0)
    world.b.does = error(ModelNotFound)
    assert isinstance(await world.ask(), ModelNotFound)


async def test_a_hedge_goes_only_where_token_arrays_are_taken():
    """A route that cannot take the inputs is none to hedge with."""
    world = Hedged()
    world.b.accepts_tokens = False
    world.hour.set()
    task = asyncio.create_task(world.ask(inputs=[(1, 2)]))
    await turn()
    world.a.gate.set()
    assert await task == "a"
    assert world.calls == (1, 0)


async def test_a_probe_that_meets_a_rate_limit_proves_nothing():
    """The breaker neither closes nor opens for longer; that model is the probe again in a second.

    Another model's call may be the probe at once.
    """
    world = World(lambda: error(Unreachable))
    while world.state("a") is State.CLOSED:
        await world.ask()
    world.clock.now += 1
    world.a.does, calls = error(RateLimited), world.a.calls
    for _ in range(5):
        assert await world.ask() == "b"
    assert world.a.calls == calls + 1
    assert (world.state("a"), world.upstreams.of("a").wait("m")) == (State.HALF_OPEN, 1)
    other = world.make([Route(world.a, "n"), Route(world.b, "n")])
    assert await world.ask(other) == "b"
    assert (world.a.calls, world.state("a")) == (calls + 2, State.HALF_OPEN)
    world.clock.now += 1
    world.a.does = None
    assert await world.ask() == "a"
    assert world.state("a") is State.CLOSED


async def test_a_shared_provider_answers_for_two_routes():
    """Two names of a model at one provider are two routes behind one breaker."""
    world = World(lambda: error(ModelNotFound))
    router = world.make([Route(world.a, "old"), Route(world.a, "new")])
    assert isinstance(await world.ask(router), ModelNotFound)
    assert world.a.calls == 2


def full(wait=30.0):
    """Return what a queue of our own says when there is no room in time."""
    return LocalQueueFull(
        "a", "full", Refusal(429, "full", "requests", "rate_limit_exceeded", wait)
    )


async def test_a_full_queue_is_no_call():
    """It is no attempt, no failure, no rest and no expense, however often; the next route goes."""
    world = World(full)
    for _ in range(20):
        assert await world.ask() == "b"
    shown = world.upstreams.snapshot()
    assert shown["a"] == {
        "state": "closed",
        "until_s": 0.0,
        "held": {},
        "rests": {},
        "why": "",
        "failures_in_a_row": 0,
        "opened": 0,
        "attempts": 0,
        "failures": {},
    }
    assert shown["b"]["attempts"] == 20
    assert world.upstreams.budget.can_retry
    counts = world.router.counts
    assert (counts.attempts, counts.retries, counts.failovers) == (20, 0, 20)
    assert (counts.failures, world.waits) == ({"local_queue_full": 20}, [])
    world.a.does = None
    assert await world.ask() == "a"


async def test_no_counter_ever_falls():
    """A metrics server takes a smaller number for a restart, and counts all of it once more."""
    seen = []

    def note():
        counts = world.router.counts
        of_each = [world.upstreams.of(name).snapshot()["attempts"] for name in "ab"]
        seen.append((counts.attempts, counts.retries, counts.failovers, *of_each))

    def fail():
        note()
        return next(failures)

    failures = itertools.cycle([full(), error(UpstreamError), full(), full()])
    world = World(fail, fail)
    for _ in range(8):
        await world.ask()
        note()
    assert len(seen) > 16
    for counter in zip(*seen, strict=True):
        assert list(counter) == sorted(counter)
    assert seen[-1][0] == seen[-1][3] + seen[-1][4] > 0


async def test_a_full_queue_is_told_as_a_rate_limit_when_there_is_no_other_route():
    """The client gets the wait, after no second try; nothing is earned for other requests."""
    world = World(lambda: full(0.5))
    alone = world.make([Route(world.a, "m")])
    failure = await world.ask(alone)
    assert (type(failure), failure.retry_after) == (LocalQueueFull, 0.5)
    assert (world.a.calls, world.waits) == (1, [])
    assert alone.counts.attempts == 0
    assert isinstance(await world.ask(alone), LocalQueueFull), (
        "it is asked again, and does not rest"
    )


async def test_a_full_queue_leaves_the_next_route_all_attempts():
    """Three attempts are still to be made, and a failure there is not the charge of a failover."""
    world = World(full, lambda: error(UpstreamError))
    assert isinstance(await world.ask(), UpstreamError)
    assert world.calls == (1, 3)


async def test_a_probe_that_finds_the_queue_full_leaves_its_place():
    """Half-open, the next request is the probe."""
    world = World(lambda: error(UpstreamError))
    while world.state("a") is State.CLOSED:
        await world.ask()
    world.clock.now += 1
    world.a.does = full()
    assert await world.ask() == "b"
    world.a.does = None
    assert await world.ask() == "a"
    assert world.state("a") is State.CLOSED


@in_virtual_time
async def test_a_call_begins_in_half_of_its_time_where_another_route_is_left():
    """The last route, and a request without an end, may queue as long as there is time."""
    seen = []
    world = World()

    async def ask(model, space, inputs, context):
        seen.append(context.start_deadline)
        raise full()

    world.a.ask = world.b.ask = ask
    loop = asyncio.get_running_loop()
    world.upstreams.clock = loop.time
    await world.ask(context=Context(deadline=loop.time() + 100))
    assert [by and by - loop.time() for by in seen] == [pytest.approx(25), None]
    await world.ask()
    assert seen[2:] == [None, None]


async def test_a_hedge_at_a_full_queue_goes_to_the_next_route():
    """It is no hedge yet, and has cost nothing."""
    world = Hedged(b=full)
    c = Fake("c")
    world.router.routes = tuple(Route(fake, "m") for fake in (world.a, world.b, c))
    task = await world.started()
    assert await task == "c"
    assert (world.calls, c.calls, world.router.counts.hedges) == ((1, 1), 1, 1)


class Models(World):
    """A world with a router each for a small and a large model of the same providers."""

    def __init__(self, a=None, b=None):
        super().__init__(a, b)
        self.small, self.large = (
            self.make([Route(self.a, name), Route(self.b, name)]) for name in ("small", "large")
        )
        self.only_small, self.only_large = (
            self.make([Route(self.a, name)]) for name in ("small", "large")
        )


async def test_a_rate_limit_rests_its_model_and_no_other():
    """The provider is asked on for its other models, and its breaker knows nothing of it."""
    world = Models(error(RateLimited, wait=60.0))
    assert await world.ask(world.small) == "b"
    world.a.does = None
    assert await world.ask(world.large) == "a"
    assert await world.ask(world.small) == "b"
    assert world.upstreams.snapshot()["a"]["rests"] == {"small": 60.0}
    assert world.state("a") is State.CLOSED
    calls = world.calls
    failure = await world.ask(world.only_small)
    assert isinstance(failure, RateLimited)
    assert world.calls == calls
    assert failure.retry_after == 60
    assert "a: rate limited, asked again in 60.0 s" in str(failure)
    world.clock.now += 60
    assert world.upstreams.snapshot()["a"]["rests"] == {}
    assert await world.ask(world.only_small) == "a"


async def test_a_longer_rest_is_kept_and_none_is_for_ever():
    """A shorter one does not cut it; an upstream that names next year is asked within the hour."""
    world = Models()
    health = world.upstreams.of("a")
    permits = [health.acquire("small") for _ in range(4)]
    for permit, wait in zip(permits, [7.0, 3.0], strict=False):
        health.failed(permit, error(RateLimited, wait=wait), "small")
    assert health.rest("small") == 7
    assert health.acquire("small") is None
    assert health.acquire("small", rested=True) is not None
    health.failed(permits[2], error(RateLimited, wait=1e9), "small")
    assert health.rest("small") == MAX_WAIT


async def test_nobody_rests_past_an_open_breaker():
    """To have waited for a rate limit gives no way through a breaker that opened since."""
    world = Models()
    health = world.upstreams.of("a")
    health.failed(health.acquire("small"), error(RateLimited, wait=1.0), "small")
    for _ in range(5):
        health.failed(health.acquire("large"), error(Unreachable), "large")
    assert health.acquire("small", rested=True) is None


async def test_each_model_has_a_breaker_and_the_provider_has_one():
    """Answers that are wrong shut a model; that nothing can be connected to shuts all of them."""
    world = Models()
    health = world.upstreams.of("a")
    for _ in range(5):
        health.failed(health.acquire("large"), error(UpstreamError), "large")
    assert (health.wait("large"), health.wait("small"), health.wait("other")) == (1, 0, 0)
    assert health.snapshot()["held"] == {"large": 1.0}
    for _ in range(5):
        health.failed(health.acquire("small"), error(Unreachable), "small")
    assert (health.wait("small"), health.wait("other")) == (1, 1)
    world.clock.now += 1
    # The provider is reached again, though it fails on: that is the matter of the model.
    health.failed(health.acquire("small"), error(UpstreamError), "small")
    assert (health.wait("other"), health.breaker.state) == (0, State.CLOSED)


async def test_breakers_of_made_up_models_are_forgotten(monkeypatch):
    """Names without end fill no memory, and forget no breaker that holds a model back."""
    monkeypatch.setattr("embedding_proxy.providers.routing.health.MAX_KEYS", 10)
    health = World().upstreams.of("a")
    for _ in range(5):
        health.failed(health.acquire("down"), error(UpstreamError), "down")
    for i in range(50):
        health.succeeded(health.acquire(f"made up {i}"), f"made up {i}")
    assert health.wait("down")
    assert len(health._breakers) <= 10


async def test_breaker_and_rest_are_told_together():
    """What holds back the longest is said, and the client comes back when both are over."""
    world = Models(lambda: error(Unreachable))
    health = world.upstreams.of("a")
    health.failed(health.acquire("small"), error(RateLimited, wait=30.0), "small")
    for _ in range(5):
        health.failed(health.acquire("large"), error(Unreachable), "large")
    small, large = await world.ask(world.only_small), await world.ask(world.only_large)
    assert (small.retry_after, large.retry_after) == (30, 1)
    assert "a: rate limited, asked again in 30.0 s" in str(small)
    assert "a: it failed 5 times in a row, asked again in 1.0 s" in str(large)
    names = [Route(world.a, name) for name in ("small", "large", "other")]
    told = await world.ask(world.make(names))
    assert (told.retry_after, str(told).count("failed 5 times")) == (1, 1)


@pytest.mark.parametrize("kind", [QuotaExceeded, AuthenticationError])
async def test_a_bill_or_a_key_is_the_matter_of_all_models(kind):
    """What the provider refuses whatever is asked holds back every model."""
    world = Models(error(kind))
    assert await world.ask(world.small) == "b"
    assert await world.ask(world.large) == "b"
    assert world.a.calls == 1


@pytest.mark.parametrize(("earlier", "tells", "counted"), [(0, 1, 1), (60, 1, 0), (60, 0, 1)])
@in_virtual_time
async def test_what_is_left_of_a_wait_in_our_queue_is_no_time_to_answer(earlier, tells, counted):
    """A route that had the last of a request's time alone is not held to have failed.

    Of a provider that does not tell when its calls begin, all of the time counts as its own.
    """
    world = World()

    async def hang(model, space, inputs, context):
        if tells:
            context.attempt.begin(asyncio.get_running_loop().time())
        await asyncio.Event().wait()

    world.upstreams.clock = asyncio.get_running_loop().time
    world.a.ask = hang
    now = world.upstreams.clock()
    context = Context(deadline=now + 0.1, begun=now - earlier)
    assert await world.ask(context=context) == "b"
    assert world.upstreams.of("a").breaker_of("m").failures == counted
