"""The control socket: how a command talks to the proxy that runs.

It is a Unix socket beside the cache, for the user who runs the proxy alone. A client sends one word
and gets one JSON object back:

- `reload`: the configuration is read anew. The reply says what came of it.
- `socket`: the reply comes with the listening socket, for a process that takes over.
- `stop`: the proxy stops as if it were told by a signal, and leaves the port to another process.
"""

import hashlib
import logging
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import orjson

log = logging.getLogger("embedding_proxy.control")

RELOAD, SOCKET, STOP = "reload", "socket", "stop"
PATIENCE_S = 2.0
"""Seconds for a client to say what it wants."""
REPLY_S = 120.0
"""Seconds for the proxy to do it."""
_MAX_FOLDER = 70
"""Bytes of the path of a folder with Unix sockets, at most: systems allow 104 to 108 in all."""
_PREFIX, _SUFFIX = "control-", ".sock"
_MAX_MESSAGE = 1 << 16


class Reply(NamedTuple):
    """What came of a command."""

    code: int
    """The exit code for the command line."""
    lines: tuple[str, ...] = ()
    """What to say to people."""


class NotRunning(Exception):
    """No proxy answers at a control socket."""


def socket_path(directory: Path, port: int) -> Path:
    """Return where the proxy with this cache folder and port has its socket.

    A folder whose path is too long for a socket has it among the temporary files.
    """
    if len(os.fsencode(directory)) <= _MAX_FOLDER:
        return directory / f"{_PREFIX}{port}{_SUFFIX}"
    digest = hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"embedding-proxy-{os.getuid()}"
    return folder / f"{digest}-{port}{_SUFFIX}"


def running(directory: Path) -> Iterator[int]:
    """Yield the ports of the proxies that answer for a cache folder."""
    example = socket_path(directory, 0)
    before, after = example.name.split("0" + _SUFFIX)[0], _SUFFIX
    with suppress(OSError):
        for path in sorted(example.parent.iterdir()):
            port = path.name.removeprefix(before).removesuffix(after)
            if path.name == f"{before}{port}{after}" and port.isdecimal() and _answers(path):
                yield int(port)


def _answers(path: Path) -> bool:
    with suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE_S)
        client.connect(os.fspath(path))
        return True
    return False


class Listener:
    """The proxy's end."""

    def __init__(self, path: Path) -> None:
        """Take the place of whoever listened there before. Raises OSError."""
        self.path = path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.socket = socket.socket(socket.AF_UNIX)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        draft.unlink(missing_ok=True)
        try:
            self.socket.bind(os.fspath(draft))
            draft.chmod(0o600)
            self.socket.listen(8)
            draft.replace(path)
        except BaseException:
            self.socket.close()
            draft.unlink(missing_ok=True)
            raise
        self._inode = path.stat().st_ino

    def fileno(self) -> int:
        """Return the file descriptor, ready to be read when somebody connects."""
        return self.socket.fileno()

    def accept_client(self) -> socket.socket | None:
        """Return somebody's connection; None if it has gone."""
        try:
            client, _ = self.socket.accept()
        except OSError:
            return None
        return client

    def accept(self) -> "Request | None":
        """Return what somebody wants; None if that is not clear in time. Blocks so long."""
        client = self.accept_client()
        if client is None:
            return None
        try:
            client.settimeout(PATIENCE_S)
            return Request(client, client.recv(64).decode("ascii", "replace").strip())
        except OSError:
            client.close()
            return None

    def close(self) -> None:
        """Listen no more; the path stays where another process has taken it."""
        self.socket.close()
        with suppress(OSError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()


def listen(path: Path) -> Listener | None:
    """Return a listener at a path; None where there can be none, as in a folder only to be read."""
    if not is_supported():
        return None
    try:
        return Listener(path)
    except OSError as error:
        log.info("`embedding-proxy reload` cannot reach this proxy: %s", error.strerror)
        return None


class Request:
    """One command, to be answered once."""

    def __init__(self, client: socket.socket, command: str) -> None:
        self._client = client
        self.command = command

    def reply(self, reply: Reply, *sockets: socket.socket) -> None:
        """Answer, and end the conversation; whoever asked may be gone."""
        content = encode(reply)
        with suppress(OSError), self._client as client:
            client.settimeout(PATIENCE_S)
            if sockets:
                socket.send_fds(client, [content], [one.fileno() for one in sockets])
            else:
                client.sendall(content)


class WorkerRequest(Request):
    """A command of the parent to a worker, over a channel that stays open."""

    def reply(self, reply: Reply, *_: socket.socket) -> None:
        """Answer; the parent may be gone."""
        with suppress(OSError):
            self._client.send(encode(reply))


def encode(reply: Reply) -> bytes:
    """Return a reply as one message."""
    return orjson.dumps({"code": reply.code, "lines": reply.lines})


def decode(content: bytes) -> Reply:
    """Return the reply of a message. Raises ValueError."""
    try:
        told = orjson.loads(content)
        return Reply(int(told["code"]), tuple(map(str, told["lines"])))
    except (KeyError, TypeError) as error:
        raise ValueError(str(error)) from error


def ask(path: Path, command: str) -> tuple[Reply, list[socket.socket]]:
    """Send a command to a running proxy; return its reply, and the sockets that came along.

    Raises NotRunning.
    """
    try:
        if not stat.S_ISSOCK(path.stat().st_mode):
            raise NotRunning
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(REPLY_S)
            client.connect(os.fspath(path))
            client.sendall(command.encode())
            content, descriptors, _, _ = socket.recv_fds(client, _MAX_MESSAGE, 4)
            while chunk := client.recv(_MAX_MESSAGE):
                content += chunk
        reply = decode(content)
    except (OSError, ValueError) as error:
        raise NotRunning(str(error)) from error
    return reply, [socket.socket(fileno=descriptor) for descriptor in descriptors]


def is_supported() -> bool:
    """Tell whether this system has Unix sockets that pass sockets on."""
    return hasattr(socket, "AF_UNIX") and hasattr(socket, "send_fds") and sys.platform != "win32"
