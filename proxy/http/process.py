"""One server process: how it starts, what its signals do, and how it stops.

SIGHUP reads the configuration anew (`Instance.reload`). SIGTERM and SIGINT stop the process without
dropping a request:

1. `Instance._leave` tells systemd. `/readyz` says 503 from now on. For `server.drain_s` seconds the
   process still takes requests, and closes each connection behind its next reply.
2. `Runner.cleanup` (`app_runner`) stops listening, and closes the connections without a request.
   The others have `server.grace_s` seconds; then they are cut.
3. The application closes (`cleanup_ctx` in `app`), and with it `EmbeddingService`. Calls that were
   sent to providers have five seconds more (`CLOSE_S` in `providers.attempts`): what they bring is
   stored and counted.
4. The outbox of the index and the store close; what is pending is written.

A second SIGTERM or SIGINT ends the process at once. With several workers the parent gets the signal
and passes it on (`workers`). A script that uses the library closes its service itself
(`proxy.blocking`).
"""

import asyncio
import errno
import gc
import logging
import os
import signal
import socket
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias, TypeVar

from aiohttp import web
from embedding_proxy.cache.disk.store import StoreError
from embedding_proxy.providers import descriptors
from embedding_proxy.proxy import log as log_module
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service.embedding_service import EmbeddingService

from . import control, tls
from .app import DASHBOARD, METRICS, SERVICE, build_app
from .app_runner import REQUESTS, Runner
from .control import Listener, Reply, Request, WorkerRequest
from .request_metrics import RequestMetrics
from .status import READINESS
from .systemd import keep_watchdog_calm, notify, reloading

log = logging.getLogger("embedding_proxy.server")

T = TypeVar("T")

_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - nothing is bound here
IMPATIENT_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""The signals that end the proxy in good order, and of which a second one ends it at once."""
HANGUP = getattr(signal, "SIGHUP", None)
"""Asks for a reload; where the terminal was closed, it ends the proxy. Windows has none."""
STOP_SIGNALS = (*IMPATIENT_SIGNALS, *([] if HANGUP is None else [HANGUP]))
"""The signals that a proxy of one process listens to.

SIGHUP is never the second signal: a terminal that is closed sends it twice, once by the kernel and
once by the shell, and systemd can send it right after SIGTERM."""
WORKER_SIGNALS = (signal.SIGTERM,)
"""The signals that end a worker, however often they come.

A terminal sends its signals to all processes of a job, and systemd to all of a unit: the worker
gets them beside those of its parent. So it leaves those of the terminal to the parent, and takes
none for a second one. The parent kills it when it has to end at once."""
RETIRE_S = 3.0
"""Seconds for which clients of a proxy whose port another process has taken over have to send one
more request on an open connection, and to hear that it is closed."""
RELOADED = "the configuration was read anew and applies from now on"

Load: TypeAlias = Callable[[], Settings]
Announce: TypeAlias = Callable[[], Listener | None]


class PortUnavailable(Exception):
    """The address cannot be listened on; the message says which and why."""


_REMEDIES: dict[object, str] = {
    errno.EADDRINUSE: "; --port 0 takes a free port",
    errno.EACCES: "; take a port of 1024 or more, or --port 0 for a free one",
    errno.EADDRNOTAVAIL: "; {key} is no address of this machine",
    socket.gaierror: "; {key} is no host name that this machine knows",
}
"""What to do, by the number of the error."""


def listen(settings: Settings) -> socket.socket:
    """Take the address for clients. Raises PortUnavailable."""
    return _bind(settings.server.host, settings.server.port, "server.host")


def listen_metrics(settings: Settings) -> list[socket.socket]:
    """Take the address of `server.metrics_listen`, if there is one. Raises PortUnavailable."""
    address = settings.server.metrics_listen
    if address is None:
        return []
    host, _, port = address.rpartition(":")
    return [_bind(host.strip("[]"), int(port), "server.metrics_listen")]


def _bind(host: str, port: int, key: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except OSError as error:
        # The resolver's errors have numbers of their own, which `strerror` does not know.
        is_of_host = isinstance(error, socket.gaierror)
        reason = error.strerror if is_of_host or not error.errno else os.strerror(error.errno)
        remedy = _REMEDIES.get(socket.gaierror if is_of_host else error.errno, "")
        remedy = remedy.format(key=key)
        shown = f"[{host}]" if ":" in host else host
        raise PortUnavailable(
            f"cannot listen on {shown}:{port}: {reason or error}{remedy}"
        ) from error


def take_over(settings: Settings) -> list[socket.socket]:
    """Return the listening sockets of the proxy that runs with these settings, clients' first.

    That one answers requests, too, until it is told to stop. Raises PortUnavailable.
    """
    path = control.socket_path(settings.cache.directory, settings.server.port)
    try:
        reply, sockets = control.ask(path, control.SOCKET)
    except control.NotRunning as error:
        raise PortUnavailable(
            f"no proxy with the cache {settings.cache.directory} runs on port"
            f" {settings.server.port}, so there is no port to take over; start it without"
            " --take-over"
        ) from error
    if reply.code or not sockets:
        raise PortUnavailable(f"the proxy that runs does not hand its port over: {reply.lines}")
    clients, *others = sockets
    port = (settings.server.metrics_listen or "").rpartition(":")[2]
    own = [one for one in others if str(one.getsockname()[1]) == port]
    for one in others:
        if one not in own:
            one.close()
    return [clients, *(own or listen_metrics(settings))]


def base_url(listening: socket.socket, *, is_encrypted: bool = False) -> str:
    """Return the base URL for clients of this machine, with the port that was really taken.

    A socket that listens on all addresses (0.0.0.0, ::) is reached by the loopback address.
    """
    host, port = listening.getsockname()[:2]
    host = _LOOPBACK.get(host, host)
    shown = f"[{host}]" if ":" in host else host
    return f"{'https' if is_encrypted else 'http'}://{shown}:{port}/v1"


def unchangeable(old: Settings, new: Settings, listening: socket.socket) -> list[str]:
    """Return a line for each setting that differs and cannot change while the proxy runs."""
    if new.server.port == listening.getsockname()[1]:
        # Any free port was asked for, and this one was found.
        new = new.model_copy(
            update={"server": new.server.model_copy(update={"port": old.server.port})}
        )
    pairs = (
        ("server.host", old.server.host, new.server.host),
        ("server.port", old.server.port, new.server.port),
        ("server.metrics_listen", old.server.metrics_listen, new.server.metrics_listen),
        ("server.workers", old.server.workers, new.server.workers),
        ("server.node", old.server.node, new.server.node),
        ("server.tls", _on_or_off(old), _on_or_off(new)),
        ("cache.directory", old.cache.directory, new.cache.directory),
    )
    return [
        f"{key}: cannot change while the proxy runs ({before} -> {after}); start it again, or put"
        " the former value back"
        for key, before, after in pairs
        if before != after
    ]


def _equal(old: Settings, new: Settings) -> set[str]:
    """Return the providers that are configured as before."""
    return {name for name, entry in new.providers.items() if old.providers.get(name) == entry}


def _on_or_off(settings: Settings) -> str:
    return "off" if settings.server.tls is None else "on"


class Instance:
    """One process that serves requests. Its configuration may be replaced."""

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        load: Load,
        metrics_socket: socket.socket | None = None,
    ) -> None:
        """`load` reads the configuration anew, or raises ConfigError."""
        self._metrics_socket = metrics_socket
        self.settings = settings
        self.events: asyncio.Queue[signal.Signals | Request] = asyncio.Queue()
        """Signals, and what is asked through the control socket."""
        self._load = load
        self._listening = listening
        self._has_keys_file = settings.keys_path.exists()
        self._tls = None if settings.server.tls is None else tls.make_context(settings.server.tls)
        self._app = build_app(settings, metrics_socket=metrics_socket)
        self._runner = Runner(self._app, shutdown_timeout=settings.server.grace_s)

    @property
    def service(self) -> EmbeddingService:
        """What answers requests now: a reload replaces it."""
        return self._app[SERVICE]

    @property
    def requests(self) -> RequestMetrics:
        """What became of the requests."""
        return self._app[REQUESTS]

    async def __aenter__(self) -> Self:
        """Open all, and answer requests from now on. Raises StoreError, ConfigError."""
        await self._runner.setup()
        try:
            await self._runner.listen(self._listening, tls=self._tls)
        except BaseException:
            await self._runner.cleanup()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        """Answer what was begun, and close all."""
        await self._runner.cleanup()

    async def reload(self) -> Reply:
        """Take over the configuration as it is now; if it is wrong, keep the one that there is."""
        try:
            settings = await asyncio.to_thread(self._load)
            problems = unchangeable(self.settings, settings, self._listening)
            if not problems and self._has_keys_file and not settings.keys_path.exists():
                remedy = "put it back, or start the proxy again without it"
                problems = [f"{settings.keys_path}: the file of clients' keys is gone; {remedy}"]
            if not problems:
                if self._tls is not None and settings.server.tls is not None:
                    tls.load(self._tls, settings.server.tls)
                successor = self.service.successor(settings)
                app = build_app(settings, successor, self._metrics_socket)
                await self._runner.replace(app, _drain)
                app[METRICS].take_over()
                self._app[DASHBOARD].end_streams()
                successor.upstreams.inherit(self.service.upstreams, _equal(self.settings, settings))
                self.settings, self._app = settings, app
                self._has_keys_file = settings.keys_path.exists()
                log_module.configure(settings.log.level, settings.log.format)
        except ConfigError as error:
            problems = [*error.problems]
        except (OSError, StoreError) as error:
            problems = [str(error)]
        return told_of_reload(problems)

    async def run(self) -> signal.Signals:
        """Reload as often as that is asked for, until the proxy is told to stop; return by what."""
        while True:
            event = await self.events.get()
            if event is HANGUP and not terminal_is_gone():
                with reloading():
                    await self.reload()
            elif isinstance(event, signal.Signals):
                await self._leave(self.settings.server.drain_s)
                return event
            elif await self._obey(event):
                # Another process accepts connections: one that is taken now could not be served.
                self._runner.stop_listening()
                await self._leave(RETIRE_S)
                return signal.SIGTERM

    async def _obey(self, request: Request) -> bool:
        """Do what was asked through the control socket; tell whether the proxy is to stop."""
        if request.command == control.RELOAD:
            with reloading():
                request.reply(await self.reload())
        elif request.command == control.SOCKET:
            others = [] if self._metrics_socket is None else [self._metrics_socket]
            request.reply(Reply(0), self._listening, *others)
        elif request.command == control.STOP:
            request.reply(Reply(0, ("The proxy stops.",)))
            return True
        else:
            request.reply(Reply(2, ("unknown command",)))
        return False

    async def _leave(self, drain_s: float) -> None:
        """Say that no requests should be sent here any more, and give clients time to hear it."""
        notify("STOPPING=1")
        log.info("stopping: requests in progress are finished first")
        self._app[READINESS].is_stopping = True
        if drain_s:
            await self._runner.retire(drain_s)


async def _drain(app: web.Application) -> None:
    """Wait for the purchases of an application that was replaced."""
    await app[SERVICE].drain()


def told_of_reload(problems: Sequence[str]) -> Reply:
    """Log what came of a reload, and return it."""
    for problem in problems:
        log.error("reload refused, the former configuration stays: %s", problem)
    if problems:
        return Reply(2, tuple(problems))
    log.info(RELOADED)
    return Reply(0, (RELOADED,))


def terminal_is_gone() -> bool:
    """Tell whether the process was started from a terminal that is closed by now.

    Its SIGHUP means the end, then; without a terminal, or with one that is still there, it asks for
    a reload.
    """
    if not _HAS_TERMINAL:
        return False
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return True
    return False


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


_HAS_TERMINAL = _has_terminal()


async def serve(  # noqa: PLR0913 - what it serves, and whom it hears
    settings: Settings,
    listening: socket.socket,
    announce: Announce,
    load: Load | None = None,
    *,
    channel: socket.socket | None = None,
    metrics_socket: socket.socket | None = None,
) -> signal.Signals:
    """Serve until the proxy is told to stop, and return by which signal.

    A second signal ends the process at once. But a worker, which has a `channel` to its parent, is
    often told twice, by its parent and by whoever stops the whole group: its second SIGTERM means
    nothing more than the first. `announce` is called once requests are answered, and returns the
    control socket, if there is one. `load` reads the configuration anew. `metrics_socket` serves
    metrics without a key. Raises StoreError, ConfigError.
    """
    descriptors.raise_limit()
    load = load or (lambda: settings)
    async with Instance(settings, listening, load, metrics_socket) as instance:
        with _signals(instance.events, is_worker=channel is not None):
            # What has been made so far stays for good: to look it all through for garbage, now and
            # then, would be a pause of tens of milliseconds for everybody.
            gc.freeze()
            listener = announce()
            notify("READY=1")
            watchdog = asyncio.create_task(keep_watchdog_calm()) if channel is None else None
            try:
                with _control(instance.events, listener, channel):
                    return await instance.run()
            finally:
                if watchdog is not None:
                    watchdog.cancel()


def run_event_loop(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine on an event loop of its own, the quickest that is installed."""
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        from uvloop import new_event_loop  # noqa: PLC0415 - not there on Windows
    except ImportError:
        return None
    return new_event_loop


async def _hear(client: socket.socket, events: "asyncio.Queue[signal.Signals | Request]") -> None:
    """Put what a client of the control socket says among the events; one may say nothing."""
    client.settimeout(0)
    try:
        async with asyncio.timeout(control.PATIENCE_S):
            command = await asyncio.get_running_loop().sock_recv(client, 64)
    except (OSError, TimeoutError):
        client.close()
        return
    events.put_nowait(Request(client, command.decode("ascii", "replace").strip()))


@contextmanager
def _control(
    events: "asyncio.Queue[signal.Signals | Request]",
    listener: Listener | None,
    channel: socket.socket | None,
) -> Iterator[None]:
    """Put what is asked, by a command or by the parent, among the events."""
    loop = asyncio.get_running_loop()

    conversations: set[asyncio.Task[None]] = set()

    def accept(listener: Listener) -> None:
        client = listener.accept_client()
        if client is not None:
            task = asyncio.create_task(_hear(client, events))
            conversations.add(task)
            task.add_done_callback(conversations.discard)

    def receive(channel: socket.socket) -> None:
        command = channel.recv(64)
        if command:
            events.put_nowait(WorkerRequest(channel, command.decode()))
        else:
            loop.remove_reader(channel)

    if listener is not None:
        loop.add_reader(listener.fileno(), accept, listener)
    if channel is not None:
        loop.add_reader(channel, receive, channel)
    try:
        yield
    finally:
        if listener is not None:
            loop.remove_reader(listener.fileno())
            listener.close()
        if channel is not None:
            loop.remove_reader(channel)


@contextmanager
def _signals(
    events: "asyncio.Queue[signal.Signals | Request]", *, is_worker: bool
) -> Iterator[None]:
    """Put signals among the events; after the first to stop, a second may end the process at once.

    SIGHUP that was ignored from the start, as under `nohup`, stays ignored.
    """
    loop = asyncio.get_running_loop()
    numbers = WORKER_SIGNALS if is_worker else STOP_SIGNALS
    heeded = [
        number
        for number in numbers
        if number in IMPATIENT_SIGNALS or signal.getsignal(number) is not signal.SIG_IGN
    ]

    def hear(number: signal.Signals) -> None:
        events.put_nowait(number)
        if number in IMPATIENT_SIGNALS and not is_worker:
            for impatient in IMPATIENT_SIGNALS:
                loop.remove_signal_handler(impatient)
                # Else Python raises KeyboardInterrupt, and what it cancels may still answer.
                signal.signal(impatient, signal.SIG_DFL)

    for number in heeded:
        loop.add_signal_handler(number, hear, number)
    # The handlers stay until the loop is closed.
    yield
