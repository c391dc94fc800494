"""`embedding-proxy index`: what waits for Qdrant, what it refused, and what it has lost."""

import asyncio
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from typing import Annotated, TypeVar

import typer
from embedding_proxy.cache import record
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.index.client import Connection
from embedding_proxy.index.collection_reader import CollectionReader
from embedding_proxy.index.errors import QdrantFailure
from embedding_proxy.index.indexer import Indexer
from embedding_proxy.index.outbox import (
    FAILURES,
    FILE_NAME,
    CollectionBacklog,
    Outbox,
    OutboxFull,
    read_backlog,
    read_collections,
)
from embedding_proxy.index.outbox_db import OutboxFile, ReadOnlyOutbox
from embedding_proxy.index.point import Backlog, JournalEntry
from embedding_proxy.index.resync import Comparison, resync
from embedding_proxy.providers.base import Vector
from embedding_proxy.providers.dimensions import derive
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.index import Qdrant
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.service import index_writes

from .cache import open_store_for_reading
from .formatting import count, size
from .groups import index_app
from .output import ConfigOption, JsonOption, WorkFailed, path_text, print_json, printable, progress

T = TypeVar("T")

MAX_FAILURES = 4
"""Failures of Qdrant after which a command stops waiting. The points stay on disk."""


@index_app.command()
def status(*, config_file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Show how many points wait for Qdrant, and those it refused, with the reasons."""
    settings, _ = _settings(config_file)
    with _reading(settings) as sql:
        backlog = Backlog(0, 0, None, 0, ()) if sql is None else read_backlog(sql)
        collections = [] if sql is None else read_collections(sql)
    age = 0.0 if backlog.oldest is None else max(0.0, time.time() - backlog.oldest)
    if as_json:
        values = {
            "backlog_points": backlog.points,
            "backlog_bytes": backlog.bytes,
            "backlog_age_s": round(age, 3),
            "refused_points": backlog.dead,
            "refused": backlog.refusals(),
            "collections": [collection._asdict() for collection in collections],
        }
        print_json(values)
        return
    since = f", the first of them for {age:.0f} s" if backlog.points else ""
    typer.echo(f"waiting: {count(backlog.points, 'point')}, {size(backlog.bytes)}{since}")
    typer.echo(f"put aside: {count(backlog.dead, 'point')}")
    for name, reason, points in backlog.reasons:
        typer.echo(printable(f"  {name}: {count(points, 'point')}: {reason}"))
    for collection in collections:
        typer.echo(printable(_line(collection)))


def _line(collection: CollectionBacklog) -> str:
    return (
        f"{collection.collection}: {count(collection.journaled, 'point')} of {collection.space} at"
        f" {collection.dimensions}, {collection.waiting:,} waiting, {collection.refused:,} put"
        " aside"
    )


@index_app.command()
def retry(*, config_file: ConfigOption = None, as_json: JsonOption = False) -> None:
    """Retry at once the points that Qdrant refused. Exit code 1 if some are refused again."""
    settings, qdrant = _settings(config_file)
    with _writing(settings) as outbox:
        queued = 0 if outbox is None else outbox.requeue_dead_letters()
    result = asyncio.run(_send(settings, qdrant)) if queued else _Sent()
    if as_json:
        print_json({"queued": queued, **result.as_json()})
    else:
        typer.echo(f"{count(queued, 'point')} tried again{result.words}")
    result.check()


@index_app.command(name="resync")
def resync_collections(
    collection: Annotated[
        str | None,
        typer.Argument(help="This one alone, also if it is gone; else all that are there."),
    ] = None,
    *,
    config_file: ConfigOption = None,
    dry_run: Annotated[bool, typer.Option(help="Only compare; nothing is sent.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Send again the indexed points that Qdrant has lost, from the cache.

    That is also what somebody deleted there on purpose: see --dry-run. Nothing is bought. What is
    not in the cache any more is indexed by the next answer with it.
    """
    settings, qdrant = _settings(config_file)
    with open_store_for_reading(settings) as file, _writing(settings) as outbox:
        comparisons: list[Comparison] = []
        if outbox is not None:
            try:
                comparisons = asyncio.run(
                    _compare(settings, qdrant, outbox, file, collection, dry_run=dry_run)
                )
            except QdrantFailure as error:
                rest = "what was queued so far is sent by the proxy, do it again for the rest"
                raise WorkFailed(f"{error}; {rest}") from error
    if collection is not None and not comparisons:
        raise WorkFailed(f"{collection}: nothing is known of a collection of that name")
    queued = sum(comparison.queued for comparison in comparisons)
    result = asyncio.run(_send(settings, qdrant)) if queued and not dry_run else _Sent()
    if as_json:
        rows = [
            {
                "collection": comparison.collection,
                "exists": comparison.exists,
                "missing": comparison.missing,
                "queued": comparison.queued,
                "not_cached": comparison.unknown,
            }
            for comparison in comparisons
        ]
        print_json({"collections": rows, "dry_run": dry_run, **result.as_json()})
    else:
        for line in _comparison_lines(comparisons, dry_run=dry_run):
            typer.echo(printable(line))
        if result.words:
            typer.echo(result.words.lstrip("; "))
    result.check()


def _comparison_lines(comparisons: Sequence[Comparison], *, dry_run: bool) -> Iterator[str]:
    if not comparisons:
        yield "nothing was indexed so far"
    for comparison in comparisons:
        name = comparison.collection
        if not comparison.exists:
            yield f"{name}: is not there; name it to make it and send its points again"
            continue
        line = f"{name}: {count(comparison.missing, 'point')} missing"
        if comparison.missing:
            line += f", {comparison.queued:,} {'could be sent' if dry_run else 'sent again'}"
        if comparison.unknown:
            line += f", {comparison.unknown:,} not in the cache: the next answers write them"
        yield line


class _Sent:
    """The result of sending."""

    def __init__(self, snapshot: dict[str, object] | None = None, *, is_ours: bool = True) -> None:
        values = snapshot or {}
        self.left = int(str(values.get("backlog_points", 0)))
        self.refused = int(str(values.get("refused_points", 0)))
        self.failure = values.get("last_failure")
        self.is_ours = is_ours

    @property
    def words(self) -> str:
        """The words after the number of points."""
        if not self.is_ours:
            return "; the proxy that runs sends them"
        if self.left:
            return f"; {count(self.left, 'point')} still wait: {self.failure}"
        return f"; {count(self.refused, 'point')} refused again" if self.refused else ""

    def as_json(self) -> dict[str, object]:
        """Return the result for scripts."""
        return {
            "sent_by": "this command" if self.is_ours else "the proxy",
            "waiting": self.left,
            "refused": self.refused,
        }

    def check(self) -> None:
        """Exit with 1 if some of the points have not arrived."""
        if self.is_ours and (self.left or self.refused):
            raise typer.Exit(1)


def _settings(config_file: "ConfigOption") -> tuple[Settings, Qdrant]:
    settings = loader.load(config_file, purpose="inspect")
    if settings.index.qdrant is None:
        raise loader.ConfigError("index.qdrant: is not set, so nothing is indexed; set its url")
    return settings, settings.index.qdrant


@contextmanager
def _reading(settings: Settings) -> Iterator[sqlite3.Connection | None]:
    """Give the outbox for reading; None if there is none yet. Raises WorkFailed."""
    folder = settings.cache.directory
    if not (folder / FILE_NAME).exists():
        yield None
        return
    try:
        try:
            file: ReadOnlyOutbox | OutboxFile = ReadOnlyOutbox(folder)
        except sqlite3.OperationalError:
            file = OutboxFile(folder)  # one of an earlier version has to be brought up to date
        with closing(file):
            yield file.sql
    except FAILURES as error:
        raise WorkFailed(f"{path_text(folder / FILE_NAME)}: {error}") from error


@contextmanager
def _writing(settings: Settings) -> Iterator[Outbox | None]:
    """Give the outbox; None if there is none yet. Raises WorkFailed."""
    folder = settings.cache.directory
    if not (folder / FILE_NAME).exists():
        yield None
        return
    assert settings.index.qdrant is not None  # noqa: S101 - see _settings
    limit = int(settings.index.qdrant.outbox_gib * index_writes.GIB)
    try:
        with closing(Outbox(folder, limit)) as outbox:
            yield outbox
    except OutboxFull as error:
        raise WorkFailed(
            f"the outbox is full ({error}): let the proxy send it, or raise index.qdrant.outbox_gib"
        ) from error
    except FAILURES as error:
        raise WorkFailed(f"{path_text(folder / FILE_NAME)}: {error}") from error


async def _compare(  # noqa: PLR0913 - by name
    settings: Settings,
    qdrant: Qdrant,
    outbox: Outbox,
    file: ReadableFile,
    collection: str | None,
    *,
    dry_run: bool,
) -> list[Comparison]:
    async def on_disk(work: Callable[[Outbox], T]) -> T:
        return work(outbox)

    def lookup(entries: Sequence[JournalEntry], dimensions: int) -> list[Vector | None]:
        return _cached_vectors(file, entries, dimensions)

    results = []
    names = index_writes.collection_names(settings, qdrant)
    with progress("comparing") as tell:
        async with index_writes.connection(qdrant) as open_connection:
            comparisons = resync(
                CollectionReader(open_connection),
                on_disk,
                names,
                lookup,
                collection=collection,
                dry_run=dry_run,
            )
            async for comparison in comparisons:
                results.append(comparison)
                tell(len(results))
    return results


def _cached_vectors(
    file: ReadableFile, entries: Sequence[JournalEntry], dimensions: int
) -> list[Vector | None]:
    """Return the vectors of entries at a width; None for those that are not in the cache."""
    records = file.read_many([entry.address for entry in entries])
    vectors: list[Vector | None] = []
    for entry in entries:
        stored_record = records.get(entry.address)
        width = None if stored_record is None else record.width(stored_record.record)
        decoded = None
        if stored_record is not None and width is not None and entry.digest is not None:
            decoded = record.decode(stored_record.record, entry.digest, width)
        vectors.append(None if decoded is None else derive([decoded.vector], dimensions)[0])
    return vectors


async def _send(settings: Settings, qdrant: Qdrant) -> _Sent:
    """Send pending points, unless a running proxy does it."""
    async with _indexer(settings, qdrant) as indexer:
        if not indexer.sending:
            return _Sent(is_ours=False)
        with progress("sending") as tell:
            while True:
                state = await indexer.snapshot()
                if state is not None:
                    tell(state["since_start"]["sent"])
                    if not state["backlog_points"]:
                        return _Sent(state)
                    if state["since_start"]["failures"] >= MAX_FAILURES:
                        return _Sent(state)
                await asyncio.sleep(0.05)


@asynccontextmanager
async def _indexer(settings: Settings, qdrant: Qdrant) -> AsyncIterator[Indexer]:
    async def begin(_: Connection) -> None:
        pass

    indexer = Indexer(
        settings.cache.directory,
        lambda: index_writes.connection(qdrant),
        index_writes.collection_options(qdrant),
        on_open=begin,
        size_limit=int(qdrant.outbox_gib * index_writes.GIB),
        max_bytes=qdrant.batch_mib * index_writes.MIB,
        names=index_writes.collection_names(settings, qdrant),
    )
    async with indexer:
        yield indexer
