"""The cache around an embedder: nothing is paid for twice, and nothing wrong is served for it."""

import asyncio
import sqlite3
from collections import Counter
from dataclasses import dataclass, field, replace

import pytest
from clock import in_virtual_time
from embedding_proxy.cache.disk import database, purge
from embedding_proxy.cache.disk.connection import opened
from embedding_proxy.cache.disk.store import Store
from embedding_proxy.cache.embedder import CachingEmbedder
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.ledger import Usage
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.shared_task import SharedTask
from embedding_proxy.cache.tiers import TierCounters, Tiers
from embedding_proxy.providers.base import Context, Outcome, Space
from embedding_proxy.providers.charge import Account
from embedding_proxy.providers.client_credential import Credential
from embedding_proxy.providers.errors import (
    ClientKeyRefused,
    DeadlineExceeded,
    EmbeddingError,
    InvalidRequest,
    NoRoute,
    RateLimited,
    UpstreamTimeout,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import (
    FakeEmbedder,
    FakeStore,
    Turnstile,
    key_of,
    settle,
    tokens_of,
    vector_of,
)

SPACE = Space("m", 3)
ANY_TIME = Context()
TEAM = Account("model", "a client", price=0.5)
HIT, JOIN, MISS, DUPLICATE = Outcome.HIT, Outcome.JOIN, Outcome.MISS, Outcome.DUPLICATE
MIB = 1 << 20


@dataclass
class Rig:
    """A caching embedder over fakes that a test can hold, fail and look into."""

    inner: FakeEmbedder = field(default_factory=FakeEmbedder)
    store: FakeStore = field(default_factory=FakeStore)
    memory: int = MIB
    in_flight: InFlight = field(default_factory=InFlight)

    def __post_init__(self):
        self.tiers = Tiers(Memory(self.memory), self.store)
        self.embedder = self.of(self.inner)

    def of(self, inner):
        """Return an embedder around another that shares these tiers and fetches."""
        return CachingEmbedder(inner, self.tiers, self.in_flight)

    def start(self, *inputs, space=SPACE, context=ANY_TIME):
        """Start a request as a task."""
        return asyncio.create_task(self._ask(inputs, space, context))

    async def embed(self, *inputs, space=SPACE, context=ANY_TIME):
        """Make a request and check its answer."""
        return _right(await self._ask(inputs, space, context), inputs, space)

    async def _ask(self, inputs, space, context):
        # A request that hangs is a failure like another.
        async with asyncio.timeout(60):
            return await self.embedder.embed(space, inputs, context)


def _right(embedded, inputs, space=SPACE):
    """Return an answer after checking all that follows from the inputs alone."""
    assert embedded.vectors == [vector_of(item, space) for item in inputs]
    assert embedded.tokens == [tokens_of(item) for item in inputs]
    again = [item in inputs[:i] for i, item in enumerate(inputs)]
    assert [outcome is DUPLICATE for outcome in embedded.outcomes] == again
    return embedded


async def test_one_request_may_hold_every_outcome():
    """Hits, joins, misses and duplicates in one request come back in its order, each as it was."""
    rig = Rig()
    await rig.embed("old")
    rig.inner.gate.shut()
    other = rig.start("theirs", "also theirs")
    await settle()
    request = rig.start("new", "theirs", "old", "new", (1, 2), "old", "theirs")
    await settle()
    rig.inner.gate.open()
    embedded = _right(await request, ["new", "theirs", "old", "new", (1, 2), "old", "theirs"])
    assert embedded.outcomes == [MISS, JOIN, HIT, DUPLICATE, MISS, DUPLICATE, DUPLICATE]
    assert embedded.usage.tokens_billed == tokens_of("new") + tokens_of((1, 2))
    assert embedded.providers == ("fake",)
    assert (await other).outcomes == [MISS, MISS]
    assert [inputs for _, inputs, _ in rig.inner.calls] == [
        ["old"],
        ["theirs", "also theirs"],
        ["new", (1, 2)],
    ]


async def test_a_hit_names_no_provider_and_costs_nothing():
    """What was bought before comes back bit for bit, with its tokens, without a word upstream."""
    rig = Rig()
    await rig.embed("a", (1,), "b")
    embedded = await rig.embed("b", "a", (1,))
    assert embedded.outcomes == [HIT, HIT, HIT]
    assert (embedded.providers, embedded.usage.tokens_billed) == ((), 0)
    assert len(rig.inner.calls) == 1


async def test_a_thousand_at_once_pay_once():
    """One thousand identical requests make one call; one of them paid, all others joined."""
    rig = Rig()
    rig.inner.gate.shut()
    requests = [rig.start("same") for _ in range(1000)]
    await settle()
    rig.inner.gate.open()
    answers = [_right(await request, ["same"]) for request in requests]
    assert Counter(answer.outcomes[0] for answer in answers) == {MISS: 1, JOIN: 999}
    assert sum(answer.usage.tokens_billed for answer in answers) == tokens_of("same")
    assert rig.inner.asked == ["same"]


INPUTS = st.sampled_from(["a", "b", "c", (1,), (1, 2)])
SPACES = [Space("m", 2), Space("m", 2, parameters=(("task", b'"query"'),))]
REQUESTS = st.lists(
    st.tuples(st.lists(INPUTS, min_size=1, max_size=4), st.sampled_from(SPACES)),
    min_size=1,
    max_size=5,
)
LIMITS = st.sampled_from([0, 800, MIB])


async def _interleave(draw, rig, gate, requests, *, cancelling=False):
    """Start the requests and let go of what the gate holds, all in an order that is drawn.

    Returns the tasks, all done, and the numbers of those that were cancelled on the way.
    """
    gate.shut()
    tasks, cancelled = [], set()
    while len(tasks) < len(requests) or gate.held:
        steps = [("let", i) for i in range(len(gate.held))]
        if len(tasks) < len(requests):
            steps.append(("start", len(tasks)))
        if cancelling:
            steps += [("cancel", i) for i, task in enumerate(tasks) if not task.done()]
        what, which = draw.draw(st.sampled_from(steps))
        if what == "let":
            gate.let(which)
        elif what == "start":
            inputs, space = requests[which]
            tasks.append(rig.start(*inputs, space=space))
        elif tasks[which].cancel():
            cancelled.add(which)
        await settle()
    await asyncio.wait(tasks)
    return tasks, cancelled


@settings(deadline=None)
@given(REQUESTS, LIMITS, st.data())
async def test_any_interleaving_pays_once_for_each_input(requests, limit, draw):
    """In whatever order look-ups, calls and writes end: right vectors, each bought exactly once."""
    gate = Turnstile()
    rig = Rig(FakeEmbedder(gate), FakeStore(gate), limit)
    tasks, _ = await _interleave(draw, rig, gate, requests)

    outcomes, billed = Counter(), 0
    for task, (inputs, space) in zip(tasks, requests, strict=True):
        embedded = _right(task.result(), inputs, space)
        outcomes.update(embedded.outcomes)
        billed += embedded.usage.tokens_billed
        bought = MISS in embedded.outcomes
        assert embedded.providers == (("fake",) if bought else ())
    distinct = {(space, item) for inputs, space in requests for item in inputs}
    bought = Counter((space, item) for space, inputs, _ in rig.inner.calls for item in inputs)
    assert bought == dict.fromkeys(distinct, 1)
    assert sum(outcomes.values()) == sum(len(inputs) for inputs, _ in requests)
    assert outcomes[MISS] == len(distinct)
    assert billed == sum(tokens_of(item) for _, item in distinct)
    assert len(rig.in_flight) == 0


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.lists(INPUTS | st.just("refused"), min_size=1, max_size=3),
            st.sampled_from(SPACES[:1]),
        ),
        min_size=1,
        max_size=5,
    ),
    LIMITS,
    st.data(),
)
async def test_in_any_interleaving_nobody_suffers_for_another(requests, limit, draw):
    """Whoever else is cancelled or refused: who stays and asks for nothing wrong is answered."""
    gate = Turnstile()
    rig = Rig(FakeEmbedder(gate), FakeStore(gate), limit)
    rig.inner.failure = lambda inputs: InvalidRequest("no") if "refused" in inputs else None
    tasks, cancelled = await _interleave(draw, rig, gate, requests, cancelling=True)

    for number, (task, (inputs, space)) in enumerate(zip(tasks, requests, strict=True)):
        if number in cancelled:
            assert task.cancelled()
        elif "refused" in inputs:
            assert isinstance(task.exception(), InvalidRequest)
        else:
            _right(task.result(), inputs, space)
    assert len(rig.in_flight) == 0
    assert key_of("refused", SPACES[0]).address not in rig.store.records


# Looking again.


async def test_what_landed_after_the_look_up_is_not_bought_again():
    """The look-up finds nothing, another's fill lands, and only then this request leads."""
    rig = Rig()
    rig.store.reading.shut()
    first, late = rig.start("a"), rig.start("a")
    await settle()
    # Both looks came to nothing, but the answer to the second is still on its way.
    rig.store.reading.let(0)
    rig.store.reading.let(0)
    await settle()
    rig.store.reading.let(0)
    await settle()
    assert (await first).outcomes == [MISS]
    rig.store.reading.open()
    assert _right(await late, ["a"]).outcomes == [HIT]
    assert rig.inner.asked == ["a"]


async def test_only_what_the_second_look_does_not_find_is_bought():
    """Of several inputs the fill buys just those that did not land meanwhile, and says so."""
    rig = Rig()
    rig.store.reading.shut()
    late = rig.start("a", "b", "c")
    await settle()
    rig.store.reading.let()
    await settle()
    # Its look came to nothing and is still on its way back, while others pass.
    rig.store.reading.is_open = True
    await rig.embed("b")
    rig.store.reading.open()
    embedded = _right(await late, ["a", "b", "c"])
    assert embedded.outcomes == [MISS, HIT, MISS]
    assert embedded.usage.tokens_billed == tokens_of("a") + tokens_of("c")
    assert rig.inner.asked == ["b", "a", "c"]


async def test_without_a_landing_there_is_no_second_look():
    """A miss that nothing has overtaken costs one read of the disk, not two."""
    rig = Rig()
    await rig.embed("a")
    await rig.embed("b", "a")
    assert rig.store.reads == [[key_of(item, SPACE).address] for item in ("a", "b")]


@pytest.mark.parametrize("is_quick", [False, True])
@pytest.mark.parametrize("count", [1, 16, 17, 600])
async def test_a_miss_reads_each_address_once(count, is_quick):
    """However the disk is read, and though an equal input comes again and some are known."""
    rig = Rig()
    rig.store.is_quick = is_quick
    known = ["known 1", "known 2"]
    await rig.embed(*known)
    rig.store.reads.clear()
    rig.store.glances.clear()
    new = [f"text {i}" for i in range(count)]
    embedded = await rig.embed(*new, *known, *new[:1])
    assert embedded.outcomes == [MISS] * count + [HIT] * 2 + [DUPLICATE]
    addresses = [address for read in (*rig.store.reads, *rig.store.glances) for address in read]
    assert addresses == [key_of(item, SPACE).address for item in new]


@pytest.mark.parametrize("memory", [0, MIB])
async def test_the_second_look_is_at_what_has_landed_alone(memory):
    """The disk is asked again only for a key that was bought meanwhile, and memory has no room."""
    rig = Rig(memory=memory)
    rig.store.reading.shut()
    late = rig.start("a", "b", "c")
    await settle()
    rig.store.reading.let()
    await settle()
    rig.store.reading.is_open = True
    await rig.embed("b", "other")
    rig.store.reads.clear()
    rig.store.reading.open()
    assert _right(await late, ["a", "b", "c"]).outcomes == [MISS, HIT, MISS]
    assert rig.store.reads == ([] if memory else [[key_of("b", SPACE).address]])


@pytest.mark.parametrize("memory", [0, 10_000, MIB])
@pytest.mark.parametrize("new", [[], [0], [20], [299], [299, 5], [15, 16, 256]], ids=str)
async def test_what_is_at_hand_is_taken_as_far_as_it_goes(memory, new):
    """Wherever something new stands, only that is bought, and each input is looked up once."""
    rig = Rig(memory=memory)
    rig.store.is_quick = True
    asked = [f"text {i}" for i in range(300)]
    known = [text for place, text in enumerate(asked) if place not in new]
    await rig.embed(*known)
    before = rig.tiers.counters
    rig.tiers.counters = TierCounters()
    embedded = await rig.embed(*asked)
    assert embedded.outcomes == [MISS if place in new else HIT for place in range(300)]
    assert rig.inner.asked == [*known, *(asked[place] for place in sorted(new))]
    counters = rig.tiers.counters
    assert counters.memory_hits + counters.disk_hits == len(known)
    assert (counters.misses, before.misses) == (len(new), len(known))


# Refusals and failures.


@pytest.mark.parametrize("own", [["own"], []], ids=["with a miss", "joining only"])
async def test_who_joins_a_fill_that_another_got_refused_asks_alone(own):
    """When another's input was refused, one bought along with it is asked for again, and served."""
    rig = Rig()
    rig.inner.failure = lambda inputs: InvalidRequest("no") if "bad" in inputs else None
    rig.inner.gate.shut()
    theirs = rig.start("bad", "good")
    await settle()
    inputs = [*own, "good", *own]
    mine = rig.start(*inputs)
    await settle()
    rig.inner.gate.open()
    with pytest.raises(InvalidRequest):
        await theirs
    embedded = _right(await mine, inputs)
    assert embedded.outcomes == [MISS] * (len(own) + 1) + [DUPLICATE] * len(own)
    assert embedded.providers == ("fake",)
    assert embedded.usage.tokens_billed == sum(map(tokens_of, {*inputs}))
    assert rig.inner.asked == ["bad", "good", *own, "good"]


async def test_a_failure_that_many_inputs_share_is_judged_once(monkeypatch):
    """Each judgement looks at all inputs: one for each input held the loop for a minute."""
    rig, judged = Rig(), []

    judge = SharedTask.is_leader_specific

    def noted(fetch, error, *others):
        judged.append(error)
        return judge(fetch, error, *others)

    monkeypatch.setattr(SharedTask, "is_leader_specific", noted)
    rig.inner.failure = lambda call: InvalidRequest("bad") if "bad" in call else None
    rig.inner.gate.shut()
    inputs = [f"t{i}" for i in range(50)]
    failing = rig.start("bad", *inputs)
    await settle()
    good = rig.start(*inputs)
    await settle()
    rig.inner.gate.open()
    _right(await good, inputs)
    with pytest.raises(InvalidRequest):
        await failing
    assert len(judged) == 1


async def test_many_clients_with_bad_keys_fail_together():
    """Nobody waits for the purchases of a hundred others, each of which fails by its own key."""
    rig = Rig()
    rig.inner.failure = lambda _: ClientKeyRefused("no")
    rig.inner.gate.shut()
    keys = [Credential(f"secret {i}", f"key-{i}") for i in range(100)]
    tasks = [rig.start("a", context=Context(credential=key)) for key in keys]
    await settle()
    for _ in range(5):
        while rig.inner.gate.held:
            rig.inner.gate.let()
        await settle()
    assert all(task.done() for task in tasks)
    assert {type(task.exception()) for task in tasks} == {ClientKeyRefused}
    assert len(rig.inner.calls) == 100


async def test_who_asked_for_what_was_refused_is_refused():
    """A joiner whose own inputs the fill was for gets its refusal, and nobody is asked again."""
    rig = Rig()
    refusal = InvalidRequest("no", code="bad_input")
    rig.inner.failure = lambda _: refusal
    rig.inner.gate.shut()
    requests = [rig.start("bad"), rig.start("bad", "bad"), rig.start("other", "bad")]
    await settle()
    rig.inner.gate.open()
    for answer in await asyncio.gather(*requests, return_exceptions=True):
        assert answer is refusal
    assert rig.inner.asked == ["bad", "other"]


@pytest.mark.parametrize(
    "failure",
    [
        InvalidRequest("no"),
        NoRoute("nowhere"),
        DeadlineExceeded("late"),
        RateLimited("fake", "too many"),
        ValueError("a defect"),
    ],
    ids=lambda failure: type(failure).__name__,
)
async def test_a_failed_fill_stores_nothing_and_is_everyones(failure):
    """All who wait get the failure itself, nothing is kept, and the next request asks anew."""
    rig = Rig()
    await rig.embed("old")
    rig.inner.failure = lambda _: failure
    rig.inner.gate.shut()
    requests = [rig.start("old", "a", "b") for _ in range(3)]
    await settle()
    rig.inner.gate.open()
    assert await asyncio.gather(*requests, return_exceptions=True) == [failure] * 3
    assert list(rig.store.records) == [key_of("old", SPACE).address]
    assert rig.inner.asked == ["old", "a", "b"]
    rig.inner.failure = lambda _: None
    assert (await rig.embed("a", "b")).outcomes == [MISS, MISS]


async def test_a_failure_does_not_take_what_was_bought_apart_from_it():
    """A request whose joined fill fails, fails; what its own fill bought is kept for the retry."""
    rig = Rig()
    rig.inner.failure = lambda inputs: RateLimited("fake", "no") if "a" in inputs else None
    rig.inner.gate.shut()
    requests = [rig.start("a"), rig.start("a", "b")]
    await settle()
    rig.inner.gate.open()
    results = await asyncio.gather(*requests, return_exceptions=True)
    assert [type(result) for result in results] == [RateLimited] * 2
    rig.inner.failure = lambda _: None
    assert (await rig.embed("a", "b")).outcomes == [MISS, HIT]


async def test_a_cancelled_leader_leaves_its_purchase_to_the_joiner():
    """The one who started the call goes away; the call goes on for the one who joined."""
    rig = Rig()
    rig.inner.gate.shut()
    leader = rig.start("a", "b")
    await settle()
    joiner = rig.start("b")
    await settle()
    leader.cancel()
    await settle()
    rig.inner.gate.open()
    assert _right(await joiner, ["b"]).outcomes == [JOIN]
    assert leader.cancelled()
    assert (await rig.embed("a")).outcomes == [HIT]
    assert rig.inner.asked == ["a", "b"]


async def test_a_purchase_nobody_waits_for_is_called_off():
    """When all have gone the call is cancelled, nothing is kept, and the next one asks anew."""
    rig = Rig()
    rig.inner.gate.shut()
    requests = [rig.start("a"), rig.start("a")]
    await settle()
    for request in requests:
        request.cancel()
    await settle()
    assert rig.inner.gate.held == []
    rig.inner.gate.open()
    assert rig.store.records == {}
    assert (await rig.embed("a")).outcomes == [MISS]


# Time.


@pytest.mark.parametrize("left", [-1.0, 0.0, 1.0], ids=["past", "now", "soon"])
@in_virtual_time
async def test_a_request_ends_at_its_deadline(left):
    """Once the time is up the request fails as such, and its purchase is called off."""
    rig = Rig()
    rig.inner.gate.shut()
    context = Context(deadline=asyncio.get_running_loop().time() + left)
    with pytest.raises(DeadlineExceeded):
        await rig.embed("a", context=context)
    await settle()
    assert rig.inner.gate.held == []
    assert (len(rig.in_flight), rig.store.records) == (0, {})


async def test_hits_are_served_past_the_deadline():
    """What is at hand is given out however late it is; only waiting has an end."""
    rig = Rig()
    await rig.embed("a")
    context = Context(deadline=asyncio.get_running_loop().time() - 1)
    assert (await rig.embed("a", context=context)).outcomes == [HIT]


@pytest.mark.parametrize("hasty", [0, 1], ids=["leader", "joiner"])
@in_virtual_time
async def test_one_deadline_is_not_anothers(hasty):
    """One whose time is up leaves the purchase to the other, whichever of them started it."""
    rig = Rig()
    rig.inner.gate.shut()
    soon = Context(deadline=asyncio.get_running_loop().time() + 1)
    requests = [rig.start("a", context=soon if i == hasty else ANY_TIME) for i in range(2)]
    with pytest.raises(DeadlineExceeded):
        await requests[hasty]
    rig.inner.gate.open()
    assert _right(await requests[1 - hasty], ["a"]).outcomes == [JOIN if hasty == 0 else MISS]
    assert rig.inner.asked == ["a"]


async def test_the_context_reaches_the_wrapped_embedder():
    """Space, deadline, user and account go on as they came."""
    rig = Rig()
    context = Context(deadline=asyncio.get_running_loop().time() + 60, user="someone", account=TEAM)
    await rig.embed("a", "b", context=context)
    ((space, inputs, theirs),) = rig.inner.calls
    theirs = replace(theirs, on_part=None, on_charge=None)
    assert (space, inputs, theirs) == (SPACE, ["a", "b"], context)


# What is kept.


class CalledOff(FakeEmbedder):
    """Brings its answer in a task that is called off while the answer is written."""

    async def embed(self, space, inputs, context):
        embedded = await super().embed(space, inputs, context)
        bringing = asyncio.create_task(context.on_part(range(len(inputs)), embedded))
        await settle()
        bringing.cancel()
        await asyncio.wait([bringing])
        return embedded


async def test_a_write_outlives_who_brought_what_is_written():
    """It is bought: the write goes on, and is waited for by who asked."""
    rig = Rig(CalledOff())
    rig.store.writing.shut()
    request = rig.start("a")
    for _ in range(5):
        await settle()
    assert not request.done()
    rig.store.writing.open()
    assert _right(await request, ["a"]).outcomes == [MISS]
    assert len(rig.store.records) == 1


async def test_what_was_bought_is_stored_before_anyone_has_it():
    """Neither who bought nor who joined is answered before the write has ended."""
    rig = Rig()
    rig.store.writing.shut()
    requests = [rig.start("a"), rig.start("a")]
    await settle()
    assert rig.inner.asked == ["a"]
    # While the write is under way, others join it still.
    requests.append(rig.start("a"))
    for _ in range(2):
        await settle()
        assert not any(request.done() for request in requests)
        rig.store.writing.let()
    assert [(await request).outcomes for request in requests] == [[MISS], [JOIN], [JOIN]]
    assert list(rig.store.records) == [key_of("a", SPACE).address]


async def test_everything_bought_in_a_call_is_one_write():
    """All vectors of a fill go to the disk together."""
    rig = Rig()
    rig.store.writing.shut()
    request = rig.start("a", "b", (1,))
    await settle()
    assert len(rig.store.writing.held) == 1
    rig.store.writing.open()
    await request
    assert len(rig.store.records) == 3


async def test_after_a_restart_nothing_is_bought_again(tmp_path):
    """With the real disk tier, another process's purchases come back bit for bit."""
    inputs = [*(f"text {i}" for i in range(700)), *((i,) for i in range(700))]
    first, second = FakeEmbedder(), FakeEmbedder()
    for inner in (first, second):
        async with Store(tmp_path, 1 << 30) as store:
            await Rig(inner, store).embed(*inputs)
    assert (len(first.asked), second.asked) == (1400, [])


@pytest.mark.parametrize("memory", [0, MIB])
async def test_a_store_that_fails_fails_no_request(memory):
    """With a disk that keeps nothing everything is still answered, from memory if there is any."""
    rig = Rig(memory=memory)
    rig.store.broken = True
    assert (await rig.embed("a", "b")).outcomes == [MISS, MISS]
    assert (await rig.embed("b")).outcomes == [HIT if memory else MISS]


async def test_a_locked_database_fails_no_request(tmp_path, monkeypatch):
    """While another process holds the real store's lock, requests are answered, and paid once."""
    monkeypatch.setattr(database, "BUSY_SECONDS", 0.01)
    async with Store(tmp_path, 1 << 30) as store:
        rig = Rig(store=store, memory=0)
        await rig.embed("old")
        lock = sqlite3.connect(store.folder / "cache.db", isolation_level=None)
        lock.execute("BEGIN IMMEDIATE")
        assert (await rig.embed("old", "new")).outcomes == [HIT, MISS]
        lock.execute("ROLLBACK")
        lock.close()
        assert (await rig.embed("old", "new")).outcomes == [HIT, HIT]


async def test_how_tokens_were_found_is_kept():
    """One apportioned count makes the whole answer an apportioned one, also when it is a hit."""
    rig = Rig(memory=0)
    assert (await rig.embed("counted")).counted is True
    rig.inner.counted = False
    assert (await rig.embed("counted", "apportioned")).counted is False
    assert (await rig.embed("counted", "apportioned")).counted is False
    assert (await rig.embed("counted")).counted is True


# What is kept apart.


async def test_spaces_share_nothing():
    """One text in several spaces is several inputs, at the same time and afterwards."""
    spaces = [
        SPACE,
        Space("other", 3),
        SPACE.with_parameters({"task": "query"}),
        SPACE.with_parameters({"task": "passage"}),
    ]
    rig = Rig()
    rig.inner.gate.shut()
    requests = [rig.start("a", space=space) for space in spaces]
    await settle()
    rig.inner.gate.open()
    for request, space in zip(requests, spaces, strict=True):
        assert _right(await request, ["a"], space).outcomes == [MISS]
        assert (await rig.embed("a", space=space)).outcomes == [HIT]
    assert len(rig.inner.calls) == len(spaces)


async def test_inputs_that_look_alike_share_nothing():
    """Text and tokens, case and white space: each is bought and answered for itself."""
    inputs = [
        "123",
        (123,),
        "[1, 2]",
        "1,2",
        (1, 2),
        "US",
        "us",
        " us",
        "us\n",
        "\u00e9",
        "e\u0301",
    ]
    rig = Rig()
    assert (await rig.embed(*inputs)).outcomes == [MISS] * len(inputs)
    assert (await rig.embed(*reversed(inputs))).outcomes == [HIT] * len(inputs)


async def test_namespaces_share_nothing():
    """Tenants buy for themselves, also at the same time."""
    rig = Rig()
    rig.inner.gate.shut()
    requests = [rig.start("x", context=Context(namespace=name)) for name in ("", "a", "b")]
    await settle()
    rig.inner.gate.open()
    assert [(await request).outcomes for request in requests] == [[MISS]] * 3
    assert rig.inner.asked == ["x"] * 3


async def test_a_record_of_another_width_is_not_served():
    """A model described anew with another width gets vectors of that width, not the old ones."""
    rig = Rig(memory=0)
    for space in (Space("m", 3), Space("m", 5), Space("m", 5)):
        await rig.embed("a", space=space)
    assert rig.inner.asked == ["a", "a"]
    assert rig.tiers.counters.mismatches == 0


async def test_what_landed_while_a_refused_joiner_waited_is_not_bought_again():
    """One whose first fill was refused, and who still waits for a second, looks again after it."""
    rig = Rig()
    rig.inner.failure = lambda inputs: InvalidRequest("no") if "bad" in inputs else None
    rig.inner.gate.shut()
    refused = rig.start("bad", "good")
    slow = rig.start("slow")
    await settle()
    joiner = rig.start("good", "slow")
    await settle()
    rig.inner.gate.let(0)  # the call with "bad" is refused; the joiner still waits for "slow"
    await settle()
    third = rig.start("good")
    await settle()
    rig.inner.gate.let(1)  # the third buys "good" and lands
    assert (await third).outcomes == [MISS]
    rig.inner.gate.open()
    with pytest.raises(InvalidRequest):
        await refused
    await slow
    assert _right(await joiner, ["good", "slow"]).outcomes == [HIT, JOIN]
    assert rig.inner.asked == ["bad", "good", "slow", "good"]


@in_virtual_time
async def test_a_joiner_outlives_the_leaders_deadline():
    """The leader's time is up while the wrapped embedder waits; the joiner's is not."""

    class Timed(FakeEmbedder):
        async def embed(self, space, inputs, context):
            try:
                async with asyncio.timeout_at(context.deadline):
                    return await super().embed(space, inputs, context)
            except TimeoutError as error:
                raise UpstreamTimeout("fake", "no time left") from error

    rig = Rig(Timed())
    rig.inner.gate.shut()
    leader = rig.start("a", context=Context(deadline=asyncio.get_running_loop().time() + 1))
    joiner = rig.start("a")
    await asyncio.wait([leader])
    await settle()
    rig.inner.gate.open()
    _right(await joiner, ["a"])
    with pytest.raises(EmbeddingError):
        await leader


async def test_no_vector_of_another_width_is_served():
    """A space described with two widths never gets the one's vector for the other."""
    rig = Rig()
    for width in (3, 5, 3):
        await rig.embed("a", space=Space("m", width))


@pytest.mark.parametrize("item", ["\ud800", (-1,), (1 << 32,)])
async def test_what_has_no_bytes_is_refused_as_the_contract_says(item):
    """An input that cannot be written down is an EmbeddingError like every other failure."""
    with pytest.raises(InvalidRequest):
        await Rig().embedder.embed(SPACE, [item], ANY_TIME)


# What is summed.


async def test_each_answer_is_summed_by_how_it_came():
    """Hits, joins, misses and duplicates of a request are in the sums, with their tokens."""
    rig = Rig()
    await rig.embed("old")
    rig.inner.gate.shut()
    other = rig.start("theirs")
    await settle()
    request = rig.start("new", "theirs", "old", "new", "old")
    await settle()
    rig.inner.gate.open()
    await asyncio.gather(other, request)
    assert rig.store.usage == Usage(
        hits=1,
        joins=1,
        misses=3,
        duplicates=2,
        tokens_saved=tokens_of("theirs") + 2 * tokens_of("old") + tokens_of("new"),
        tokens_billed=tokens_of("old") + tokens_of("theirs") + tokens_of("new"),
        nanodollars_billed=20 * (tokens_of("old") + tokens_of("theirs") + tokens_of("new")),
    )


async def test_a_purchase_is_summed_though_its_buyer_is_gone():
    """What was bought for one who went away counts once as bought, and for the joiner as saved."""
    rig = Rig()
    rig.inner.gate.shut()
    leader = rig.start("a", "b")
    await settle()
    joiner = rig.start("a")
    await settle()
    leader.cancel()
    await settle()
    rig.inner.gate.open()
    await joiner
    assert rig.store.usage == Usage(
        joins=1,
        misses=2,
        tokens_saved=tokens_of("a"),
        tokens_billed=tokens_of("a") + tokens_of("b"),
        nanodollars_billed=20 * (tokens_of("a") + tokens_of("b")),
    )


async def test_a_request_that_fails_is_in_no_sum():
    """Neither what failed nor what was at hand for it counts as answered."""
    rig = Rig()
    await rig.embed("old")
    before = rig.store.usage
    rig.inner.failure = lambda _: NoRoute("nowhere")
    with pytest.raises(NoRoute):
        await rig.embed("old", "new", "new")
    assert rig.store.usage == before


@settings(deadline=None)
@given(REQUESTS, LIMITS, st.data())
async def test_in_any_interleaving_the_sums_are_those_of_the_answers(requests, limit, draw):
    """Whoever waits for whom: the sums are what was answered and billed, each input once."""
    gate = Turnstile()
    rig = Rig(FakeEmbedder(gate), FakeStore(gate), limit)
    tasks, _ = await _interleave(draw, rig, gate, requests)
    answers = [task.result() for task in tasks]
    outcomes = Counter(outcome for answer in answers for outcome in answer.outcomes)
    billed = sum(answer.usage.tokens_billed for answer in answers)
    assert rig.store.usage == Usage(
        hits=outcomes[HIT],
        joins=outcomes[JOIN],
        misses=outcomes[MISS],
        duplicates=outcomes[DUPLICATE],
        tokens_saved=sum(sum(answer.tokens) for answer in answers) - billed,
        tokens_billed=billed,
        nanodollars_billed=20 * billed,
    )


@settings(deadline=None)
@given(st.lists(st.tuples(INPUTS, st.sampled_from(["", "a", "A", "a ", "b"])), max_size=12), LIMITS)
async def test_in_any_order_namespaces_share_nothing(steps, limit):
    """Each tenant buys each input once, whatever the others have, and is served its own."""
    rig, bought = Rig(memory=limit), set()
    for item, namespace in steps:
        embedded = await rig.embed(item, context=Context(namespace=namespace))
        assert embedded.outcomes == [HIT if (item, namespace) in bought else MISS]
        bought.add((item, namespace))
    assert len(rig.inner.asked) == len(bought)
    assert len(rig.store.records) == len(bought)


async def test_namespaces_are_partitions_on_disk(tmp_path):
    """Tenants' entries lie in partitions of their own, so that one can be purged alone."""
    async with Store(tmp_path, 1 << 30) as store:
        rig = Rig(store=store, memory=0)
        for name in ("", "a", "b"):
            await rig.embed("x", "y", context=Context(namespace=name))
        chosen = purge.PurgeFilter(namespace="a")
        with opened(tmp_path, 1 << 30) as file:
            assert purge.count_entries(file, chosen)[0] == 2
            assert sum(purge.delete(file, chosen)) == 2
        for name in ("", "a", "b"):
            embedded = await rig.embed("x", "y", context=Context(namespace=name))
            assert embedded.outcomes == [MISS if name == "a" else HIT] * 2
