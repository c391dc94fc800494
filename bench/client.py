"""The load: plain sockets that stay open, bytes made beforehand, nothing pipelined.

It must not be the limit: a request costs it a few microseconds, on a core of its own, and what it
cost is measured too. Every reply is looked at: status, length, and what came from the cache.
"""

import select
import socket
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Self

from .process import Server

READ_BYTES = 1 << 20
HIT = b"\r\nx-cache: hit"
_ALL, _CHUNKS = -1, -2
_LAST_CHUNK = b"\r\n0\r\n\r\n"


class Load(NamedTuple):
    """What requests took, by the request."""

    seconds: float
    cpu_seconds: float
    """Of the server, all its threads and workers."""
    client_seconds: float
    """Of this process."""


class Client:
    """Some connections to a server, each of which asks again as soon as it is answered.

    `expects` must be in the head of each reply, in small letters.
    """

    def __init__(self, server: Server, connections: int, *, expects: bytes = HIT) -> None:
        self._server = server
        self._expects = expects
        self._buffer = bytearray(READ_BYTES)
        self._tail = b""
        """The last bytes of a chunked reply. Such are long, and are asked for one at a time."""
        self._sockets: dict[int, socket.socket] = {}
        for _ in range(connections):
            connection = socket.create_connection(("127.0.0.1", server.port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sockets[connection.fileno()] = connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self._sockets.values():
            connection.close()

    def ask(self, request: bytes) -> float:
        """Send one request, and return the seconds until the last byte of the reply."""
        connection = next(iter(self._sockets.values()))
        start = time.perf_counter()
        connection.sendall(request)
        missing = _ALL
        while missing:
            missing = self._read(connection, missing)
        return time.perf_counter() - start

    def load(self, requests: Sequence[bytes]) -> Load:
        """Send all requests, and say what one took."""
        before = self._server.cpu_seconds, time.process_time()
        start = time.perf_counter()
        self._run(iter(requests))
        seconds = time.perf_counter() - start
        after = self._server.cpu_seconds, time.process_time()
        used = (b - a for a, b in zip(before, after, strict=True))
        return Load(*(figure / len(requests) for figure in (seconds, *used)))

    def _run(self, requests: Iterator[bytes]) -> None:
        # Sockets block: a request is small, or the only one, and what is read is there.
        missing: dict[int, int] = {}
        with select.epoll() as ready:
            for number, connection in self._sockets.items():
                if request := next(requests, b""):
                    connection.sendall(request)
                    ready.register(number, select.EPOLLIN)
                    missing[number] = _ALL
            while missing:
                for number, _ in ready.poll():
                    connection = self._sockets[number]
                    missing[number] = left = self._read(connection, missing[number])
                    if left:
                        continue
                    if request := next(requests, b""):
                        connection.sendall(request)
                        missing[number] = _ALL
                    else:
                        ready.unregister(number)
                        del missing[number]

    def _read(self, connection: socket.socket, missing: int) -> int:
        """Read once, and return what is missing: so many bytes, _ALL, or _CHUNKS up to the last."""
        buffer = self._buffer
        size = connection.recv_into(buffer)
        if not size:
            raise ConnectionError("the server hung up")
        if missing == _ALL:
            end = buffer.find(b"\r\n\r\n", 0, size)
            head = buffer[:end].lower()
            if end < 0 or not head.startswith(b"http/1.1 200"):
                told = bytes(buffer[: min(size, 500)])
                raise RuntimeError(f"not the reply it should be: {told!r}")
            if self._expects not in head:
                raise RuntimeError(f"no {self._expects.decode()}: {head.decode()}")
            place = head.find(b"\r\ncontent-length: ")
            if place >= 0:
                return int(head[place + 18 :].split(b"\r\n", 1)[0]) + end + 4 - size
            self._tail = b""
        elif missing != _CHUNKS:
            return missing - size
        self._tail = (self._tail + buffer[max(0, size - len(_LAST_CHUNK)) : size])[
            -len(_LAST_CHUNK) :
        ]
        return 0 if self._tail == _LAST_CHUNK else _CHUNKS


def in_turns(clients: Sequence[Client], rounds: Iterable[Sequence[bytes]]) -> list[list[Load]]:
    """Load servers in turns, all with the same requests; return what each took, by the round.

    A change in the machine's speed falls on all alike.
    """
    taken = [[client.load(requests) for client in clients] for requests in rounds]
    return [list(loads) for loads in zip(*taken, strict=True)]
