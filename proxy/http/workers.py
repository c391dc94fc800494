"""Several processes behind one port, that share one store.

The parent takes the address and forks before anything else is opened; it serves nothing itself. A
worker that dies is replaced. Each worker has its own flights; of an input that two workers are
asked for at the same moment, one buys the vector and the other waits for it (`cache.leases`). Of
the declared limits of a provider each worker uses its share (`Limits.share`).

The parent has a channel to each worker, over which it says that the configuration is to be read
anew, or that another process has taken the port over.
"""

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import NamedTuple, TypeAlias

from embedding_proxy.proxy import log as log_module
from embedding_proxy.proxy.config.errors import ConfigError
from embedding_proxy.proxy.config.schema import Settings

from . import control
from .control import REPLY_S, Listener, Reply, Request
from .process import Announce, Load, terminal_is_gone, told_of_reload, unchangeable
from .systemd import notify, reloading, watchdog_interval

log = logging.getLogger("embedding_proxy.workers")

Work: TypeAlias = Callable[[Settings, Announce, socket.socket], object]
"""What a worker does until SIGTERM. It gets the settings, what it calls once it answers requests,
and its end of the channel."""

RESTART_SECONDS = 1.0
_HURRY = (signal.SIGINT, signal.SIGTERM)
"""The signals of which a second one ends the workers at once."""
_HANGUP = getattr(signal, "SIGHUP", None)
_HEARD = (*_HURRY, *([] if _HANGUP is None else [_HANGUP]))
_READY = b"."
_MAX_MESSAGE = 1 << 16


class WorkerFailed(Exception):
    """A worker could not start."""

    def __init__(self, code: int | None) -> None:
        """`code` is what it ended with: the number of a signal, negated, or its exit code."""
        super().__init__(f"a worker ended with {code} before it had started")
        self.code = code if code and code > 0 else 1
        self.has_said_why = code is not None and code > 0
        """Whether its own last line is all there is to say."""


class _Worker(NamedTuple):
    process: BaseProcess
    channel: socket.socket

    @property
    def sentinel(self) -> int:
        return self.process.sentinel


class Supervisor:
    """The parent of the workers."""

    def __init__(
        self,
        settings: Settings,
        listening: socket.socket,
        work: Work,
        load: Load,
        *others: socket.socket,
    ) -> None:
        """`load` reads the configuration anew, or raises ConfigError.

        `others` are listening sockets that another process may take over, too.
        """
        self._others = others
        self._settings = settings
        self._listening = listening
        self._work = work
        self._load = load
        self._has_keys_file = settings.keys_path.exists()
        self._workers: list[_Worker] = []
        self._told_read, self._told_write = os.pipe()
        self._ready_read, self._ready_write = os.pipe()
        self._life = os.pipe()

    def run(self, announce: Announce) -> signal.Signals:
        """Run workers until they are told to stop, and return by which signal.

        The workers then answer what they have begun; another SIGINT or SIGTERM ends them at once.
        SIGHUP is ignored where it was from the start, as under `nohup`. `announce` is called once
        all workers answer. Raises WorkerFailed if one ends before that.
        """
        os.set_blocking(self._told_write, False)
        signal.set_wakeup_fd(self._told_write)
        for number in _HEARD:
            if number in _HURRY or signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda _number, _frame: None)
        listener: Listener | None = None
        try:
            self._workers += (self._start() for _ in range(self._settings.server.workers))
            if self._await_ready():
                listener = announce()
                notify("READY=1")
            return self._supervise(listener)
        finally:
            if listener is not None:
                listener.close()
            notify("STOPPING=1")
            for worker in self._workers:
                worker.process.terminate()
            self._join()
            signal.set_wakeup_fd(-1)

    def _supervise(self, listener: Listener | None) -> signal.Signals:
        interval = watchdog_interval()
        while True:
            control_socket = None if listener is None else listener.socket
            sources: list[int | socket.socket] = [self._told_read]
            sources += [] if control_socket is None else [control_socket]
            notify("WATCHDOG=1")
            ready = wait([*sources, *(worker.sentinel for worker in self._workers)], interval)
            if self._told_read in ready:
                number = signal.Signals(os.read(self._told_read, 1)[0])
                if number is not _HANGUP or terminal_is_gone():
                    return number
                with reloading():
                    self.reload()
            elif listener is not None and listener.socket in ready:
                request = listener.accept()
                if request is not None and self._obey(request):
                    return signal.SIGTERM
            else:
                self._replace_dead()

    def _replace_dead(self) -> None:
        for worker in [one for one in self._workers if not one.process.is_alive()]:
            process = worker.process
            log.error("worker %s ended with %s; it is replaced", process.pid, process.exitcode)
            self._workers.remove(worker)
            worker.channel.close()
            # Not at once, lest one that cannot live keeps the processor busy.
            if self._told_read not in wait([self._told_read], RESTART_SECONDS):
                self._workers.append(self._start())

    def _obey(self, request: Request) -> bool:
        """Do what was asked through the control socket; tell whether the proxy is to stop."""
        if request.command == control.RELOAD:
            with reloading():
                request.reply(self.reload())
        elif request.command == control.SOCKET:
            request.reply(Reply(0), self._listening, *self._others)
        elif request.command == control.STOP:
            for worker in self._workers:
                with suppress(OSError):
                    worker.channel.send(control.STOP.encode())
            request.reply(Reply(0, ("The proxy stops.",)))
            self._await_end()
            return True
        else:
            request.reply(Reply(2, ("unknown command",)))
        return False

    def _await_end(self) -> None:
        """Wait for the end of all workers, or a signal."""
        while alive := [one.sentinel for one in self._workers if one.process.is_alive()]:
            if self._told_read in wait([self._told_read, *alive]):
                return

    def reload(self) -> Reply:
        """Let all workers take over the configuration as it is now; if it is wrong, none does."""
        try:
            settings = self._load()
        except ConfigError as error:
            return told_of_reload(error.problems)
        except OSError as error:
            return told_of_reload([str(error)])
        problems = unchangeable(self._settings, settings, self._listening)
        if problems:
            return told_of_reload(problems)
        if self._has_keys_file and not settings.keys_path.exists():
            # Each worker says so, and keeps its keys.
            settings = self._settings
        self._settings = settings
        log_module.configure(settings.log.level, settings.log.format)
        replies = [reply for worker in self._workers if (reply := self._ask(worker)) is not None]
        # A worker has logged what kept it from reloading.
        refused = dict.fromkeys(line for reply in replies if reply.code for line in reply.lines)
        if refused:
            return Reply(1, tuple(refused))
        return replies[0] if replies else told_of_reload([])

    def _ask(self, worker: _Worker) -> Reply | None:
        """Return what a worker says to a reload; None where it has ended."""
        try:
            worker.channel.send(control.RELOAD.encode())
            ready = wait([worker.channel, worker.sentinel], REPLY_S)
            if worker.channel in ready:
                return control.decode(worker.channel.recv(_MAX_MESSAGE))
        except (OSError, ValueError):
            return None
        if ready:
            return None
        return Reply(1, (f"worker {worker.process.pid} does not answer",))

    def _join(self) -> None:
        """Wait for the end of workers that were told to stop.

        A second signal kills them and this process, whose status then tells so.
        """
        while alive := [one.sentinel for one in self._workers if one.process.is_alive()]:
            if self._told_read not in wait([self._told_read, *alive]):
                continue
            number = os.read(self._told_read, 1)[0]
            if number in _HURRY:
                for worker in self._workers:
                    worker.process.kill()
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
        for worker in self._workers:
            worker.process.join()
            worker.channel.close()

    def _start(self) -> _Worker:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings, life, ready = self._settings, self._life, self._ready_write

        def main() -> None:
            signal.set_wakeup_fd(-1)
            # Until the worker has a handler of its own. SIGTERM is never ignored, not even for a
            # moment: one that waits would be lost.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            # What the terminal sends is the parent's to pass on.
            for number in set(_HEARD) - {signal.SIGTERM}:
                signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)
            # The parent speaks to systemd; it would refuse to hear a worker.
            os.environ.pop("NOTIFY_SOCKET", None)
            os.close(life[1])
            ours.close()
            for other in self._workers:
                other.channel.close()
            threading.Thread(target=_end_with_parent, args=(life[0],), daemon=True).start()
            self._work(settings, lambda: _tell(ready), theirs)

        process = multiprocessing.get_context("fork").Process(target=main)
        # A signal that comes before the worker has let go of our handlers waits until it has.
        with _blocked():
            process.start()
        theirs.close()
        return _Worker(process, ours)

    def _await_ready(self) -> bool:
        """Wait until all workers answer; return False when told to stop. Raises WorkerFailed."""
        answering = 0
        while answering < len(self._workers):
            sentinels = (worker.sentinel for worker in self._workers)
            found = wait([self._told_read, self._ready_read, *sentinels])
            if self._told_read in found:
                return False
            if self._ready_read in found:
                answering += len(os.read(self._ready_read, len(self._workers)))
            else:
                for worker in self._workers:
                    if not worker.process.is_alive():
                        raise WorkerFailed(worker.process.exitcode)
        return True


@contextmanager
def _blocked() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, _HEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _HEARD)


def _end_with_parent(life: int) -> None:
    """Stop this worker when the parent is gone, however it went: nobody else holds that end."""
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(ready: int) -> None:
    os.write(ready, _READY)
