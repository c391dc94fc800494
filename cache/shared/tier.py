"""The shared tier: records in Redis that all nodes read and write, verified like those of the disk.

Reads of several requests go together: while MAX_READS exchanges are under way, further keys wait,
and share the next one. Records are written in the background, in the order of their purchase, from
a queue of at most MAX_QUEUED_BYTES; a write that gets no answer is tried again. One of a purchase
from before the last failure replaces no newer record: another node may have bought it meanwhile.

Failure licence: what is not answered in time, or does not verify, is a miss; what cannot be written
is dropped. Nothing raises, and nothing waits for a server that fails.
"""

import asyncio
import contextlib
import logging
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, Self, TypeAlias

from embedding_proxy.cache import record as records
from embedding_proxy.cache.key import Keys, Partition
from embedding_proxy.cache.record import Entry
from embedding_proxy.providers.failure_backoff import Backoff

from .client import UNAVAILABLE, Command, RedisClient, Unavailable
from .node import NodeCounters, Refused
from .value import KIND, SET_NEWER, pack, unpack

log = logging.getLogger("embedding_proxy.shared")

MAX_READS = 4
"""Exchanges of reads that are under way at a time."""
MAX_READ = 2048
"""Keys of one."""
MAX_QUEUED_BYTES = 64 << 20
"""Of records that wait to be written; beyond it the oldest are dropped."""
MAX_WRITE_BYTES = 1 << 20
"""Of one exchange of writes."""
MAX_TRIES = 3
WRITE_LIMIT_S = 0.25
"""The time limit of a write: nobody waits for it."""
RETRY_S = 0.1
"""After a write without an answer, and while the breaker is open."""
FLUSH_S = 1.0
"""What the queue is given at the end."""
SLICE = 256
"""Values that are verified in one go; between two goes, others get their turn."""


@dataclass(slots=True)
class SharedCounters:
    """Counts since the start. Of keys that were asked for: hits + misses + errors."""

    hits: int = 0
    misses: int = 0
    """There is none, or none that is new enough, of the width, or whole."""
    errors: int = 0
    """There was no answer in time."""
    mismatches: int = 0
    """Of the misses, those that were damaged, or about something else."""
    writes: int = 0
    """Records written."""
    write_errors: int = 0
    """Records that were refused, or dropped for want of an answer or of room in the queue."""


class SharedEntry(NamedTuple):
    """An entry of the shared tier that was verified."""

    entry: Entry
    stored: float
    """When it was bought, in seconds since 1970."""


class _Write(NamedTuple):
    key: bytes
    value: bytes
    stored: float
    number: int
    """How many records were put before, and with it."""
    replaces: bool = True
    """Whether it takes the place of any record; else only of an older one."""
    tries: int = 0


_Value: TypeAlias = bytes | Literal[Unavailable.UNAVAILABLE] | None


class _Read(NamedTuple):
    keys: Sequence[bytes]
    answer: asyncio.Future[list[_Value]]


class SharedTier:
    """Records by address. It opens and closes its client. For one event loop.

    `ttl_s` is the age at which the server deletes a record, and at which none is served any more.
    `is_float16`: whether vectors are written with 16 bits a number, which loses precision.
    `clock` returns seconds since 1970.
    """

    def __init__(
        self,
        redis: RedisClient,
        *,
        ttl_s: float | None = None,
        is_float16: bool = False,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.redis = redis
        self.counters = SharedCounters()
        self.refusal = ""
        """Why the server takes no records, while it does not."""
        self._ttl_s = ttl_s
        self._is_float16 = is_float16
        self._clock = clock
        self._waiting: deque[_Read] = deque()
        self._reads: set[asyncio.Task[None]] = set()
        self._queue: deque[_Write] = deque()
        self._queued_bytes = 0
        self._writing: Sequence[_Write] = ()
        """What was taken from the queue, and has no answer yet."""
        self.put_count = 0
        """How many records were put in the queue so far."""
        self._writer: asyncio.Task[None] | None = None
        self._failed_at = float("-inf")
        """When a write last had no answer, or could not be sent, by the clock."""
        self._refusals = Backoff()
        self._is_closed = False

    async def __aenter__(self) -> Self:
        await self.redis.__aenter__()
        return self

    async def __aexit__(self, *exc: object) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_S if self.redis.is_available else 0):
                await self.flush()
        self._is_closed = True
        tasks = [*self._reads, *([self._writer] if self._writer else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        while self._waiting:
            read = self._waiting.popleft()
            if not read.answer.done():
                read.answer.set_result([UNAVAILABLE] * len(read.keys))
        await self.redis.__aexit__(*exc)

    @property
    def is_available(self) -> bool:
        """Whether at least one server is asked."""
        return self.redis.is_available

    @property
    def queued(self) -> int:
        """How many records wait to be written."""
        return len(self._queue)

    @property
    def client_counters(self) -> NodeCounters:
        """Counts of the exchanges with all servers."""
        return self.redis.counters

    async def lookup(
        self,
        keys: Keys,
        dimensions: int,
        tell_width: Callable[[bytes], None] = lambda _: None,
        *,
        is_counted: bool = True,
    ) -> list[SharedEntry | None]:
        """Return the entries of some keys of one partition, in their order. Never raises.

        One of another width than `dimensions` is none, and `tell_width` is told the record.
        """
        counters = self.counters if is_counted else SharedCounters()
        if self._is_closed or not self.redis.is_available:
            counters.errors += len(keys)
            return [None] * len(keys)
        values = await self._read([self.redis.key(KIND, address) for address in keys.addresses])
        errors = sum(value is UNAVAILABLE for value in values)
        not_before = -1.0 if self._ttl_s is None else self._clock() - self._ttl_s
        found: list[SharedEntry | None] = []
        for start in range(0, len(values), SLICE):
            if start:
                await asyncio.sleep(0)
            both = zip(values[start : start + SLICE], keys.digests[start:], strict=False)
            for value, digest in both:
                one = self._verify(value, digest, dimensions, tell_width, counters)
                found.append(one if one is not None and one.stored >= not_before else None)
        hits = len(found) - found.count(None)
        counters.hits += hits
        counters.errors += errors
        counters.misses += len(found) - hits - errors
        return found

    def put(
        self,
        entries: Mapping[bytes, Entry],
        partition: Partition,
        stored: float | None = None,
        *,
        replaces: bool = True,
    ) -> None:
        """Write entries in a while. `stored` is when they were bought; None = now. Never raises.

        `replaces`: whether they take the place of those that are there, and not only of older ones.
        """
        if self._is_closed or self._refusals.is_waiting:
            self.counters.write_errors += len(entries)
            return
        stored = self._clock() if stored is None else stored
        for address, entry in entries.items():
            record = records.encode(entry, is_float16=self._is_float16)
            value = pack(record, stored, partition)
            if value is not None:
                self.put_count += 1
                key = self.redis.key(KIND, address)
                self._add(_Write(key, value, stored, self.put_count, replaces))
        if self._writer is None and self._queue:
            self._writer = asyncio.create_task(self._write_queue())

    def is_queued(self, put_count: int) -> bool:
        """Tell whether one of the first so many records that were put is not written yet."""
        oldest = self._writing or self._queue
        return bool(oldest) and oldest[0].number <= put_count

    async def flush(self) -> None:
        """Wait until what was put so far is written or dropped: as long as there is no answer."""
        while self._writer is not None:
            await asyncio.wait([self._writer])

    async def prove_writes(self) -> str:
        """Write a value, read and delete it; return why that fails, or nothing. Never raises."""
        key, value = self.redis.key("check", os.urandom(8)), os.urandom(64)
        for words, expected in (
            ((b"SET", key, value, b"PX", 60_000), b"OK"),
            ((b"GET", key), value),
            ((b"DEL", key), 1),
        ):
            (answer,) = await self.redis.exchange([Command(key, words)])
            if isinstance(answer, Refused):
                return answer.message
            if answer is UNAVAILABLE:
                return self.redis.reason or "it does not answer in time"
            if answer != expected:
                return f"{words[0].decode()} is answered with something else than is expected"
        return ""

    async def eviction_policy(self) -> str | None:
        """Return what the server does when it is full; None if it has no limit, or does not say."""
        (answer,) = await self.redis.exchange([Command(None, (b"INFO", b"memory"))])
        if not isinstance(answer, bytes):
            return None
        told = dict(re.findall(r"^(maxmemory\w*):(\S+)", answer.decode(), re.MULTILINE))
        return None if told.get("maxmemory", "0") == "0" else told.get("maxmemory_policy")

    def snapshot(self) -> dict[str, object]:
        """Return how it is, for people."""
        client, counters = self.redis, self.redis.counters
        mean_s = counters.seconds / counters.exchanges if counters.exchanges else None
        return {
            "address": client.name,
            "state": "closed" if client.is_available else "open",
            "refuses_writes": self.refusal or None,
            **asdict(self.counters),
            "queued_writes": self.queued,
            "exchanges": counters.exchanges,
            "failures": counters.failures,
            "timeouts": counters.timeouts,
            "opened": counters.times_opened,
            "mean_ms": None if mean_s is None else round(1000 * mean_s, 3),
            "servers": {
                name: {
                    "state": "closed" if node.is_available else "open",
                    "why": None if node.is_available else node.reason,
                    "connections": node.connections,
                }
                for name, node in client.nodes.items()
            },
        }

    def _verify(
        self,
        value: _Value,
        digest: bytes,
        dimensions: int,
        tell_width: Callable[[bytes], None],
        counters: SharedCounters,
    ) -> SharedEntry | None:
        if not isinstance(value, bytes):
            return None
        shared = unpack(value)
        entry = shared and records.decode(shared.record, digest, dimensions)
        if shared is not None and entry is not None:
            return SharedEntry(entry, shared.stored)
        if shared is None or records.is_damaged(shared.record, digest):
            counters.mismatches += 1
        else:
            tell_width(shared.record)
        return None

    async def _read(self, keys: Sequence[bytes]) -> list[_Value]:
        """Return the values of some keys, together with those that others ask for."""
        answer: asyncio.Future[list[_Value]] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Read(keys, answer))
        if len(self._reads) < MAX_READS:
            self._reads.add(asyncio.create_task(self._read_waiting()))
        return await answer

    async def _read_waiting(self) -> None:
        try:
            while together := self._take_waiting():
                await self._read_together(together)
        finally:
            # Not by a callback of the task: a read that comes before it would wait for nobody.
            self._reads -= {asyncio.current_task()}

    def _take_waiting(self) -> list[_Read]:
        """Return reads for one exchange, without those that nobody waits for any more."""
        together: list[_Read] = []
        count = 0
        while self._waiting and (not together or count + len(self._waiting[0].keys) <= MAX_READ):
            read = self._waiting.popleft()
            if not read.answer.done():
                together.append(read)
                count += len(read.keys)
        return together

    async def _read_together(self, together: Sequence[_Read]) -> None:
        values: list[_Value] = []
        try:
            answers = await self.redis.get_many([key for read in together for key in read.keys])
            values = [a if a is None or isinstance(a, bytes) else UNAVAILABLE for a in answers]
        finally:
            start = 0
            for read in together:
                end = start + len(read.keys)
                if not read.answer.done():
                    read.answer.set_result(values[start:end] or [UNAVAILABLE] * len(read.keys))
                start = end

    def _add(self, write: _Write) -> None:
        self._queue.append(write)
        self._queued_bytes += len(write.value)
        while self._queued_bytes > MAX_QUEUED_BYTES:
            self._queued_bytes -= len(self._queue.popleft().value)
            self.counters.write_errors += 1

    async def _write_queue(self) -> None:
        try:
            while self._queue:
                if not self.redis.is_available:
                    self._failed_at = self._clock()
                    await asyncio.sleep(RETRY_S)
                    continue
                writes: list[_Write] = []
                size = 0
                while self._queue and size < MAX_WRITE_BYTES:
                    writes.append(self._queue.popleft())
                    size += len(writes[-1].value)
                self._queued_bytes -= size
                self._writing = writes
                await self._write(writes)
        finally:
            self._writer, self._writing = None, ()

    async def _write(self, writes: Sequence[_Write]) -> None:
        commands = [Command(write.key, self._words(write)) for write in writes]
        limit_s = max(WRITE_LIMIT_S, self.redis.options.limit_s)
        answers = await self.redis.exchange(commands, limit_s)
        if UNAVAILABLE in answers:
            self._failed_at = self._clock()
        again: list[_Write] = []
        refusal = ""
        for write, answer in zip(writes, answers, strict=True):
            if answer is UNAVAILABLE and write.tries + 1 < MAX_TRIES:
                again.append(write._replace(tries=write.tries + 1))
            elif answer is UNAVAILABLE or isinstance(answer, Refused):
                self.counters.write_errors += 1
                refusal = answer.message if isinstance(answer, Refused) else refusal
            else:
                self.counters.writes += 1
        self._note_refusal(refusal, is_answered=len(again) < len(writes))
        for write in reversed(again):
            self._queue.appendleft(write)
            self._queued_bytes += len(write.value)
        self._writing = ()
        if again:
            await asyncio.sleep(RETRY_S)

    def _words(self, write: _Write) -> tuple[bytes | int, ...]:
        left_ms = 0
        if self._ttl_s is not None:
            left_ms = max(1, round(1000 * (write.stored + self._ttl_s - self._clock())))
        if not write.replaces or write.stored <= self._failed_at:
            return (b"EVAL", SET_NEWER, 1, write.key, write.value, left_ms)
        words = (b"SET", write.key, write.value)
        return (*words, b"PX", left_ms) if left_ms else words

    def _note_refusal(self, refusal: str, *, is_answered: bool) -> None:
        """Leave the server alone with writes for a while if it has refused one; say so once."""
        if refusal:
            self._refusals.fail()
            if not self.refusal:
                log.warning("the shared tier at %s takes no records: %s", self.redis.name, refusal)
            self.refusal = refusal
        elif self.refusal and is_answered:
            self._refusals.succeed()
            self.refusal = ""
            log.info("the shared tier at %s takes records again", self.redis.name)
