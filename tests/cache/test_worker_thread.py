"""The thread that works for the event loop: results, failures, cancelled callers, its end."""

import asyncio
import subprocess
import sys
import threading
from functools import partial

import pytest
from embedding_proxy.cache.disk.worker_thread import WorkerThread


async def test_work_is_done_in_order_in_one_thread():
    """Each caller gets its own result or failure."""
    thread, done = WorkerThread("worker"), list[int]()

    def work(number: int) -> tuple[int, str]:
        done.append(number)
        if number == 2:
            raise ValueError(f"number {number}")
        return number, threading.current_thread().name

    came = await asyncio.gather(
        *(thread.run(partial(work, number)) for number in range(4)), return_exceptions=True
    )
    thread.shutdown()
    assert done == [0, 1, 2, 3]
    assert came[:2] + came[3:] == [(number, "worker") for number in (0, 1, 3)]
    assert repr(came[2]) == "ValueError('number 2')"


async def test_a_caller_that_has_gone_stops_nothing():
    """What was begun for it is ended; what was not is left out; the next one is served."""
    thread, done = WorkerThread("worker"), list[str]()
    has_begun, may_end = threading.Event(), threading.Event()

    def first() -> None:
        has_begun.set()
        may_end.wait(60)
        done.append("first")

    tasks = [
        asyncio.create_task(thread.run(work))
        for work in (first, partial(done.append, "second"), partial(done.append, "third"))
    ]
    await asyncio.sleep(0)
    await asyncio.to_thread(has_begun.wait, 60)
    for task in tasks[:2]:
        task.cancel()
    await asyncio.sleep(0)
    may_end.set()
    await tasks[2]
    thread.shutdown()
    assert done == ["first", "third"]


async def test_after_its_end_nothing_is_taken():
    """The end waits for what was begun; a second end, or one before any work, is none."""
    thread, unused = WorkerThread("worker"), WorkerThread("unused")
    task = asyncio.create_task(thread.run(lambda: 1))
    await asyncio.sleep(0)
    for _ in range(2):
        thread.shutdown()
        unused.shutdown()
    assert await task == 1
    for one in (thread, unused):
        with pytest.raises(RuntimeError, match="shut down"):
            await one.run(lambda: 1)


def test_the_end_of_the_process_waits_for_what_was_begun():
    """Work that nobody waits for any more is ended before the interpreter is."""
    program = """
import asyncio, threading
from embedding_proxy.cache.disk.worker_thread import WorkerThread
thread, has_begun, may_end = WorkerThread("worker"), threading.Event(), threading.Event()
def work():
    has_begun.set()
    may_end.wait(60)
    print("done", flush=True)
async def main():
    task = asyncio.create_task(thread.run(work))
    await asyncio.sleep(0)
    has_begun.wait(60)
asyncio.run(main())
may_end.set()
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert (run.stdout, run.stderr) == (b"done\n", b"")
