"""`embedding-proxy cache import`: an export is taken in, or vectors that people own already."""

import asyncio
import itertools
import random
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Annotated, BinaryIO

import typer
from embedding_proxy.cache.disk.read_only import ReadableFile
from embedding_proxy.cache.key import Namespace, keyring
from embedding_proxy.cache.maintenance import archive, transfer
from embedding_proxy.cache.maintenance.archive import ArchiveError
from embedding_proxy.cache.maintenance.import_source import Source
from embedding_proxy.cache.row import Row
from embedding_proxy.providers.routing.health import HealthRegistry
from embedding_proxy.proxy import config
from embedding_proxy.proxy.embedding.opening import make_router, open_providers, scheduled
from embedding_proxy.proxy.formatting import count
from embedding_proxy.proxy.settings.schema import Settings
from embedding_proxy.proxy.sources import FORMATS, open_source

from .adopt import Importer, SampleDiffers, Survey
from .cache import opened, opened_for_reading
from .common import ConfigOption, JsonOption, WorkFailed, plain, print_json, progress
from .groups import cache_app as app

_MAGIC = b"EMBA"
_STREAM = "-"


@app.command(name="import")
def import_vectors(  # noqa: PLR0913 - one parameter an option
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A file of `cache export` (- is standard input), or text and embeddings:"
            " JSONL, Parquet, a folder of LangChain, qdrant://host/collection.",
        ),
    ],
    *,
    config_file: ConfigOption = None,
    model: Annotated[
        str | None, typer.Option(help="The model of the embeddings, if SOURCE is no export.")
    ] = None,
    namespace: Annotated[
        str, typer.Option(help="Where they go, if SOURCE is no export.", callback=plain)
    ] = "",
    sample: Annotated[
        int,
        typer.Option(min=0, help="Embed so many texts anew to prove the model; 0 = trust SOURCE."),
    ] = 5,
    kind: Annotated[
        str | None, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")
    ] = None,
    text_field: Annotated[str, typer.Option(help="Field or column of the text.")] = "text",
    vector_field: Annotated[
        str | None, typer.Option(help="Field or column of the embedding; a named vector.")
    ] = None,
    texts: Annotated[
        Path | None, typer.Option(help="File of the texts, for LangChain's folder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option(help="Check everything, write nothing.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Take in entries of an export, or embeddings you already own; what is there stays."""
    settings = config.load(config_file)
    if _is_archive(source):
        if namespace:
            raise config.ConfigError(
                f"{source} is an export, which says itself where its entries belong:"
                " leave out --namespace"
            )
        with _read(source) as file:
            _take_archive(settings, source, file, dry_run=dry_run, as_json=as_json)
        return
    if ":/" not in source and not Path(source).exists():
        raise WorkFailed(f"{source}: No such file or directory")
    model = _known(settings, model)
    if kind is not None and kind not in FORMATS:
        raise config.ConfigError(f"--format: there is no {kind!r}; known: {', '.join(FORMATS)}")
    pairs = open_source(
        source, format=kind, text_field=text_field, vector_field=vector_field, texts=texts
    )
    entry = settings.models[model]
    ring = keyring(entry.as_space(), Namespace(namespace))
    adoption = Importer(ring, unit_norm=entry.unit_norm)
    survey = _survey(adoption, pairs, sample)
    cosine = None
    if sample and survey.sample:
        cosine = asyncio.run(_compare(settings, model, adoption, survey))
    sums = _put(settings, adoption.rows(pairs), survey.pairs, dry_run=dry_run)
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


def _known(settings: Settings, model: str | None) -> str:
    if model not in settings.models:
        names = ", ".join(sorted(settings.models))
        raise config.ConfigError(f"--model: name the model of the embeddings; known: {names}")
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
def _read(source: str) -> Iterator[BinaryIO]:
    if source == _STREAM:
        yield sys.stdin.buffer
        return
    try:
        with Path(source).open("rb") as file:
            yield file
    except OSError as error:
        raise WorkFailed(f"{source}: {error.strerror or error}") from error


def _take_archive(
    settings: Settings, source: str, file: BinaryIO, *, dry_run: bool, as_json: bool
) -> None:
    report = archive.Report()
    try:
        if file.seekable():
            # The whole is checked before anything of it is taken in.
            begin = file.tell()
            for _ in archive.read(file, archive.Report()):
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
) -> transfer.Written:
    sums = transfer.Written()
    # The first is looked at before a store is made for it.
    rows = itertools.chain(list(itertools.islice(rows, 1)), rows)
    with ExitStack() as stack:
        tell = stack.enter_context(progress("importing", total))
        database: ReadableFile
        if dry_run:
            database = stack.enter_context(opened_for_reading(settings))
        else:
            database = stack.enter_context(opened(settings, create=True))
        for sums in transfer.put(database, rows, dry_run=dry_run):
            tell(sums.stored + sums.present)
    return sums


def _tell_sums(sums: transfer.Written, *, dry_run: bool) -> None:
    verb = "would be taken in" if dry_run else "taken in"
    stored = count(sums.stored, "entry", "entries")
    present = count(sums.present, "was", "were")
    typer.echo(f"{stored} {verb}, {present} there already")


def _survey(adoption: Importer, source: Source, sample: int) -> Survey:
    found = Survey()
    # The sample is drawn anew each time: nobody can prepare for it.
    with progress("reading") as tell:
        for found in adoption.survey(source, sample, random.SystemRandom()):
            tell(found.pairs + found.refused)
    if not found.pairs:
        why = f": {found.first_refused[0].why}" if found.first_refused else ""
        raise WorkFailed(f"{source.name}: there is nothing that could be taken in{why}")
    return found


async def _compare(settings: Settings, model: str, adoption: Importer, survey: Survey) -> float:
    async with AsyncExitStack() as stack:
        providers = await open_providers(settings, stack)
        router = make_router(settings, model, settings.models[model], providers, HealthRegistry())
        if not router.routes:
            raise WorkFailed(
                f"{router.unavailable} Or trust the source without a sample: --sample 0"
            )
        try:
            return await adoption.compare(survey.sample, scheduled(router, settings))
        except SampleDiffers as error:
            raise WorkFailed(str(error)) from error
