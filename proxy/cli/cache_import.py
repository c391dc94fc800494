"""`embedding-proxy cache import`: entries of an export, or vectors that people own already.

Vectors are checked one by one, and as a whole by a sample. A vector of another model with the same
width looks right. So some texts are embedded anew, with the model that the vectors are said to be
of; the vectors that come back must point the same way.
"""

import asyncio
import itertools
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from embedding_proxy.cache import record
from embedding_proxy.cache.disk import connection
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.key import UNKNOWN, Keyring, Namespace, Row, keyring
from embedding_proxy.cache.maintenance import archive
from embedding_proxy.cache.maintenance.archive import ArchiveError
from embedding_proxy.cache.maintenance.import_source import (
    Pair,
    RejectedPair,
    Source,
    SourceError,
)
from embedding_proxy.cache.record import Entry
from embedding_proxy.cache.shared.purge_log import PurgeLog
from embedding_proxy.index.migration.text_template import READINGS, Rule, TemplateError
from embedding_proxy.providers import tokens, vector
from embedding_proxy.providers.base import Context, Embedder, Vector
from embedding_proxy.providers.route_check import SAME
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.proxy.config import loader
from embedding_proxy.proxy.config.schema import Settings
from embedding_proxy.proxy.importers import FORMATS, open_source
from embedding_proxy.proxy.service.provider_factory import (
    make_router,
    make_scheduler,
    open_providers,
)

from .cache import open_store, open_store_for_reading
from .formatting import count
from .groups import cache_app
from .output import ConfigOption, JsonOption, WorkFailed, check_utf8, print_json, progress

MAX_NORM_ERROR = 0.01
_MAX_SHOWN = 5
_BATCH = 500
_BYTES_A_TOKEN = 4
_MAGIC = b"EMBA"
_STREAM = "-"


@dataclass
class Survey:
    """The result of one pass over a source."""

    pairs: int = 0
    refused: int = 0
    first_refused: list[RejectedPair] = field(default_factory=list)
    sample: list[Pair] = field(default_factory=list)


class SampleDiffers(Exception):
    """The model returns other vectors for these texts; the message has the difference."""


class Importer:
    """Makes rows of a partition from pairs of text and vector."""

    def __init__(self, ring: Keyring, *, unit_norm: bool) -> None:
        """`unit_norm`: refuse a vector of another length than 1."""
        self._ring = ring
        self._unit_norm = unit_norm

    def survey(self, source: Source, sample: int, chance: random.Random) -> Iterator[Survey]:
        """Read all pairs once, and yield the survey so far; draw a sample evenly from all."""
        survey = Survey()
        for item in self.check_pairs(source):
            if isinstance(item, RejectedPair):
                survey.refused += 1
                if len(survey.first_refused) < _MAX_SHOWN:
                    survey.first_refused.append(item)
            else:
                survey.pairs += 1
                if len(survey.sample) < sample:
                    survey.sample.append(item)
                elif (place := chance.randrange(survey.pairs)) < sample:
                    survey.sample[place] = item
            yield survey

    def check_pairs(self, items: Iterable[Pair | RejectedPair]) -> Iterator[Pair | RejectedPair]:
        """Replace each pair whose vector cannot be one of this model by a RejectedPair."""
        for number, item in enumerate(items, start=1):
            why = None if isinstance(item, RejectedPair) else self._objection(item.vector)
            yield item if why is None else RejectedPair(f"pair {number}", f"the vector: {why}")

    def _objection(self, candidate: Vector) -> str | None:
        """Return why this is no vector of the model; None if it may be one."""
        try:
            vector.check(candidate, self._ring.space.dimensions)
        except vector.VectorError as error:
            return str(error)
        length = vector.length(candidate)
        if self._unit_norm and abs(length - 1) > MAX_NORM_ERROR:
            return f"its length is {length:.3f}, and 1 in this model"
        return None

    async def compare(self, sample: list[Pair], embedder: Embedder) -> float:
        """Embed the sample's texts again; return the smallest cosine with the given vectors.

        Raises SampleDiffers, EmbeddingError.
        """
        texts = [pair.text for pair in sample]
        answer = await embedder.embed(self._ring.space, texts, Context())
        cosines = [
            vector.cosine(pair.vector, bought)
            for pair, bought in zip(sample, answer.vectors, strict=True)
        ]
        off = sum(cosine < SAME for cosine in cosines)
        if off:
            raise SampleDiffers(
                f"{off} of {len(cosines)} sampled texts have other vectors in this model"
                f" (cosine {min(cosines):.3f}, wanted {SAME}); nothing was taken in"
            )
        return min(cosines)

    def rows(self, source: Source) -> Iterator[Row]:
        """Yield the rows of the usable pairs. Raises SourceError."""
        batch: list[Pair] = []
        for item in self.check_pairs(source):
            if isinstance(item, Pair):
                batch.append(item)
            if len(batch) == _BATCH:
                yield from self._rows_of(batch)
                batch = []
        yield from self._rows_of(batch)

    def _rows_of(self, pairs: list[Pair]) -> Iterator[Row]:
        texts = [pair.text for pair in pairs]
        encoding = self._ring.space.tokenizer
        if encoding is None:
            # Their cost is not known; a guess is marked as not counted.
            costs = [math.ceil(len(text.encode()) / _BYTES_A_TOKEN) for text in texts]
        else:
            costs = tokens.count(texts, encoding)
        for pair, cost in zip(pairs, costs, strict=True):
            key = self._ring.key(pair.text)
            entry = Entry(pair.vector, cost, encoding is not None, key.digest)
            yield Row(key.address, record.encode(entry), math.nan, self._ring.partition)


@cache_app.command(name="import")
def import_vectors(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of `cache export` (- for standard input), or texts with embeddings:"
            " JSONL, Parquet, a folder of LangChain, qdrant://host/collection.",
        ),
    ],
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="The model of the embeddings. Not for an export.")
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="Their namespace. Not for an export.", callback=check_utf8)
    ] = "",
    sample: Annotated[
        int,
        typer.Option(min=0, help="Texts to embed again to verify the model; 0 = trust SOURCE."),
    ] = 5,
    kind: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    text_by: Annotated[
        str | None,
        typer.Option(help=f"What makes the texts of Qdrant's payloads: {', '.join(READINGS)}."),
    ] = None,
    vector_field: Annotated[
        str | None, typer.Option(help="Field or column of the embedding, or a named vector.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="A file of the texts, for a folder of LangChain.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything; write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Add the entries of an export, or embeddings that you already own.

    Existing entries stay.
    """
    settings = loader.load(config_file)
    if _is_archive(source):
        if namespace:
            raise loader.ConfigError(
                f"{source} is an export, which says itself where its entries belong:"
                " leave out --namespace"
            )
        with _open_archive(source) as file:
            _import_archive(settings, source, file, dry_run=dry_run, as_json=as_json)
        return
    if ":/" not in source and not Path(source).exists():
        raise WorkFailed(f"{source}: No such file or directory")
    model = _check_model(settings, model)
    if kind is not None and kind not in FORMATS:
        raise loader.ConfigError(f"--format: there is no {kind!r}; known: {', '.join(FORMATS)}")
    pairs = open_source(
        source,
        format=kind,
        text_field=text_field,
        vector_field=vector_field,
        texts=texts,
        rule=_rule(text_by),
    )
    entry = settings.models[model]
    ring = keyring(entry.as_space(), Namespace(namespace))
    importer = Importer(ring, unit_norm=entry.unit_norm)
    survey = _survey(importer, pairs, sample)
    cosine = None
    if sample and survey.sample:
        cosine = asyncio.run(_compare(settings, model, importer, survey))
    sums = _put(settings, importer.rows(pairs), survey.pairs, dry_run=dry_run)
    if as_json:
        print_json(
            {
                "pairs": survey.pairs,
                "stored": sums.stored,
                "present": sums.present,
                "refused": survey.refused,
                "first_refused": [{"where": r.where, "why": r.why} for r in survey.first_refused],
                "sample_cosine": cosine,
                "dry_run": dry_run,
            }
        )
    else:
        _tell_sums(sums, dry_run=dry_run)
        for refused in survey.first_refused:
            typer.echo(f"  refused: {refused.where}: {refused.why}", err=True)
        if survey.refused:
            typer.echo(f"  {survey.refused:,} refused in all", err=True)
    if survey.refused:
        raise typer.Exit(1)


def _rule(text_by: str | None) -> Rule | None:
    try:
        return None if text_by is None else Rule.from_name(text_by)
    except TemplateError as error:
        raise loader.ConfigError(f"--text-by: {error}") from error


def _check_model(settings: Settings, model: str | None) -> str:
    if model not in settings.models:
        names = ", ".join(sorted(settings.models))
        raise loader.ConfigError(f"--model: name the model of the embeddings; known: {names}")
    return model


def _is_archive(source: str) -> bool:
    if source == _STREAM or source.endswith(".emba"):
        return True
    try:
        with Path(source).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


@contextmanager
def _open_archive(source: str) -> Iterator[BinaryIO]:
    if source == _STREAM:
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as file:
            yield file
    except OSError as error:
        raise WorkFailed(f"{source}: {error.strerror or error}") from error


def _import_archive(
    settings: Settings, source: str, file: BinaryIO, *, dry_run: bool, as_json: bool
) -> None:
    report = archive.ArchiveReport()
    try:
        if file.seekable():
            # The whole file is checked before any of it is imported.
            begin = file.tell()
            for _ in archive.read(file, archive.ArchiveReport()):
                pass
            file.seek(begin)
        sums = _put(settings, archive.read(file, report), None, dry_run=dry_run)
    except ArchiveError as error:
        raise WorkFailed(f"{source}: {error}") from error
    if as_json:
        print_json(
            {
                "entries": report.entries,
                "stored": sums.stored,
                "present": sums.present,
                "complete": report.complete,
                "missing": report.missing,
                "damaged_places": report.damaged_places,
                "damaged_bytes": report.damaged_bytes,
                "dry_run": dry_run,
            }
        )
    else:
        _tell_sums(sums, dry_run=dry_run)
    if not report.complete:
        raise WorkFailed(
            f"{source}: not all of it is whole:"
            f" {count(report.damaged_places, 'place is', 'places are')} damaged"
            f" ({count(report.damaged_bytes, 'byte')}),"
            f" {count(report.missing, 'entry is', 'entries are')} known to be missing"
        )


def _put(
    settings: Settings, rows: Iterator[Row], total: int | None, *, dry_run: bool
) -> archive.ImportReport:
    sums = archive.ImportReport()
    if settings.cache.shared is not None:
        rows = _renewed(settings, rows)
    try:
        # The first item is read before a store is made for it.
        rows = itertools.chain(list(itertools.islice(rows, 1)), rows)
        with ExitStack() as stack:
            tell = stack.enter_context(progress("importing", total))
            database: ReadableFile
            if dry_run:
                database = stack.enter_context(open_store_for_reading(settings))
            else:
                database = stack.enter_context(open_store(settings, create=True))
            for sums in archive.import_rows(database, rows, dry_run=dry_run):
                tell(sums.stored + sums.present)
    except SourceError as error:
        raise WorkFailed(
            f"{error} ({count(sums.stored, 'entry', 'entries')} taken in before; the same command"
            " goes on)"
        ) from error
    return sums


def _renewed(settings: Settings, rows: Iterator[Row]) -> Iterator[Row]:
    """Yield rows; those of which a purge of all nodes was about have the time of now.

    Else they would not be served: who imports them wants them in spite of it.
    """
    log = PurgeLog(connection.folder_of(settings.cache.directory))
    log.refresh()
    for row in rows:
        partition = row.partition or UNKNOWN
        is_purged = log.is_purged(partition, row.address, row.stored)
        yield row._replace(stored=time.time()) if is_purged else row


def _tell_sums(sums: archive.ImportReport, *, dry_run: bool) -> None:
    verb = "would be taken in" if dry_run else "taken in"
    stored = count(sums.stored, "entry", "entries")
    present = count(sums.present, "was", "were")
    typer.echo(f"{stored} {verb}, {present} there already")


def _survey(importer: Importer, source: Source, sample: int) -> Survey:
    survey = Survey()
    # The sample is random each time, so that nobody can prepare for it.
    try:
        with progress("reading") as tell:
            for survey in importer.survey(source, sample, random.SystemRandom()):
                tell(survey.pairs + survey.refused)
    except SourceError as error:
        raise WorkFailed(f"{error} (0 entries taken in before)") from error
    if not survey.pairs:
        why = f": {survey.first_refused[0].why}" if survey.first_refused else ""
        raise WorkFailed(f"{source.name}: there is nothing that could be taken in{why}")
    return survey


async def _compare(settings: Settings, model: str, importer: Importer, survey: Survey) -> float:
    async with AsyncExitStack() as stack:
        providers = await open_providers(settings, stack)
        router = make_router(settings, model, settings.models[model], providers, HealthRegistry())
        if not router.routes:
            raise WorkFailed(
                f"{router.unavailable} Or trust the source without a sample: --sample 0"
            )
        try:
            return await importer.compare(survey.sample, make_scheduler(router, settings))
        except SampleDiffers as error:
            raise WorkFailed(str(error)) from error
