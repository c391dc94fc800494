"""One server: its connections, the time limit of each exchange, and its circuit breaker.

An exchange is some commands written at once and their replies read in order, on a connection that
nobody else has meanwhile. Unless all replies were read, the connection is closed: a reply that
comes late finds nobody. So no reply can answer a command of another exchange.

Closed, the breaker lets exchanges through. It opens after MAX_FAILURES failed ones in a row; then
every exchange is refused at once, and a task of its own probes the server until it answers in time.
"""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, NamedTuple, Self, TypeAlias

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import RedisError, ResponseError

log = logging.getLogger("embedding_proxy.shared")

MAX_FAILURES = 3
"""Failed exchanges in a row that open the breaker."""
MIN_OPEN_S = 0.25
"""Until the first probe; doubled by each one that fails."""
MAX_OPEN_S = 5.0
CONNECT_S = 1.0
"""The time of a connection to be made, and of a probe. No exchange waits so long for one."""
WORD_S, BYTE_S = 50e-6, 1e-8
"""What the time limit grows by for each word of the lot that was sent last, which may be a key
whose value is awaited, and for each byte of it: 20,000 values and 100 MB a second."""
_QUEUE_LIMITS = 4
_GRACES = 3
_SLACK_S = 0.002
_EARLY_S = 0.0005
_REPLIES_A_LIMIT = 16

Words: TypeAlias = Sequence[bytes | str | int | float]
"""A command and its arguments."""


class Refused(NamedTuple):
    """The server's refusal of one command, in its own words."""

    message: str

    @property
    def code(self) -> str:
        """The kind of refusal, such as OOM, READONLY, NOPERM, MOVED."""
        return self.message.partition(" ")[0]


Reply: TypeAlias = bytes | int | list[Any] | Refused | None
"""What a server sends: bytes also for a status; None for a value that is not there."""


@dataclass(slots=True)
class NodeCounters:
    """Counts since the start."""

    exchanges: int = 0
    """Those that ended well."""
    failures: int = 0
    """Those that did not: no connection, no answer in time, an answer that is none."""
    timeouts: int = 0
    """Of the failures, those for want of an answer in time."""
    refused: int = 0
    """Exchanges that were not begun, for the breaker was open."""
    seconds: float = 0.0
    """Sum of the times of those that ended well."""
    times_opened: int = 0
    """How often the breaker has opened."""


class _Limit:
    """Ends what is done in it when nothing has come from a server for some seconds: TimeoutError.

    A loop that was busy itself may not have read yet what has come. A timer that goes off late is
    therefore set again, a few times.
    """

    def __init__(self, seconds: float) -> None:
        self.is_for_connection = True
        """Whether a connection is what is waited for."""
        self._seconds = seconds
        self._more_s = 0.0
        self._graces = _GRACES
        self._is_over = False
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        if task is None:  # pragma: no cover - exchanges are awaited in tasks
            raise RuntimeError("an exchange needs a task")
        self._task, self._cancelling = task, task.cancelling()
        self.extend()
        self._timer = self._loop.call_at(self._at, self._check, self._at)
        return self

    def extend(self, more_s: float | None = None) -> None:
        """Begin the time anew: something has come. `more_s` is what is added to it from now on."""
        if more_s is not None:
            self._more_s = more_s
        self._at = self._loop.time() + self._seconds + self._more_s

    def _check(self, due: float) -> None:
        now = self._loop.time()
        if now >= self._at - _EARLY_S:
            if now - due <= _SLACK_S or not self._graces:
                self._is_over = True
                self._task.cancel()
                return
            self._graces -= 1
            self.extend()
        self._timer = self._loop.call_at(self._at, self._check, self._at)

    def __exit__(
        self, kind: type[BaseException] | None, error: object, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._is_over and self._task.uncancel() <= self._cancelling and kind is not None:
            raise TimeoutError from None


class Node:
    """A server. For one event loop.

    `connect` returns a connection that is ready, or raises RedisError or OSError. `limit_s` is how
    long an exchange waits for a connection, and for a reply; longer for what is large. `on_failure`
    is called when the breaker opens, and before each probe. `clock` gives seconds.
    """

    def __init__(  # noqa: PLR0913 - by name
        self,
        name: str,
        connect: Callable[[], Awaitable[AbstractConnection]],
        *,
        limit_s: float,
        max_connections: int,
        on_failure: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.counters = NodeCounters()
        self.reason = ""
        """Why the last exchange or probe failed, for people."""
        self._connect = connect
        self._limit_s = limit_s
        self._max_connections = max_connections
        self._on_failure = on_failure
        self._clock = clock
        self._failures = 0
        """In a row."""
        self._opened_at = 0.0
        self._prober: asyncio.Task[None] | None = None
        self._is_closed = False
        self._era = 0
        self._idle: list[AbstractConnection] = []
        self._eras: dict[AbstractConnection, int] = {}
        """All connections, with the era in which each was made."""
        self._waiters: deque[asyncio.Future[AbstractConnection]] = deque()
        self._connecting: set[asyncio.Task[None]] = set()

    @property
    def is_available(self) -> bool:
        """Whether exchanges go through: the breaker is closed."""
        return self._prober is None and not self._is_closed

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._eras)

    async def open(self) -> bool:
        """Make a first connection; return whether the server answers. Never raises.

        If it does not, the breaker is open.
        """
        if await self._probe():
            return True
        self._failures = MAX_FAILURES - 1
        self._fail(self.reason)
        return False

    async def aclose(self) -> None:
        """Close all connections; exchanges under way fail."""
        self._is_closed = True
        tasks = [*self._connecting, *([self._prober] if self._prober else [])]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        self._fail_waiters("closed")
        for connection in list(self._eras):
            await self._discard(connection)

    def reset(self) -> None:
        """Use none of the present connections for a further exchange."""
        self._era += 1

    async def exchange(
        self, lots: Sequence[Sequence[Words]], limit_s: float | None = None
    ) -> list[Reply] | None:
        """Return the replies to the commands of some lots, one lot written after the other.

        None if they are not all had in time: then nobody knows which commands were carried out.
        Raises nothing but CancelledError.
        """
        if not self.is_available:
            self.counters.refused += 1
            return None
        began = self._clock()
        limit = _Limit(limit_s or self._limit_s)
        try:
            with limit:
                replies = await self._exchange(lots, limit)
        except TimeoutError:
            self.counters.timeouts += 1
            # All connections may be in use: that says nothing of the server.
            is_saturated = limit.is_for_connection and bool(self._eras)
            what = "connection" if limit.is_for_connection else "answer"
            reason = f"no {what} within {(limit_s or self._limit_s) * 1000:g} ms"
            self._fail(reason, is_counted=not is_saturated)
        except (RedisError, OSError, EOFError) as error:
            self._fail(describe(error))
        else:
            self._failures = 0
            self.counters.exchanges += 1
            self.counters.seconds += self._clock() - began
            return replies
        return None

    async def _exchange(self, lots: Sequence[Sequence[Words]], limit: _Limit) -> list[Reply]:
        connection = await self._acquire(limit)
        limit.is_for_connection = False
        is_clean = False
        replies: list[Reply] = []
        try:
            await _send(connection, lots[0], limit)
            for index, lot in enumerate(lots):
                # Once the first lot is answered, the server has the next one while this is read.
                if index:
                    await _send_next(connection, lots, index, limit)
                for number in range(len(lot)):
                    replies.append(await _read(connection))
                    if number % _REPLIES_A_LIMIT == 0:
                        limit.extend()
                if not index:
                    await _send_next(connection, lots, index, limit)
            is_clean = True
        finally:
            if is_clean:
                await self._release(connection)
            else:
                await self._discard(connection)
        return replies

    async def _acquire(self, limit: _Limit) -> AbstractConnection:
        """Return a connection that nobody uses, once there is one. Raises RedisError, OSError."""
        while self._idle:
            connection = self._idle.pop()
            # One with something to read was closed by the server, or holds what nobody asked for.
            if self._eras[connection] == self._era and not await connection.can_read():
                return connection
            await self._discard(connection)
        waiter: asyncio.Future[AbstractConnection] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._grow()
        if self._eras and len(self._eras) + len(self._connecting) >= self._max_connections:
            # Each exchange before this one has its own limit, and a connection is free after it.
            limit.extend(_QUEUE_LIMITS * self._limit_s)
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled() and waiter.exception() is None:
                await self._release(waiter.result())
            raise

    def _grow(self) -> None:
        """Begin as many connections as are waited for, and may be."""
        room = self._max_connections - len(self._eras) - len(self._connecting)
        for _ in range(min(room, len(self._waiters) - len(self._connecting))):
            self._connecting.add(asyncio.create_task(self._add_connection()))

    async def _add_connection(self) -> None:
        """Make a connection for whoever waits. It is made also if nobody waits any more."""
        failure = None
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await self._connect()
        except (RedisError, OSError, EOFError, ValueError) as error:
            failure = describe(error)
        self._connecting -= {asyncio.current_task()}
        if failure is None:
            self._eras[connection] = self._era
            await self._release(connection)
        else:
            # Those who wait cannot hope for more while every connection fails.
            self._fail_waiters(failure)

    def _fail_waiters(self, failure: str) -> None:
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_exception(ConnectionError(failure))

    async def _release(self, connection: AbstractConnection) -> None:
        """Hand a connection to whoever waits, or keep it for the next one."""
        if self._is_closed or self._eras[connection] != self._era:
            await self._discard(connection)
            return
        while self._waiters:
            waiter = self._waiters.popleft()
            if not waiter.done():
                waiter.set_result(connection)
                return
        self._idle.append(connection)

    async def _discard(self, connection: AbstractConnection) -> None:
        """Close a connection for good. Nothing is waited for, so that nothing can end it early."""
        self._eras.pop(connection, None)
        await connection.disconnect(nowait=True)
        if not self._is_closed:
            self._grow()

    def _fail(self, reason: str, *, is_counted: bool = True) -> None:
        """Count a failed exchange; open the breaker if there were too many in a row.

        One that is not `is_counted` is the fault of nobody.
        """
        self.counters.failures += 1
        self.reason = reason
        self._failures += is_counted
        if self._failures >= MAX_FAILURES and self.is_available:
            self.counters.times_opened += 1
            self._opened_at = self._clock()
            warn_unavailable(self.name, reason)
            self.reset()
            self._prober = asyncio.create_task(self._probe_until_closed())

    async def _probe_until_closed(self) -> None:
        for connection in self._idle:
            await self._discard(connection)
        self._idle.clear()
        wait_s = MIN_OPEN_S
        while True:
            self._on_failure()
            await asyncio.sleep(wait_s)
            if await self._probe():
                break
            wait_s = min(wait_s * 2, MAX_OPEN_S)
        self._failures = 0
        self._prober = None
        log.info(
            "the shared tier at %s answers again, after %.1f s",
            *(self.name, self._clock() - self._opened_at),
        )

    async def _probe(self) -> bool:
        """Return whether a new connection is had, and answers within the limit. Never raises."""
        try:
            async with asyncio.timeout(CONNECT_S):
                connection = await self._connect()
        except (RedisError, OSError, EOFError, ValueError) as error:
            self.reason = describe(error)
            return False
        self._eras[connection] = self._era
        is_clean = False
        try:
            with _Limit(self._limit_s):
                await connection.send_command("PING", check_health=False)
                await connection.read_response(disable_decoding=True, timeout=math.inf)
            is_clean = True
        except TimeoutError:
            self.reason = f"no answer within {self._limit_s * 1000:g} ms"
        except (RedisError, OSError, EOFError) as error:
            self.reason = describe(error)
        finally:
            if is_clean:
                await self._release(connection)
            else:
                await self._discard(connection)
        return is_clean


async def _send_next(
    connection: AbstractConnection, lots: Sequence[Sequence[Words]], index: int, limit: _Limit
) -> None:
    if index + 1 < len(lots):
        await _send(connection, lots[index + 1], limit)


async def _send(connection: AbstractConnection, lot: Sequence[Words], limit: _Limit) -> None:
    packed = connection.pack_commands(lot)
    limit.extend(WORD_S * sum(map(len, lot)) + BYTE_S * sum(map(len, packed)))
    await connection.send_packed_command(packed, check_health=False)


async def _read(connection: AbstractConnection) -> Reply:
    try:
        reply: Reply = await connection.read_response(disable_decoding=True, timeout=math.inf)
    except ResponseError as error:
        # The library takes away the first word where it knows it.
        code = f"{error.status_code} " if error.status_code else ""
        return Refused(f"{code}{error}")
    return reply


def warn_unavailable(name: str, reason: str) -> None:
    """Say once that a server is not asked from now on."""
    log.warning("the shared tier at %s is left alone until it answers again: %s", name, reason)


def describe(error: BaseException) -> str:
    """Return why a connection was not had or has failed, for people."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no connection within {CONNECT_S:g} s"
    return str(error) or type(error).__name__
