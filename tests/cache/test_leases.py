"""Several processes on one store: each text is bought by whoever has its lease, the others wait."""

import asyncio
import contextlib
import time
from collections import Counter
from dataclasses import dataclass, field

import pytest
from clock import run_virtual as run
from embedding_proxy.cache import record
from embedding_proxy.cache.embedder import CachingEmbedder
from embedding_proxy.cache.in_flight import InFlight
from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.cache.leases import FRESH_S, MAX_PAUSE_S, MIN_PAUSE_S
from embedding_proxy.cache.memory import Memory
from embedding_proxy.cache.tiers import Tiers
from embedding_proxy.providers.base import CachePolicy, Context, Outcome, Space
from embedding_proxy.providers.errors import DeadlineExceeded, InvalidRequest, ProviderError
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.cache.fakes import (
    FakeEmbedder,
    FakeStore,
    Turnstile,
    entry_of,
    key_of,
    settle,
    vector_of,
)

SPACE = Space("m", 3)
JOIN, MISS = Outcome.JOIN, Outcome.MISS


@dataclass
class LeaseTable:
    """The leases of all processes: who holds which."""

    holders: dict[bytes, object] = field(default_factory=dict)


class FakeLeases:
    """The leases of one process, in a table."""

    def __init__(self, table, store):
        self.table = table.holders
        self.store = store
        self.grants = Counter()
        self.asked = 0
        self.is_dead = False
        self.late_s = 0.0
        self.unwritten = []
        """What was given back as written, and was not in the store."""

    async def acquire(self, addresses):
        self.asked += 1
        granted = [a for a in addresses if self.table.setdefault(a, self) is self]
        self.grants.update(granted)
        return granted

    def release(self, addresses, *, is_written):
        for address in () if self.is_dead else addresses:
            self.grants[address] -= 1
            assert self.grants[address] >= 0
            if not self.grants[address]:
                assert self.table.pop(address) is self
            if is_written and address not in self.store.records:
                self.unwritten.append(address)

    def lapsed_s(self, _):
        return self.late_s

    def kill(self):
        """Free all that it holds, as the kernel does."""
        self.is_dead = True
        for address in [a for a, holder in self.table.items() if holder is self]:
            del self.table[address]


class Process:
    """A process of its own, on a store that it shares."""

    def __init__(self, store, table):
        self.inner = FakeEmbedder(Turnstile())
        self.tiers = Tiers(Memory(1 << 20), store)
        self.leases = FakeLeases(table, store)
        self.in_flight = InFlight(self.leases)
        self.embedder = CachingEmbedder(self.inner, self.tiers, self.in_flight)

    def ask(self, inputs, deadline_s=60.0, **fields):
        """Ask for inputs, and let it come to where it waits."""
        now = asyncio.get_running_loop().time()
        context = Context(deadline=now + deadline_s, begun=now, **fields)
        return asyncio.create_task(self.embedder.embed(SPACE, [*inputs], context))


class Rig:
    """Some processes on one store."""

    def __init__(self, count=2):
        self.store, self.table = FakeStore(), LeaseTable()
        self.processes = [Process(self.store, self.table) for _ in range(count)]

    @property
    def bought(self):
        """What was asked of upstreams, by whichever process."""
        return sorted(item for process in self.processes for item in process.inner.asked)


def test_the_second_process_waits_for_what_the_first_one_buys():
    """It gets the record as soon as it is there, is billed nothing, and buys what nobody buys."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        first = one.ask("ab")
        await settle()
        second = two.ask("bc")
        third = two.ask("bd")
        await asyncio.sleep(1.0)
        assert (one.inner.asked, sorted(two.inner.asked)) == (["a", "b"], ["c", "d"])
        one.inner.gate.open()
        await first
        opened = asyncio.get_running_loop().time()
        answers = await second, await third
        assert asyncio.get_running_loop().time() - opened <= MAX_PAUSE_S
        for answer, inputs in zip(answers, ("bc", "bd"), strict=True):
            assert answer.vectors == [vector_of(item, SPACE) for item in inputs]
            assert answer.outcomes == [JOIN, MISS]
            assert (answer.usage.joins, answer.usage.misses) == (1, 1)
        assert rig.store.usage.misses == 4
        assert rig.bought == ["a", "b", "c", "d"]
        assert not rig.table.holders
        assert not one.leases.unwritten + two.leases.unwritten
        counters = two.tiers.counters
        assert (counters.memory_hits, counters.disk_hits, counters.misses) == (0, 0, 4)

    run(work())


def test_requests_of_a_process_wait_for_another_one_together():
    """They join the fetch that waits: one of them asks for the lease."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        tasks = [one.ask("a")]
        await settle()
        tasks += [two.ask("a") for _ in range(5)]
        await settle()
        assert (len(two.in_flight), two.leases.asked) == (1, 1)
        one.inner.gate.open()
        outcomes = [(await task).outcomes for task in tasks]
        assert outcomes == [[MISS]] + [[JOIN]] * 5
        assert rig.bought == ["a"]

    run(work())


@pytest.mark.parametrize("end", ["killed", "failed"])
def test_the_next_in_line_takes_over(end):
    """When the buyer has died, or failed: by the next poll another one buys."""

    async def work():
        rig = Rig(3)
        one, *others = rig.processes
        one.inner.gate.shut()
        first = one.ask("a")
        await settle()
        waiting = [process.ask("a") for process in others]
        await asyncio.sleep(1.0)
        if end == "killed":
            one.leases.kill()
        else:
            one.inner.failure = lambda _: ProviderError("p", "down")
            one.inner.gate.open()
            with pytest.raises(ProviderError):
                await first
        freed = asyncio.get_running_loop().time()
        outcomes = sorted([(await task).outcomes[0] for task in waiting])
        assert asyncio.get_running_loop().time() - freed <= 2 * MAX_PAUSE_S
        assert outcomes == [JOIN, MISS]
        assert rig.bought == ["a", "a"]
        first.cancel()

    run(work())


def test_nobody_waits_beyond_the_deadline():
    """Who waits fails when the time is up; another one that came along waits on, and buys."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        loop = asyncio.get_running_loop()
        one.inner.gate.shut()
        first = one.ask("a")
        await settle()
        began = loop.time()
        short, long = two.ask("a", deadline_s=3.0), two.ask("a", deadline_s=9.0)
        with pytest.raises(DeadlineExceeded):
            await short
        assert loop.time() - began == pytest.approx(3.0)
        await asyncio.sleep(1.0)
        assert not long.done()
        first.cancel()
        assert (await long).outcomes == [MISS]

    run(work())


@pytest.mark.parametrize("age", [0.0, 2 * FRESH_S])
def test_a_look_up_is_trusted_for_a_moment(age):
    """Granted a lease long after it has looked, a request looks again before it buys."""

    async def work():
        rig = Rig(1)
        (one,) = rig.processes
        rig.store.reading.shut()
        late = one.ask("a")
        await settle()
        rig.store.reading.let()
        await settle()
        # It has looked, and does not know yet.
        entry = entry_of("a", SPACE)
        rig.store.records[key_of("a", SPACE).address] = record.encode(entry)
        await asyncio.sleep(age)
        rig.store.reading.open()
        assert (await late).outcomes == [JOIN if age else MISS]
        assert not rig.table.holders

    run(work())


@pytest.mark.parametrize("age", [0.0, 2 * FRESH_S])
def test_a_look_up_that_was_made_before_the_answer_began_is_as_old_as_it_is(age):
    """A connection looks up first; the task that answers may have its turn much later."""

    async def work():
        rig = Rig(1)
        (one,) = rig.processes
        rig.store.is_quick = True
        ring = keyring(SPACE, Namespace(""))
        lookup = one.embedder.lookup_nowait(ring, ["a"])
        rig.store.records[key_of("a", SPACE).address] = record.encode(entry_of("a", SPACE))
        await asyncio.sleep(age)
        context = Context(begun=asyncio.get_running_loop().time())
        embedded = await one.embedder.embed(SPACE, ["a"], context, lookup)
        assert embedded.outcomes == [JOIN if age else MISS]

    run(work())


def test_namespaces_and_spaces_wait_for_nothing_of_each_other():
    """The lease is of one record: of a text in one namespace and one space."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        first = one.ask("a")
        await settle()
        await two.ask("a", namespace="another")
        await two.embedder.embed(Space("m", 3, parameters=(("p", b"1"),)), ["a"], Context())
        assert two.inner.asked == ["a", "a"]
        one.inner.gate.open()
        await first

    run(work())


@pytest.mark.parametrize("terms", [CachePolicy(write=False), CachePolicy(max_age=0)], ids=str)
def test_who_leaves_no_trace_or_takes_no_entry_has_no_part_in_it(terms):
    """Such requests wait for no lease, and nobody waits for them."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        waiting = [one.ask("a"), one.ask("b", terms=terms)]
        await settle()
        assert (await two.ask("a", terms=terms)).outcomes == [MISS]
        assert (await two.ask("b")).outcomes == [MISS]
        one.inner.gate.open()
        await asyncio.wait(waiting)
        assert two.leases.asked == 1

    run(work())


def test_one_that_accepts_older_entries_takes_only_what_is_new_enough():
    """A record that is older than the request accepts is not what it waits for."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        await one.ask("a")
        rig.store.stored = time.time() - 1000
        one.inner.gate.shut()
        newer = one.ask("a", terms=CachePolicy(max_age=1e-9))
        await settle()
        waiting = two.ask("a", terms=CachePolicy(max_age=100))
        await asyncio.sleep(1)
        assert not two.inner.asked
        rig.store.stored = time.time()
        one.inner.gate.open()
        await newer
        assert (await waiting).outcomes == [JOIN]

    run(work())


def test_a_failure_ends_the_wait_for_others():
    """What the request buys itself has failed: it does not wait for the rest, nor hold a lease."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        first = one.ask("a")
        await settle()
        two.inner.failure = lambda _: ProviderError("p", "down")
        with pytest.raises(ProviderError):
            await two.ask("ab")
        assert {*rig.table.holders} == {key_of("a", SPACE).address}
        one.inner.gate.open()
        await first
        assert not rig.table.holders

    run(work())


def test_a_bad_input_is_named_by_its_place_in_the_request():
    """Also where other inputs of the request are bought elsewhere."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        first = one.ask("ab")
        await settle()
        two.inner.failure = lambda _: InvalidRequest("bad", index=1)
        with pytest.raises(InvalidRequest) as failed:
            await two.ask("acbd")
        assert failed.value.index == 3
        one.inner.gate.open()
        await first

    run(work())


@pytest.mark.parametrize("how", ["leave", "close"])
def test_whoever_gives_up_holds_nothing(how):
    """A request that is cancelled while it waits, and buys, gives its leases back."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        two.inner.gate.shut()
        first = one.ask("a")
        await settle()
        leaving = two.ask("ab")
        await asyncio.sleep(1)
        assert two.inner.asked == ["b"]
        if how == "close":
            await two.in_flight.close()
        leaving.cancel()
        await settle()
        assert len(two.in_flight) == 0
        assert {*rig.table.holders} == {key_of("a", SPACE).address}
        one.inner.gate.open()
        await first

    run(work())


def test_a_call_that_was_begun_is_finished_though_nobody_waits():
    """Only what it waits for is given up; the lease is held until the record is there."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        first = one.ask("a")
        await settle()
        calls = []

        async def embed(space, inputs, context):
            context.on_begin(range(len(inputs)))
            calls.append(context)
            return await FakeEmbedder.embed(two.inner, space, inputs, context)

        two.inner.gate.shut()
        two.inner.embed = embed
        leaving = two.ask("ab")
        await settle()
        leaving.cancel()
        await asyncio.sleep(1)
        assert len(rig.table.holders) == 2
        two.inner.gate.open()
        await two.in_flight.drain()
        assert {*rig.store.records} == {key_of("b", SPACE).address}
        one.inner.gate.open()
        await first
        assert rig.bought == ["a", "b"]
        assert not rig.table.holders

    run(work())


@pytest.mark.parametrize("is_newer", [True, False])
def test_what_was_bought_too_late_replaces_nothing_newer(is_newer):
    """A process that was stopped meanwhile keeps, answers with and counts what it has bought."""

    async def work():
        rig = Rig()
        one, two = rig.processes
        one.inner.gate.shut()
        late = one.ask("ab")
        await settle()
        newer = record.encode(entry_of("a", SPACE, tokens=99))
        if is_newer:
            rig.store.records[key_of("a", SPACE).address] = newer
            rig.store.stored = time.time() - 2.0
        one.leases.late_s = 5.0
        one.inner.gate.open()
        assert (await late).outcomes == [MISS, MISS]
        assert (rig.store.records[key_of("a", SPACE).address] == newer) == is_newer
        assert key_of("b", SPACE).address in rig.store.records
        assert rig.store.flushed.misses == 2
        assert (await two.ask("ab")).usage.hits == 2

    run(work())


class Play:
    """What may come to processes that buy the same texts, and how often each text may be bought."""

    def __init__(self):
        self.rig = Rig(3)
        self.asked = []
        self.spoilt = Counter()
        """Purchases of a text that may have come to nothing."""
        for process in self.rig.processes:
            process.inner.gate.shut()

    async def play(self, kind, number=0, inputs=""):
        """Let something happen to a process."""
        process = self.rig.processes[number]
        if process.leases.is_dead:
            return
        if kind == "ask":
            self.asked.append((process, inputs, process.ask(inputs)))
        elif kind == "kill":
            process.leases.kill()
            self.spoilt.update(process.inner.asked)
            self._cancel(process)
        elif kind == "leave":
            self.spoilt.update("abc")
            self._cancel(process, at_most=1)
        elif kind == "fail":
            self.spoilt.update("abc")
            process.inner.failure = lambda _: ProviderError("p", "down")
        if kind in {"answer", "fail"} and process.inner.gate.held:
            process.inner.gate.let()
        await (asyncio.sleep(MIN_PAUSE_S) if kind == "wait" else settle())
        process.inner.failure = lambda _: None

    def _cancel(self, process, at_most=None):
        mine = [task for owner, _, task in self.asked if owner is process and not task.done()]
        for task in mine[:at_most]:
            task.cancel()

    async def end(self):
        """Let everybody have an answer, and check each."""
        for process in self.rig.processes:
            process.inner.gate.open()
        for _, inputs, task in self.asked:
            with contextlib.suppress(ProviderError, asyncio.CancelledError):
                answer = await task
                assert answer.vectors == [vector_of(item, SPACE) for item in inputs]
                assert answer.usage.inputs == len(inputs)
        bought = Counter(self.rig.bought)
        assert not [text for text in bought if bought[text] > 1 + self.spoilt[text]]
        assert not self.rig.table.holders


STEPS = st.one_of(
    st.tuples(st.just("ask"), st.integers(0, 2), st.sampled_from(["a", "b", "ab", "bc", "abc"])),
    st.tuples(st.sampled_from(["answer", "fail", "kill", "leave"]), st.integers(0, 2)),
    st.tuples(st.just("wait")),
)


@settings(deadline=None)
@given(st.lists(STEPS, max_size=25))
def test_each_text_is_bought_once_whatever_happens(steps):
    """But for the purchases that failed, or whose process was killed, or that nobody wanted."""

    async def work():
        play = Play()
        for step in steps:
            await play.play(*step)
        await play.end()

    run(work())
