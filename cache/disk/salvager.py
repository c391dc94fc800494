"""Salvage in the background of a running store: a thread carves, the writer's thread puts.

One process at a time salvages; the others look from time to time whether it is done. Failure
licence: what fails is a line in the log, and tried again in a while. Until all is saved, the
damaged file is read as well.
"""

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

from embedding_proxy.providers.failure_backoff import Backoff

from . import salvage
from .carver import CarveReport
from .connection import Disk
from .database import FAILURES, Database, FileReplaced, is_damage
from .quarantine import QuarantinedFile
from .salvage import Outcome, Step

log = logging.getLogger("embedding_proxy.store")

POLL_SECONDS = 0.02

T = TypeVar("T")


class _Stopped(Exception):
    """The store is closing, or has another file: the rest is for the next time."""


class Salvager:
    """Saves what is in the damaged files of a disk. For one thread: the event loop's."""

    def __init__(self, disk: Disk, replace: Callable[[Database], Awaitable[None]]) -> None:
        """`replace` is told of a file that turns out to be damaged, too."""
        self._disk = disk
        self._replace = replace
        self._backoff = Backoff()
        self._stop = threading.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Begin to save what there is to be saved, if there is anything and nobody is at it."""
        is_idle = self._task is None or self._task.done()
        if is_idle and self._is_ready and not self._backoff.is_waiting:
            self._task = asyncio.create_task(self._run())

    @property
    def _is_ready(self) -> bool:
        disk = self._disk
        return bool(disk.damaged) and disk.file is not None and not self._stop.is_set()

    async def finished(self) -> None:
        """Wait until all is saved, by this process or by another."""
        while self._disk.damaged and not self._stop.is_set():
            self.start()
            if self._task is not None and not self._task.done():
                await asyncio.wait([self._task])
            await self._disk.close_saved()
            if self._disk.damaged:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_SECONDS):
                        await self._stopping.wait()

    async def stop(self) -> None:
        """Break off after the present step."""
        self._stop.set()
        self._stopping.set()
        if self._task is not None:
            await asyncio.wait([self._task])
        if self._thread is not None:
            self._thread.shutdown()

    async def _run(self) -> None:
        file = self._disk.file
        if file is None:
            return
        try:
            # The lock is one of the kernel's, and taken without waiting.
            with salvage.hold_alone(self._disk.folder.parent) as is_alone:
                if is_alone:
                    for damaged in self._disk.damaged:
                        await self._save(damaged.quarantined, file)
        except _Stopped:
            return
        except FAILURES as error:
            self._backoff.fail()
            log.warning("saving what is whole in a damaged file failed: %s", error)
            if is_damage(error) or isinstance(error, FileReplaced):
                await self._replace(file)
        except Exception:
            self._backoff.fail()
            log.exception("saving what is whole in a damaged file failed")
        else:
            self._backoff.succeed()
            await self._disk.close_saved()

    async def _save(self, quarantined: QuarantinedFile, file: Database) -> None:
        if not quarantined.is_pending:
            return
        log.warning(
            "%s: saving what is whole in it; until then it is read as well", quarantined.folder
        )
        outcome, report = Outcome(), CarveReport()
        steps = salvage.steps(
            quarantined.path,
            quarantined.folder.name,
            report,
            self._check,
            with_sums=not quarantined.has_given_sums,
        )
        try:
            has_given_sums = quarantined.has_given_sums
            while (step := await self._in_thread(partial(next, steps, None))) is not None:
                began = time.monotonic()
                await self._put(step, file, outcome)
                if not has_given_sums:
                    has_given_sums = True
                    await self._in_thread(partial(quarantined.note, sums=True))
                await self._sleep(salvage.pause_after(began))
        finally:
            await self._in_thread(steps.close)
        outcome.damaged = report.damaged
        await self._in_thread(partial(salvage.finish, quarantined, outcome))

    async def _put(self, step: Step, file: Database, outcome: Outcome) -> None:
        """Do a step, and again until the disk takes it."""
        backoff = Backoff()
        while True:
            self._check()
            if self._disk.file is not file:
                raise _Stopped
            try:
                await self._disk.write(partial(step, file, outcome))
            except FAILURES as error:
                if is_damage(error) or isinstance(error, FileReplaced):
                    raise
                if not backoff.failures:
                    log.warning("saving what is whole in a damaged file waits: %s", error)
                await self._sleep(backoff.fail())
            else:
                return

    def _check(self, _: int = 0) -> None:
        """Raise _Stopped when it is time to stop."""
        if self._stop.is_set():
            raise _Stopped

    async def _sleep(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _in_thread(self, work: Callable[[], T]) -> T:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="store-salvage")
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
