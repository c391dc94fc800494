"""Clients that are slow on purpose: when they are closed, and what they cost a healthy one.

python -m bench.slow_clients [--connections 1000] [--rounds 5] — a quarter of the connections sends
a head one byte a second, two quarters a body so (of a told length, and in chunks), and the last
asks for a long reply and reads nothing of it. In turns, one healthy client is timed alone and
beside them. Then as many connections, one after the other, ask for the longest reply, each for
other inputs from the disk, and read nothing: what the proxy keeps of them in memory. Ends with 1
if a limit is missed.
"""

import argparse
import multiprocessing
import os
import resource
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import uvloop

from .client import Client
from .material import CLIENT_KEY, asking, make, prove, say
from .process import LOADING, Server, memory, proxy

KNOWN = 10_000
CLOSED_WITHIN_S = 15.0
MAX_RATIO = 1.10
MEASURED_S = 4.0
"""Of the healthy client, alone and beside: less than what a slow one is given."""
LONG = 400
"""Inputs of a reply that no kernel's buffers hold: 12 MB as floats."""
LONGEST = 2_048
MAX_GROWTH_MB = 1_500.0
"""Of the proxy's memory, by replies that nobody reads: `server.max_unread_mib`, and what is
answered in the second or two until they are cut. A thousand would hold 12,600."""
STEP_S = 0.05

_HEAD = (
    b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer "
    + CLIENT_KEY.encode()
    + b"\r\nContent-Type: application/json\r\n"
)
_KINDS = {
    "head": (_HEAD, b"x"),
    "body": (_HEAD + b"Content-Length: 100000\r\n\r\n", b" "),
    "chunked body": (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
}
"""What is sent at once, and then each second."""
_READER = "unread reply"


@dataclass
class Slow:
    """A slow connection."""

    kind: str
    connection: socket.socket
    drip: bytes
    since: float
    received: int = 0


class Told(NamedTuple):
    """How many of a kind there were, and how long the slowest was kept."""

    count: int
    longest_s: float


@dataclass
class Driver:
    """Opens slow connections, drips, and notes when each is closed. In a process of its own."""

    port: int
    slow: dict[int, Slow] = field(default_factory=dict)
    closed: dict[str, list[float]] = field(default_factory=dict)
    poll: select.epoll = field(default_factory=select.epoll)

    def open(self, kind: str, first: bytes, drip: bytes = b"") -> None:
        """Open one more."""
        connection = socket.create_connection(("127.0.0.1", self.port))
        connection.sendall(first)
        if not drip:
            connection.recv(1, socket.MSG_PEEK)
        connection.setblocking(False)  # noqa: FBT003 - the library's own
        slow = Slow(kind, connection, drip, time.monotonic())
        self.slow[connection.fileno()] = slow
        # A reader is to see the end of the connection, and no reply.
        events = select.EPOLLIN if drip else 0
        self.poll.register(connection, events | select.EPOLLRDHUP)

    def look(self, seconds: float) -> None:
        """Wait, and note what was closed meanwhile."""
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            for number, events in self.poll.poll(left):
                slow = self.slow[number]
                is_over = events & (select.EPOLLHUP | select.EPOLLERR | select.EPOLLRDHUP)
                if is_over or not _rest(slow.connection):
                    self._close(number)
            if not left:
                return

    def drip(self) -> None:
        """Send each a little more."""
        for number, slow in list(self.slow.items()):
            if slow.drip:
                try:
                    slow.connection.send(slow.drip)
                except OSError:
                    self._close(number)

    def told(self) -> dict[str, Told]:
        """Return what was closed."""
        return {kind: Told(len(times), max(times)) for kind, times in self.closed.items()}

    def _close(self, number: int) -> None:
        slow = self.slow.pop(number)
        self.poll.unregister(number)
        slow.connection.close()
        self.closed.setdefault(slow.kind, []).append(time.monotonic() - slow.since)


def _rest(connection: socket.socket) -> bytes:
    """Read what came, say a 408; nothing if the connection is over."""
    try:
        return connection.recv(1 << 16)
    except OSError:
        return b""


def drive(port: int, readers: Sequence[bytes], each: int, pipe: Connection) -> None:
    """Open all, say so, and say at last how long each kind was kept."""
    os.nice(5)
    driver = Driver(port)
    for request in readers:
        # One by one: many long requests at once take memory whether or not the replies are read.
        driver.open(_READER, request)
        driver.look(0)
    _await_stall(driver)
    for kind, (first, drip) in _KINDS.items():
        for _ in range(each):
            driver.open(kind, first, drip)
    pipe.send("stalled")
    until = time.monotonic() + 2 * CLOSED_WITHIN_S
    while driver.slow and time.monotonic() < until:
        begun = time.monotonic()
        driver.drip()
        driver.look(max(0.0, begun + 1 - time.monotonic()))
    pipe.send((driver.told(), len(driver.slow)))


def _await_stall(driver: Driver) -> None:
    """Wait until no reader gets any more: from then on the proxy waits for it."""
    if not driver.slow:
        return
    while True:
        driver.look(STEP_S)
        moved = 0
        for slow in driver.slow.values():
            size = _unread(slow.connection)
            moved += size != slow.received or not size
            if size != slow.received:
                slow.since = time.monotonic()
            slow.received = size
        if not moved:
            return


def _unread(connection: socket.socket) -> int:
    """Return how many bytes have come that were not read."""
    try:
        return len(connection.recv(1 << 24, socket.MSG_PEEK))
    except BlockingIOError:
        return 0
    except OSError:
        return -1


def p99_us(client: Client, request: bytes, seconds: float = MEASURED_S) -> float:
    """Ask again and again, and return the 99th percentile of what a reply takes."""
    taken = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        taken.append(client.ask(request))
    return 1e6 * statistics.quantiles(taken, n=100)[98]


@dataclass
class Outcome:
    """What was measured, and what missed its limit."""

    missed: list[str] = field(default_factory=list)

    def check(self, what: str, value: float, most: float, unit: str) -> None:
        """Say a figure and its limit."""
        verdict = "ok" if value <= most else "MISSED"
        print(f"{what:44} {value:10.2f} {unit:6} limit {most:8.2f}  {verdict}", flush=True)
        if value > most:
            self.missed.append(what)


def driven(
    server: Server, readers: Sequence[bytes], each: int, measure: Callable[[], float]
) -> tuple[dict[str, Told], int, float]:
    """Run slow clients; return what was closed, how many were not, and what `measure` gave beside.

    It is called while all of them are stalled.
    """
    context = multiprocessing.get_context("fork")
    pipe, other = context.Pipe()
    process = context.Process(target=drive, args=(server.port, readers, each, other))
    process.start()
    pipe.recv()
    beside = measure()
    told, left = pipe.recv()
    process.join()
    return told, left, beside


def try_beside(server: Server, connections: int, rounds: int, outcome: Outcome) -> None:
    """Time a healthy client alone and beside slow ones, and when these are closed."""
    each = connections // 4
    readers = [asking(range(LONG), "float")] * (connections - 3 * each)
    ratios, longest = [], dict.fromkeys((*_KINDS, _READER), 0.0)
    with Client(server, 1) as client:
        request = asking(7)
        p99_us(client, request)
        for number in range(rounds):
            alone = p99_us(client, request)
            told, left, beside = driven(server, readers, each, lambda: p99_us(client, request))
            ratios.append(beside / alone)
            for kind, (_, seconds) in told.items():
                longest[kind] = max(longest[kind], seconds)
            closed = sum(one.count for one in told.values())
            say(f"round {number + 1}: p99 {alone:.0f} µs alone, {beside:.0f} beside")
            outcome.check("not closed, of all", connections - closed + left, 0, "")
    for kind, seconds in longest.items():
        outcome.check(f"closed after the stall: {kind}", seconds, CLOSED_WITHIN_S, "s")
    print("ratios of the rounds: " + ", ".join(f"{ratio:.3f}" for ratio in sorted(ratios)))
    outcome.check("a healthy client's p99", statistics.median(ratios), MAX_RATIO, "x")


def try_memory(server: Server, folder: Path, readers: list[bytes], outcome: Outcome) -> None:
    """Let many ask for the longest reply, and read none of it."""
    before = memory(server, folder).resident
    told, left, held = driven(server, readers, 0, lambda: memory(server, folder).resident)
    say(f"{len(readers)} readers: {before:.0f} MB before, {held:.0f} MB while they stall")
    outcome.check("unread replies: not closed", left, 0, "")
    outcome.check("unread replies: closed", told[_READER].longest_s, CLOSED_WITHIN_S, "s")
    outcome.check("unread replies: growth", held - before, MAX_GROWTH_MB, "MB")
    outcome.check("unread replies: peak", memory(server, folder).peak - before, MAX_GROWTH_MB, "MB")


def main() -> None:
    """Try both."""
    parser = argparse.ArgumentParser(description="Slow clients, and what they cost others.")
    parser.add_argument("--connections", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="default: %(default)s; 0 = memory")
    asked = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 3 * asked.connections + 500), hard))
    os.sched_setaffinity(0, LOADING)
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="slow-") as name:
        made = uvloop.run(make(Path(name) / "known", KNOWN))
        if asked.rounds:
            with proxy(made.directory) as server:
                prove(server, range(LONG), "float")
                try_beside(server, asked.connections, asked.rounds, outcome)
        with proxy(made.directory, memory_mib=0) as server:
            readers = [asking(made.some(LONGEST), "float") for _ in range(asked.connections)]
            prove(server, range(LONGEST), "float")
            try_memory(server, made.directory, readers, outcome)
    sys.exit(bool(outcome.missed))


if __name__ == "__main__":
    main()
