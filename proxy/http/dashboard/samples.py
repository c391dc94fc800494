"""Live figures: one sampler for all viewers, which works only while somebody looks.

Every second it takes the counters of all processes, and tells each viewer the rates since the
second before; every STATE_TICKS seconds it tells the whole state, if that has changed. A viewer is
a bounded queue of events; one that does not take them is let go, and connects again.
"""

import asyncio
import logging
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from itertools import accumulate
from typing import Any, NamedTuple

import orjson
from embedding_proxy.providers.histogram import BOUNDS_S

log = logging.getLogger("embedding_proxy.dashboard")

TICK_S = 1.0
STATE_TICKS = 3
KEPT = 300
"""Samples that a new viewer gets at once: five minutes."""
MAX_VIEWERS = 32
"""Of one process."""
MAX_WAITING = 16
"""Events that may wait for a viewer."""
MAX_GAP_S = 5.0
"""Counters that lie further apart give no rate."""


class Reading(NamedTuple):
    """What was counted until now, by all processes."""

    at: float
    """Seconds since 1970."""
    hits: tuple[float, ...]
    """Requests that were answered from the cache, by bucket of their duration (BOUNDS_S)."""
    misses: tuple[float, ...]
    """Those for which something was bought."""
    failures: float
    """Requests for embeddings that got an error."""
    in_flight: float
    evictions: float


def rates(before: Reading, now: Reading) -> dict[str, Any] | None:
    """Return the sample between two readings; None where they do not fit together.

    `hit_ms` and `miss_ms` are the median and the 95th percentile; None where there was no request.
    """
    seconds = now.at - before.at
    if not 0 < seconds <= MAX_GAP_S:
        return None
    sample: dict[str, Any] = {"t": round(now.at, 1), "in_flight": int(now.in_flight)}
    for name, plural, first, last in (
        ("hit", "hits", before.hits, now.hits),
        ("miss", "misses", before.misses, now.misses),
    ):
        counts = [max(0.0, b - a) for a, b in zip(first, last, strict=True)]
        sample[f"{plural}_a_s"] = round(sum(counts) / seconds, 2)
        sample[f"{name}_ms"] = [_quantile(counts, share) for share in (0.5, 0.95)]
    sample["failures_a_s"] = round(max(0.0, now.failures - before.failures) / seconds, 2)
    return sample


def _quantile(counts: list[float], share: float) -> float | None:
    """Return about so many milliseconds, as Prometheus does: evenly within a bucket.

    >>> _quantile([0.0] * 3 + [4.0] + [0.0] * (len(BOUNDS_S) - 3), 0.5)
    0.75
    """
    sums = [*accumulate(counts)]
    if not sums[-1]:
        return None
    wanted = share * sums[-1]
    index = bisect_left(sums, wanted)
    if index >= len(BOUNDS_S):
        return 1000 * BOUNDS_S[-1]
    low = BOUNDS_S[index - 1] if index else 0.0
    part = (wanted - (sums[index] - counts[index])) / counts[index]
    return round(1000 * (low + part * (BOUNDS_S[index] - low)), 3)


class TooManyViewers(Exception):
    """No more are taken."""


class Sampler:
    """Tells viewers. For one event loop."""

    def __init__(
        self,
        read: Callable[[], Awaitable[Reading]],
        state: Callable[[], Awaitable[Mapping[str, Any]]],
        is_stopping: Callable[[], bool],
    ) -> None:
        """`read` gives the counters, `state` all other figures; both while somebody looks."""
        self._read = read
        self._state = state
        self._is_stopping = is_stopping
        self._viewers: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._last: Reading | None = None
        self._samples: deque[dict[str, Any]] = deque(maxlen=KEPT)
        self._told = b""
        """The state that was told last."""
        self._is_closed = False

    @property
    def viewers(self) -> int:
        """How many look."""
        return len(self._viewers)

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield events for one viewer, as they go over the wire, until the proxy stops.

        Raises TooManyViewers.
        """
        if len(self._viewers) >= MAX_VIEWERS:
            raise TooManyViewers
        if self._is_closed:
            return
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(MAX_WAITING)
        queue.put_nowait(_event("samples", orjson.dumps([*self._samples])))
        if self._told and self._task is not None:
            queue.put_nowait(_event("state", self._told))
        self._viewers.add(queue)
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._viewers.discard(queue)

    def close(self) -> None:
        """Let all viewers go; they find whoever answers now."""
        self._is_closed = True
        for queue in [*self._viewers]:
            self._dismiss(queue)

    async def wait_closed(self) -> None:
        """Wait until nothing is sampled any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        self._told = b""
        state: asyncio.Task[None] | None = None
        try:
            tick = 0
            while self._viewers and not self._is_stopping():
                await self._guard(self._sample)
                # A long ledger takes longer to read than a tick.
                if tick % STATE_TICKS == 0 and (state is None or state.done()):
                    state = asyncio.create_task(self._guard(self._tell_state))
                tick += 1
                await asyncio.sleep(TICK_S)
        finally:
            self._task = None
            if state is not None:
                state.cancel()
            if self._is_stopping():
                self.close()

    async def _guard(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except Exception:
            log.exception("the dashboard has no figures")

    async def _sample(self) -> None:
        now = await self._read()
        last, self._last = self._last, now
        sample = None if last is None else rates(last, now)
        if sample is None:
            self._samples.clear()  # They are from before a rest.
        else:
            self._samples.append(sample)
            self._tell(_event("samples", orjson.dumps([sample])))

    async def _tell_state(self) -> None:
        told = orjson.dumps(await self._state())
        if told != self._told:
            self._told = told
            self._tell(_event("state", told))

    def _tell(self, event: bytes) -> None:
        for queue in [*self._viewers]:
            if queue.full():
                self._dismiss(queue)
            else:
                queue.put_nowait(event)

    def _dismiss(self, queue: asyncio.Queue[bytes | None]) -> None:
        self._viewers.discard(queue)
        while not queue.empty():
            queue.get_nowait()
        queue.put_nowait(None)


def _event(name: str, data: bytes) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), data)
