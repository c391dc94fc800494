"""What is whole in a damaged file goes into the store's file: its sums once, then its records.

The work comes in small steps, each a transaction of its own, so that others write between them. It
can be broken off anywhere and begun anew: the sums are added in one transaction with a mark that
they are (table `Salvaged`), and a record that is there stays. Of several files the latest comes
first: its sums hold those that were taken over from the earlier ones, and its marks say so.
"""

import contextlib
import hashlib
import logging
import math
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeAlias

from embedding_proxy.cache.key import Row
from embedding_proxy.cache.ledger import LedgerKey, Usage
from embedding_proxy.cache.record import width

from . import quarantine
from .carver import CarveReport, RecordCarver
from .connection import folder_of, opened
from .database import FILE_NAME, Database
from .lock import WriterLock
from .quarantine import QuarantinedFile
from .write_batch import PendingRecord, WriteBatch, put_hours

log = logging.getLogger("embedding_proxy.store")

LOCK_FILE = "salvage.lock"
"""Beside the writer's lock: whoever holds it salvages, for all processes."""
RECORDS_A_STEP = 2_000
BYTES_A_STEP = 1 << 20
MAX_PAUSE_SECONDS = 0.01
POLL_SECONDS = 0.1


@dataclass
class Outcome:
    """What came of a file."""

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
    """Yield what is to be done so that all that is whole in a damaged file is in the store's.

    `name` is the mark that its sums were taken. The steps do not depend on one another, but for
    their order. Raises OSError if the file cannot be opened, and what `progress` raises.
    """
    with RecordCarver(path, report, progress) as carver:
        if with_sums:
            yield partial(_put_sums, carver.usage, carver.hours, carver.salvaged | {name}, name)
        for rows in _batches(carver.rows()):
            yield partial(_put_records, rows)
        for rows in _batches(carver.late_rows()):
            yield partial(_put_late_records, rows)


def pause_after(began: float) -> float:
    """Return for how long others get their turn, in seconds: as long as the step took, or enough.

    Who waits for the writer's lock asks for it every millisecond.
    """
    return min(max(0.002, time.monotonic() - began), MAX_PAUSE_SECONDS)


def salvage_file(
    path: Path,
    database: Database,
    progress: Callable[[int], None] = lambda _: None,
    *,
    add_sums: bool = False,
) -> tuple[Outcome, CarveReport]:
    """Put what is whole in any damaged file into the store's. Raises FAILURES.

    The sums of a file that was set aside are added once: it is known by the name of its folder. The
    sums of any other file may be in the ledger already, as those of a backup are. They are added
    only if `add_sums` says so, and once: such a file is known by its content.
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
    """Finish the salvage of all that was set aside of a store, or wait until another process has.

    Returns what came of each file. Raises StoreError.
    """
    path = folder_of(directory) / FILE_NAME
    if not (waiting := quarantine.pending(path)):
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
    return [outcome_of(quarantined) for quarantined in waiting]


@contextlib.contextmanager
def hold_alone(directory: Path) -> Iterator[bool]:
    """Give whether nobody else salvages in this directory; then nobody does meanwhile.

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
    """Note that all is in the store's file. Raises OSError."""
    quarantined.note(done=True, **asdict(outcome))
    log.warning(
        "%s: %d records and %d sums were saved; the folder is not needed any more,"
        " and is kept until you delete it",
        *(quarantined.folder, outcome.records, outcome.sums),
    )


def outcome_of(quarantined: QuarantinedFile) -> Outcome:
    """Return what came of a file, as it was noted."""
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
        began = time.monotonic()
        step(database, outcome)
        if number == 0 and quarantined is not None:
            quarantined.note(sums=True)
        time.sleep(pause_after(began))
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
        # Of two rows of one address the first is the better known.
        pending.setdefault(row.address, PendingRecord(row.record, row.partition, stored))
    there = database.read_many(list(pending))
    bad = [
        (a, record_found.record)
        for a, record_found in there.items()
        if width(record_found.record) is None
    ]
    missing = {a: record for a, record in pending.items() if a not in there}
    missing |= {address: pending[address] for address, _ in bad}
    changes = WriteBatch(records=missing, deletions=bad, keep_newer=True)
    for part in changes.parts(database.most_bytes) if missing else []:
        database.write(part)
    outcome.records += len(missing)
    outcome.present += len(pending) - len(missing)


def _put_late_records(rows: Collection[Row], database: Database, outcome: Outcome) -> None:
    # They may have been deleted to make room; nothing that is certain makes room for them.
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
