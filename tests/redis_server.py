"""Real Redis servers for tests, on ports of their own; what needs one is skipped without."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import hiredis
import pytest
from ports import own_port

needs_redis = pytest.mark.skipif(shutil.which("redis-server") is None, reason="no redis-server")


async def until(is_so: Callable[[], object]) -> None:
    """Return once something is so, which nobody tells of."""
    while not is_so():  # noqa: ASYNC110
        await asyncio.sleep(0.001)


class RedisServer:
    """A server of one's own, which keeps nothing. Commands are sent by `call`."""

    def __init__(self, *options: str, port: int | None = None) -> None:
        self.port = own_port() if port is None else port
        self._temporary = tempfile.TemporaryDirectory()
        self.folder = Path(self._temporary.name)
        address = ["--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        self.command = ["redis-server", *address, "--dir", str(self.folder), *options]
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    def start(self) -> "RedisServer":
        """Start it, and wait until it answers."""
        log = self.folder / "log"
        self.process = subprocess.Popen([*self.command, "--logfile", str(log)])
        while True:
            with contextlib.suppress(OSError):
                self.call("PING")
                return self
            if self.process.poll() is not None:
                raise RuntimeError(log.read_text())

    def value(self, key: bytes) -> bytes:
        """Return the value of a key."""
        return self.call("GET", key).partition(b"\r\n")[2][:-2]

    def keys(self, pattern: str) -> list[bytes]:
        """Return the keys of a pattern, in order."""
        reader = hiredis.Reader()
        reader.feed(self.call("KEYS", pattern))
        return sorted(reader.gets())

    def call(self, *words: str | bytes) -> bytes:
        """Return the first part of the reply to a command, as it comes."""
        encoded = [word.encode() if isinstance(word, str) else word for word in words]
        parts = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as talk:
            talk.sendall(b"*%d\r\n" % len(words) + parts)
            return talk.recv(1 << 16)

    def signal(self, number: int) -> None:
        assert self.process is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """End it at once; nothing of it stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def close(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.signal(signal.SIGCONT)
        self.kill()
        self._temporary.cleanup()


@contextlib.contextmanager
def redis_server(*options: str, port: int | None = None) -> Iterator[RedisServer]:
    server = RedisServer(*options, port=port)
    try:
        yield server.start()
    finally:
        server.close()
