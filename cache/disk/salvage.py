"""Salvage: what is whole in a damaged file goes into the store's file, its sums first.

The work comes in small steps, each a transaction of its own, so that others write between them. It
can be broken off anywhere and begun anew: the sums are added in one transaction with a mark that
they are (table `Salvaged`), and a record that is there stays. Of several files the latest comes
first: its sums hold those that were taken over from the earlier ones, and its marks say so.

`Salvager` does this in the background of a running store: a thread carves, the writer's thread
writes. One process at a time salvages; the others look from time to time whether it is done. A
failure is a line in the log, and the work is tried again later. Until all is saved, the damaged
file is read as well. `salvage_pending` and `salvage_file` do it for a command.
"""

import asyncio
import contextlib
import hashlib
import logging
import math
import threading
import time
from collections.abc import Awaitable, Callable, Collection, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias, TypeVar

from embedding_proxy.cache.key import Row
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.record import width
from embedding_proxy.providers.failure_backoff import Backoff

from . import quarantine
from .carver import CarveReport, RecordCarver
from .connection import Disk, folder_of, opened
from .database import FAILURES, FILE_NAME, Database, FileReplaced, is_damage
from .lock import WriterLock
from .quarantine import QuarantinedFile
from .write_batch import PendingRecord, WriteBatch, put_hours

T = TypeVar("T")

log = logging.getLogger("embedding_proxy.store")

LOCK_FILE = "salvage.lock"
"""Beside the writer's lock: its holder salvages for all processes."""
RECORDS_A_STEP = 2_000
BYTES_A_STEP = 1 << 20
MAX_PAUSE_SECONDS = 0.01
POLL_SECONDS = 0.1
"""Interval of the checks whether another process has finished a salvage."""
FINISH_POLL_SECONDS = 0.02
"""Interval of the checks of a store that waits for its own salvage."""


@dataclass
class Outcome:
    """The result of salvaging a file."""

    records: int = 0
    """Records that were saved."""
    present: int = 0
    """Records that were in the store's file already."""
    damaged: int = 0
    """Records that are not whole."""
    sums: int = 0
    """Lines of the ledger that were added to the store's."""


Step: TypeAlias = Callable[[Database, Outcome], None]
"""One transaction on the store's file. Raises FAILURES; then it can be tried again."""


def steps(
    path: Path,
    name: str,
    report: CarveReport,
    progress: Callable[[int], None] = lambda _: None,
    *,
    with_sums: bool = True,
) -> Generator[Step, None, None]:
    """Yield the steps that bring everything whole in a damaged file into the store's file.

    `name` marks that its sums were taken. The steps are independent, except for their order. Raises
    OSError if the file cannot be opened, and what `progress` raises.
    """
    with RecordCarver(path, report, progress) as carver:
        if with_sums:
            yield partial(_put_sums, carver.usage, carver.hours, carver.salvaged | {name}, name)
        for rows in _batches(carver.rows()):
            yield partial(_put_records, rows)
        for rows in _batches(carver.late_rows()):
            yield partial(_put_late_records, rows)


def pause_after(start: float) -> float:
    """Return the pause after a step for other writers, in seconds: as long as the step, bounded.

    A writer that waits for the lock tries it every millisecond.
    """
    return min(max(0.002, time.monotonic() - start), MAX_PAUSE_SECONDS)


def salvage_file(
    path: Path,
    database: Database,
    progress: Callable[[int], None] = lambda _: None,
    *,
    add_sums: bool = False,
) -> tuple[Outcome, CarveReport]:
    """Put everything whole in any damaged file into the store's. Raises FAILURES.

    The sums of a quarantined file are added once; the name of its folder identifies it. The sums of
    any other file may be in the ledger already, as those of a backup are. They are added only with
    `add_sums`, and once; the content of the file identifies it.
    """
    if quarantine.is_in_folder(path):
        return _run(database, path, path.absolute().parent.name, progress)
    return _run(database, path, f"content:{_digest(path)}" if add_sums else None, progress)


def salvage_pending(
    directory: Path,
    size_limit: int,
    pinned: Collection[str] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> list[Outcome]:
    """Finish the salvage of all quarantined files of a store, or wait for another process's.

    Returns the outcome of each file. Raises StoreError.
    """
    path = folder_of(directory) / FILE_NAME
    if not (files := quarantine.pending(path)):
        return []
    with opened(directory, size_limit, pinned, create=True) as database:
        while quarantine.pending(path):
            with hold_alone(directory) as is_alone:
                for quarantined in quarantine.pending(path) if is_alone else []:
                    outcome, _ = _run(
                        database,
                        quarantined.path,
                        quarantined.folder.name,
                        progress,
                        quarantined=quarantined,
                    )
                    finish(quarantined, outcome)
            if not is_alone:
                time.sleep(POLL_SECONDS)
    return [outcome_of(quarantined) for quarantined in files]


@contextlib.contextmanager
def hold_alone(directory: Path) -> Iterator[bool]:
    """Give whether this process alone salvages in this directory.

    Raises OSError.
    """
    with contextlib.ExitStack() as stack:
        lock = stack.enter_context(contextlib.closing(WriterLock(directory / LOCK_FILE, 0.0)))
        try:
            stack.enter_context(lock)
        except TimeoutError:
            is_alone = False
        else:
            is_alone = True
        yield is_alone


def finish(quarantined: QuarantinedFile, outcome: Outcome) -> None:
    """Record that everything is in the store's file. Raises OSError."""
    quarantined.note(done=True, **asdict(outcome))
    log.warning(
        "%s: %d records and %d sums were saved; the folder is not needed any more,"
        " and is kept until you delete it",
        *(quarantined.folder, outcome.records, outcome.sums),
    )


def outcome_of(quarantined: QuarantinedFile) -> Outcome:
    """Return the recorded outcome of a file."""
    state = quarantined.state
    return Outcome(**{name: int(state.get(name, 0)) for name in asdict(Outcome())})


def _run(
    database: Database,
    path: Path,
    name: str | None,
    progress: Callable[[int], None],
    *,
    quarantined: QuarantinedFile | None = None,
) -> tuple[Outcome, CarveReport]:
    outcome, report = Outcome(), CarveReport()
    # Without a mark no sums are taken.
    with_sums = name is not None and not (quarantined is not None and quarantined.has_given_sums)
    for number, step in enumerate(steps(path, name or "", report, progress, with_sums=with_sums)):
        start = time.monotonic()
        step(database, outcome)
        if number == 0 and quarantined is not None:
            quarantined.note(sums=True)
        time.sleep(pause_after(start))
    outcome.damaged = report.damaged
    return outcome, report


def _put_sums(  # noqa: PLR0913, PLR0917 - what was found, and where it goes
    usage: dict[tuple[int, LedgerKey], Usage],
    hours: dict[tuple[int, str, str], Usage],
    names: Collection[str],
    name: str,
    database: Database,
    outcome: Outcome,
) -> None:
    with database.transaction(len(usage)) as connection:
        rows = connection.execute("SELECT 1 FROM Salvaged WHERE name = ?", (name,))
        if rows.fetchone() is not None:
            return
        WriteBatch(usage=usage).put_sums(connection)
        put_hours(connection, ((*line, *sums) for line, sums in hours.items()))
        connection.executemany(
            "INSERT OR IGNORE INTO Salvaged (name) VALUES (?)",
            [(folder_name,) for folder_name in names],
        )
    outcome.sums += len(usage)


def _put_records(rows: Iterable[Row], database: Database, outcome: Outcome) -> None:
    now = time.time()
    pending: dict[bytes, PendingRecord] = {}
    for row in rows:
        stored = row.stored if math.isfinite(row.stored) and 0 <= row.stored <= now else now
        # Of two rows of one address, the first has more known facts.
        pending.setdefault(row.address, PendingRecord(row.record, row.partition, stored))
    stored_records = database.read_many(list(pending))
    bad = [
        (a, record_found.record)
        for a, record_found in stored_records.items()
        if width(record_found.record) is None
    ]
    missing = {a: record for a, record in pending.items() if a not in stored_records}
    missing |= {address: pending[address] for address, _ in bad}
    changes = WriteBatch(records=missing, deletions=bad, keep_newer=True)
    for part in changes.parts(database.most_bytes) if missing else []:
        database.write(part)
    outcome.records += len(missing)
    outcome.present += len(pending) - len(missing)


def _put_late_records(rows: Collection[Row], database: Database, outcome: Outcome) -> None:
    # They may have been evicted. No certain record is evicted for them.
    if database.room > 2 * sum(len(row.record) for row in rows):
        _put_records(rows, database, outcome)


def _batches(rows: Iterator[Row]) -> Iterator[list[Row]]:
    batch: list[Row] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.record)
        if len(batch) >= RECORDS_A_STEP or size >= BYTES_A_STEP:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while data := file.read(1 << 20):
            digest.update(data)
    return digest.hexdigest()


class _Stopped(Exception):
    """The store is closing, or has another file. The next start continues."""


class Salvager:
    """Saves the content of a disk's damaged files. For one thread: the event loop's."""

    def __init__(self, disk: Disk, replace: Callable[[Database], Awaitable[None]]) -> None:
        """`replace` gets a file that turns out to be damaged too."""
        self._disk = disk
        self._replace = replace
        self._backoff = Backoff()
        self._stop = threading.Event()
        self._stopping = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._thread: ThreadPoolExecutor | None = None

    def start(self) -> None:
        """Begin to salvage, if there is anything to salvage and no salvage is running."""
        is_idle = self._task is None or self._task.done()
        if is_idle and self._is_ready and not self._backoff.is_waiting:
            self._task = asyncio.create_task(self._run())

    @property
    def _is_ready(self) -> bool:
        disk = self._disk
        return bool(disk.damaged) and disk.file is not None and not self._stop.is_set()

    async def finished(self) -> None:
        """Wait until everything is saved, by this process or by another."""
        while self._disk.damaged and not self._stop.is_set():
            self.start()
            if self._task is not None and not self._task.done():
                await asyncio.wait([self._task])
            await self._disk.close_saved()
            if self._disk.damaged:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(FINISH_POLL_SECONDS):
                        await self._stopping.wait()

    async def stop(self) -> None:
        """Stop after the present step."""
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
            with hold_alone(self._disk.folder.parent) as is_alone:
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
        work = steps(
            quarantined.path,
            quarantined.folder.name,
            report,
            self._check,
            with_sums=not quarantined.has_given_sums,
        )
        try:
            has_given_sums = quarantined.has_given_sums
            while (step := await self._in_thread(partial(next, work, None))) is not None:
                start = time.monotonic()
                await self._put(step, file, outcome)
                if not has_given_sums:
                    has_given_sums = True
                    await self._in_thread(partial(quarantined.note, sums=True))
                await self._sleep(pause_after(start))
        finally:
            await self._in_thread(work.close)
        outcome.damaged = report.damaged
        await self._in_thread(partial(finish, quarantined, outcome))

    async def _put(self, step: Step, file: Database, outcome: Outcome) -> None:
        """Do a step; repeat it until the disk accepts it."""
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
        """Raise _Stopped if the salvage has to stop."""
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
