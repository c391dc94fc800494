"""Several processes behind one port, that share one store.

The parent takes the address and forks before anything else is opened; it serves nothing itself. A
worker that dies is replaced. Requests for the same input that reach two workers at the same moment
are not joined: each worker has its own flights. Of the declared limits of a provider each worker
uses its share (`Limits.share`).
"""

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

log = logging.getLogger("embedding_proxy.workers")

Work = Callable[[Callable[[], None]], object]
"""What a worker does until SIGTERM; it calls back once it answers requests."""

RESTART_SECONDS = 1.0
_HURRY = (signal.SIGINT, signal.SIGTERM)
"""The signals of which a second one ends the workers at once."""
_TO_STOP = (*_HURRY, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))
_READY = b"."


class WorkerFailed(Exception):
    """A worker could not start."""

    def __init__(self, code: int | None) -> None:
        """`code` is what it ended with: the number of a signal, negated, or its exit code."""
        super().__init__(f"a worker ended with {code} before it had started")
        self.code = code if code and code > 0 else 1
        self.has_said_why = code is not None and code > 0
        """Whether its own last line is all there is to say."""


def run_workers(count: int, work: Work, announce: Callable[[], None]) -> signal.Signals:
    """Run workers until SIGINT, SIGTERM or SIGHUP, and return which it was.

    The workers then answer what they have begun; another SIGINT or SIGTERM ends them at once.
    SIGHUP is ignored where it was from the start, as under `nohup`. `announce` is called once all
    workers answer. Raises WorkerFailed if one ends before that.
    """
    told_read, told_write = os.pipe()
    os.set_blocking(told_write, False)
    signal.set_wakeup_fd(told_write)
    for number in _TO_STOP:
        if number in _HURRY or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
    workers: list[BaseProcess] = []
    ready_read, ready_write = os.pipe()
    life = os.pipe()
    try:
        workers += (_start(work, ready_write, life) for _ in range(count))
        if _await_ready(workers, ready_read, told_read):
            announce()
        while told_read not in wait([told_read, *(worker.sentinel for worker in workers)]):
            for worker in [process for process in workers if not process.is_alive()]:
                log.error("worker %s ended with %s; it is replaced", worker.pid, worker.exitcode)
                workers.remove(worker)
                # Not at once, lest one that cannot live keeps the processor busy.
                if told_read not in wait([told_read], RESTART_SECONDS):
                    workers.append(_start(work, ready_write, life))
        return signal.Signals(os.read(told_read, 1)[0])
    finally:
        for worker in workers:
            worker.terminate()
        _join(workers, told_read)
        signal.set_wakeup_fd(-1)


def _join(workers: list[BaseProcess], signal_fd: int) -> None:
    """Wait for the end of workers that were told to stop.

    A second signal kills them and this process, whose status then tells so.
    """
    while alive := [worker.sentinel for worker in workers if worker.is_alive()]:
        if signal_fd not in wait([signal_fd, *alive]):
            continue
        number = os.read(signal_fd, 1)[0]
        if number in _HURRY:
            for worker in workers:
                worker.kill()
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
    for worker in workers:
        worker.join()


def _start(work: Work, ready: int, life: tuple[int, int]) -> BaseProcess:
    def main() -> None:
        signal.set_wakeup_fd(-1)
        # Until the worker has a handler of its own. SIGTERM is never ignored, not even for a
        # moment: one that waits would be lost.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        # What the terminal sends is the parent's to pass on.
        for number in set(_TO_STOP) - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
        os.close(life[1])
        threading.Thread(target=_end_with_parent, args=(life[0],), daemon=True).start()
        work(lambda: _tell(ready))

    worker = multiprocessing.get_context("fork").Process(target=main)
    # A signal that comes before the worker has let go of our handlers waits until it has.
    signal.pthread_sigmask(signal.SIG_BLOCK, _TO_STOP)
    try:
        worker.start()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _TO_STOP)
    return worker


def _end_with_parent(life: int) -> None:
    """Stop this worker when the parent is gone, however it went: nobody else holds that end."""
    os.read(life, 1)
    os.kill(os.getpid(), signal.SIGTERM)


def _tell(ready: int) -> None:
    os.write(ready, _READY)


def _await_ready(workers: list[BaseProcess], ready: int, signal_fd: int) -> bool:
    """Wait until all workers answer; return False when told to stop before. Raises WorkerFailed."""
    answering = 0
    while answering < len(workers):
        ready_objects = wait([signal_fd, ready, *(worker.sentinel for worker in workers)])
        if signal_fd in ready_objects:
            return False
        if ready in ready_objects:
            answering += len(os.read(ready, len(workers)))
        else:
            for worker in workers:
                if not worker.is_alive():
                    raise WorkerFailed(worker.exitcode)
    return True
