"""Several processes behind one port, that share one store.

The parent takes the address and forks before anything else is opened; it serves nothing itself. A
worker that dies is replaced. Requests for the same input that reach two workers at the same moment
are not joined: each worker has its own flights.
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
"""What a worker does until it is told to stop; it calls back once it answers requests."""

RESTART_SECONDS = 1.0
_TO_STOP = (signal.SIGINT, signal.SIGTERM)
_READY = b"."


class WorkerFailed(Exception):
    """A worker could not start."""

    def __init__(self, code: int | None) -> None:
        """`code` is what it ended with: the number of a signal, negated, or its exit code."""
        super().__init__(f"a worker ended with {code} before it had started")
        self.code = code if code and code > 0 else 1
        self.has_said_why = code is not None and code > 0
        """Whether its own last line is all there is to say."""


def run(count: int, work: Work, announce: Callable[[], None]) -> signal.Signals:
    """Run workers until SIGINT or SIGTERM, and return which it was.

    `announce` is called once all workers answer. Raises WorkerFailed if one ends before that.
    """
    told_read, told_write = os.pipe()
    os.set_blocking(told_write, False)
    signal.set_wakeup_fd(told_write)
    for number in _TO_STOP:
        signal.signal(number, lambda _number, _frame: None)
    workers: list[BaseProcess] = []
    ready_read, ready_write = os.pipe()
    life = os.pipe()
    try:
        workers += (_start(work, ready_write, life) for _ in range(count))
        _await_ready(workers, ready_read)
        announce()
        while told_read not in wait([told_read, *(worker.sentinel for worker in workers)]):
            for worker in [one for one in workers if not one.is_alive()]:
                log.error("worker %s ended with %s; it is replaced", worker.pid, worker.exitcode)
                workers.remove(worker)
                # Not at once, lest one that cannot live keeps the processor busy.
                if told_read not in wait([told_read], RESTART_SECONDS):
                    workers.append(_start(work, ready_write, life))
        return signal.Signals(os.read(told_read, 1)[0])
    finally:
        signal.set_wakeup_fd(-1)
        _end_at_second_signal(workers)
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.join()


def _end_at_second_signal(workers: list[BaseProcess]) -> None:
    """From now on a signal to stop ends this process and its workers at once."""

    def end(number: int, _: object) -> None:
        for worker in workers:
            worker.kill()
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)

    for number in _TO_STOP:
        signal.signal(number, end)


def _start(work: Work, ready: int, life: tuple[int, int]) -> BaseProcess:
    def main() -> None:
        signal.set_wakeup_fd(-1)
        # Until the worker has handlers of its own: Ctrl-C is the parent's to pass on.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
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


def _await_ready(workers: list[BaseProcess], ready: int) -> None:
    answering = 0
    while answering < len(workers):
        if ready in wait([ready, *(worker.sentinel for worker in workers)]):
            answering += len(os.read(ready, len(workers)))
        else:
            for worker in workers:
                if not worker.is_alive():
                    raise WorkerFailed(worker.exitcode)
